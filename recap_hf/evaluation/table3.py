"""The four settings of the paper's Table 3: compositional clips, and events that no training caption names.

The paper shows one caption per setting. Here each setting is scored over all its clips, with examples that are not
chosen by hand: the clips with the largest, the middle and the smallest gain over the prefix method.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recap_hf.modeling.retrieval_recap import normalize_text
from recap_hf.scoring import METRIC_LABELS
from recap_hf.scoring.bootstrap import mean_difference
from recap_hf.scoring.statistics import novel_words, words_of

from .grid_results import AUDIO_MAIN, MAIN, PREFIX_MAIN, GridResults, Setting
from .tables import markdown_table

# Rows of a setting, the captioner's first.
_ROWS = {
    MAIN: "RECAP (w/ DS)",
    (MAIN[0], "no_captions"): "RECAP without captions in its prompt",
    (MAIN[0], "first_retrieved"): "first retrieved caption",
    PREFIX_MAIN: PREFIX_MAIN[0],
    AUDIO_MAIN: AUDIO_MAIN[0].replace(MAIN[0], f"({MAIN[0]})"),
}


def four_settings(results: GridResults) -> list[dict[str, Any]]:
    """Every setting that the grid's runs allow, numbered as in the paper if there are two domains.

    Compositional: trained and tested on one domain, clips of several events. Novel: trained on one domain, tested on
    another, clips whose references have a word that no training caption has.

    Returns:
        For each setting that has clips `number`, `title`, `test_set`, `clips` and `of` (their number, that of all),
        `metric`, `rows` (`name`, `mean`, and for all but the first `gain` of RECAP over it with interval and verdict)
        and `examples`.
    """
    domains = list(results.config.domains)
    singles = [names[0] for names in results.config.training_sets if len(names) == 1]
    same = [(name, name) for name in domains if name in singles]
    novel = [(trained, tested) for tested in domains for trained in singles if trained != tested]
    wanted = same + novel
    if len(same) == 2 and len(novel) == 2:
        # 1 compositional on the first domain, 2 and 3 novel, 4 compositional on the second.
        wanted = [same[0], *novel, same[1]]
    found = [_describe(results.settings[(trained,), tested]) for trained, tested in wanted]
    return [{"number": number, **content} for number, content in enumerate(found, start=1) if content]


def _describe(setting: Setting) -> dict[str, Any] | None:
    if MAIN not in setting.runs_of:
        return None
    trained, tested = setting.titles
    if setting.test_set in setting.training_set:
        what, chosen = "several events", setting.events is not None and setting.events > 1
    else:
        what = f"a word that no training caption of {trained} has"
        captions = setting.results.grid.training_captions(setting.training_set[0])
        known = words_of(normalize_text(record["caption"]) for record in captions)
        chosen = np.array(list(map(bool, novel_words(list(setting.clips.values()), known))))
    if not np.any(chosen):
        return None
    values = {key: setting.values(key) for key in _ROWS if key in setting.runs_of}
    best = values[MAIN][chosen]
    rows: list[dict[str, Any]] = [{"name": _ROWS[MAIN], "mean": float(best.mean())}]
    for key in list(values)[1:]:
        other = values[key][chosen]
        gain = mean_difference(other, best, setting.results.config.resamples)
        interval = {"gain": gain.difference, "low": gain.low, "high": gain.high, "verdict": gain.verdict}
        rows.append({"name": _ROWS[key], "mean": float(other.mean()), **interval})
    return {
        "title": f"Trained on {trained}, tested on {tested}: {what}",
        "test_set": setting.test_set,
        "clips": int(chosen.sum()),
        "of": len(chosen),
        "metric": METRIC_LABELS[setting.metric],
        "rows": rows,
        "examples": _examples(setting, values, np.flatnonzero(chosen)),
    }


def _examples(setting: Setting, values: dict[tuple[str, str], np.ndarray], chosen: np.ndarray) -> list[dict[str, Any]]:
    """The clips with the largest, the middle and the smallest gain, with the captions of the first seed."""
    rival = PREFIX_MAIN if PREFIX_MAIN in values else list(values)[1]
    gain = values[MAIN] - values[rival]
    ordered = chosen[np.argsort(-gain[chosen], kind="stable")]
    picked: dict[int, str] = {}
    for which, clip in (("largest", ordered[0]), ("middle", ordered[len(ordered) // 2]), ("smallest", ordered[-1])):
        picked.setdefault(int(clip), which)
    predictions = {key: setting.predictions(key) for key in values}
    return [
        {
            "clip_id": predictions[MAIN][clip]["clip_id"],
            "why": f"{which} gain over {_ROWS[rival]}: {gain[clip]:+.3f}",
            "references": predictions[MAIN][clip]["references"],
            "captions": {_ROWS[key]: lines[clip]["prediction"] for key, lines in predictions.items()},
            "retrieved": [hit["caption"] for hit in predictions[MAIN][clip]["retrieved"]],
        }
        for clip, which in picked.items()
    ]


def settings_markdown(settings: Sequence[dict[str, Any]]) -> str:
    """The settings as Markdown."""
    parts = ["### The settings of the paper's Table 3\n"]
    for setting in settings:
        parts.append(f"#### {setting['number']}. {setting['title']} ({setting['clips']} of {setting['of']} clips)\n")
        rows = [[row["name"], f"{row['mean']:.3f}", _gain(row)] for row in setting["rows"]]
        parts.append(markdown_table(["Method", setting["metric"], "RECAP minus it, 95 % interval"], rows))
        for example in setting["examples"]:
            parts.append(f"Clip `{example['clip_id']}` ({example['why']})\n")
            lines = [["Ground truth", example["references"][0]], *map(list, example["captions"].items())]
            parts.append(markdown_table(["", ""], lines))
            parts.append("Retrieved: " + "; ".join(example["retrieved"]) + "\n")
    return "\n".join(parts)


def _gain(row: dict[str, Any]) -> str:
    return f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['verdict']}" if "gain" in row else ""
