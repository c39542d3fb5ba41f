"""The four settings of the paper's Table 3: compositional clips, and events that no training caption names.

The paper shows one caption per setting. Here each setting is scored over all its clips, with examples that are not
chosen by hand: the clips with the largest, the middle and the smallest gain over the prefix method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_hf.modeling.retrieval_recap import normalize_text
from recap_hf.scoring import METRIC_LABELS
from recap_hf.scoring.bootstrap import mean_difference

from .folder import EvaluationFolder
from .grid_config import AUDIO_TO_AUDIO, MAIN_ROW, PREFIX, RELATED_LABELS
from .systems import MAIN_SYSTEM
from .tables import markdown_table

if TYPE_CHECKING:
    from .grid_results import GridResults, Row

_PREFIX = RELATED_LABELS[PREFIX]
_AUDIO = RELATED_LABELS[AUDIO_TO_AUDIO]
# Rows of a setting: (label of the runs, system) -> name.
_ROWS = {
    (MAIN_ROW, MAIN_SYSTEM): "RECAP (w/ DS)",
    (MAIN_ROW, "no_captions"): "RECAP without captions in its prompt",
    (MAIN_ROW, "first_retrieved"): "first retrieved caption",
    (_PREFIX, MAIN_SYSTEM): _PREFIX,
    (f"{_AUDIO} {MAIN_ROW}", MAIN_SYSTEM): f"{_AUDIO} ({MAIN_ROW})",
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
    settings = [_setting(results, trained, tested) for trained, tested in wanted]
    return [{"number": number, **setting} for number, setting in enumerate(settings, start=1) if setting]


def _setting(results: GridResults, trained: str, tested: str) -> dict[str, Any] | None:
    found = {(row.label, row.system): row for row in results.rows((trained,), tested)}
    rows = {name: found[key] for key, name in _ROWS.items() if key in found}
    if (MAIN_ROW, MAIN_SYSTEM) not in found:
        return None
    metric = results.metric(found[MAIN_ROW, MAIN_SYSTEM].runs[0])
    scores = {name: results.clip_scores(row, metric) for name, row in rows.items()}
    clip_ids = next(iter(scores.values()))[0]
    if trained == tested:
        events = results.events(tested, clip_ids)
        chosen = None if events is None else events > 1
    else:
        chosen = _novel(results, trained, tested, clip_ids)
    if chosen is None or not chosen.any():
        return None
    values = {name: clips for name, (_, clips) in scores.items()}
    trained_title, tested_title = results.titles((trained,), tested)
    what = "several events" if trained == tested else f"a word that no training caption of {trained_title} has"
    return {
        "title": f"Trained on {trained_title}, tested on {tested_title}: {what}",
        "test_set": tested,
        "clips": int(chosen.sum()),
        "of": len(chosen),
        "metric": METRIC_LABELS[metric],
        "rows": _scored({name: clips[chosen] for name, clips in values.items()}, results.config.resamples),
        "examples": _examples(results, rows, values, np.flatnonzero(chosen)),
    }


def _novel(results: GridResults, trained: str, tested: str, clip_ids: Sequence[str]) -> np.ndarray:
    captions = [record["caption"] for record in results.grid.training_captions(trained)]
    known = {word for caption in captions for word in normalize_text(caption).split()}
    references = results.references(tested)
    words = [{word for text in references[name] for word in normalize_text(text).split()} for name in clip_ids]
    return np.array([bool(own - known) for own in words])


def _scored(values: dict[str, np.ndarray], resamples: int) -> list[dict[str, Any]]:
    (main, best), *others = values.items()
    rows: list[dict[str, Any]] = [{"name": main, "mean": float(best.mean())}]
    for name, clips in others:
        gain = mean_difference(clips, best, resamples)
        interval = {"gain": gain.difference, "low": gain.low, "high": gain.high, "verdict": gain.verdict}
        rows.append({"name": name, "mean": float(clips.mean()), **interval})
    return rows


def _examples(
    results: GridResults, rows: dict[str, Row], values: dict[str, np.ndarray], chosen: np.ndarray
) -> list[dict[str, Any]]:
    """The clips with the largest, the middle and the smallest gain of the first seed's captioner."""
    main, *others = rows
    rival = _PREFIX if _PREFIX in rows else others[0]
    gain = values[main] - values[rival]
    ordered = chosen[np.argsort(-gain[chosen], kind="stable")]
    predictions = {
        name: EvaluationFolder.read_predictions(results.grid.path / row.runs[0].folder, row.system)
        for name, row in rows.items()
    }
    picked: dict[int, str] = {}
    for which, number in (("largest", ordered[0]), ("middle", ordered[len(ordered) // 2]), ("smallest", ordered[-1])):
        picked.setdefault(int(number), which)
    return [
        {
            "clip_id": predictions[main][number]["clip_id"],
            "why": f"{which} gain over {rival}: {gain[number]:+.3f}",
            "references": predictions[main][number]["references"],
            "captions": {name: lines[number]["prediction"] for name, lines in predictions.items()},
            "retrieved": [hit["caption"] for hit in predictions[main][number]["retrieved"]],
        }
        for number, which in picked.items()
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
    if "gain" not in row:
        return ""
    return f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['verdict']}"
