"""The four settings of the paper's Table 3 as a page: compositional clips, and events that training never named.

The paper shows one caption a setting. Here each setting is scored over all its clips, beside its examples, which are
not chosen by hand: the clips with the largest, the middle and the smallest gain over the neighbour with a prefix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_hf.modeling.folding_recap import normalize_text

from .claims import ClipScores, difference_claim
from .grid_config import AUDIO_TO_AUDIO, NEIGHBOUR_LABELS, PREFIX, Run
from .text_tables import COLUMNS, markdown_table

if TYPE_CHECKING:
    from .grid_results import GridResults

_MAIN = "w/ DS"
_PREFIX = NEIGHBOUR_LABELS[PREFIX]
# Rows of a setting: label of the runs, system, name.
_ROWS = (
    (_MAIN, "recap", "RECAP (w/ DS)"),
    (_MAIN, "no_retrieval", "RECAP without captions in its prompt"),
    (_MAIN, "first_retrieved", "first retrieved caption"),
    (_PREFIX, "recap", _PREFIX),
    (f"{NEIGHBOUR_LABELS[AUDIO_TO_AUDIO]} {_MAIN}", "recap", f"{NEIGHBOUR_LABELS[AUDIO_TO_AUDIO]} (w/ DS)"),
)


def four_settings(results: GridResults) -> list[dict[str, Any]]:
    """Every setting that the grid's runs allow, numbered as in the paper where there are two domains.

    Compositional: trained and tested on one domain, clips of several events. Novel: trained on one domain, tested on
    another, clips whose references have a word that no training caption has.

    Returns:
        For each setting that has clips `number`, `title`, `test_set`, `clips` (their number), `metric`, `rows` (name,
        mean, and for all but the first the difference from RECAP with its interval) and `examples`.
    """
    config = results.config
    names = list(config.domains)
    singles = [names_of[0] for names_of in config.training_sets if len(names_of) == 1]
    wanted = [("compositional", name, name) for name in names if name in singles]
    novel = [("novel", trained, tested) for tested in names for trained in singles if trained != tested]
    if len(wanted) == 2 and len(novel) == 2:
        # 1 compositional on the first domain, 2 and 3 novel, 4 compositional on the second.
        wanted = [wanted[0], *novel, wanted[1]]
    else:
        wanted += novel
    settings = [_setting(results, kind, (trained,), tested) for kind, trained, tested in wanted]
    return [{"number": number, **setting} for number, setting in enumerate(settings, start=1) if setting]


def _setting(results: GridResults, kind: str, training_set: tuple[str, ...], test_set: str) -> dict[str, Any] | None:
    by_label = results.rows_by_label(training_set, test_set)
    if _MAIN not in by_label:
        return None
    metric = results.metric(by_label[_MAIN][0])
    rows = [
        (name, by_label[label], system, results.clip_scores(by_label[label], system, metric))
        for label, system, name in _ROWS
        if label in by_label
    ]
    clip_ids = rows[0][3].clip_ids
    chosen = _compositional(results, test_set, clip_ids) if kind == "compositional" else None
    if kind == "novel":
        chosen = _novel(results, training_set, test_set, clip_ids)
    if chosen is None or not chosen.any():
        return None
    trained, tested = config_titles(results, training_set, test_set)
    what = "several events" if kind == "compositional" else f"a word that no training caption of {trained} has"
    return {
        "title": f"Trained on {trained}, tested on {tested}: {what}",
        "test_set": test_set,
        "clips": int(chosen.sum()),
        "of": len(chosen),
        "metric": COLUMNS[metric],
        "rows": [_scored(results, row, rows[0], chosen, metric) for row in rows],
        "examples": _examples(results, rows, chosen),
    }


def config_titles(results: GridResults, training_set: tuple[str, ...], test_set: str) -> tuple[str, str]:
    """Names for people of a training set and a test set."""
    return results.config.training_title(training_set), results.config.domains[test_set].title


def _compositional(results: GridResults, test_set: str, clip_ids: tuple[str, ...]) -> np.ndarray | None:
    events = results.events(test_set, clip_ids)
    return None if events is None else events > 1


def _novel(
    results: GridResults, training_set: tuple[str, ...], test_set: str, clip_ids: tuple[str, ...]
) -> np.ndarray:
    known = {
        word
        for name in training_set
        for record in results.grid.training_captions(name)
        for word in normalize_text(record["caption"]).split()
    }
    clips = results.grid.clips(test_set)
    references = dict(zip(clips.clip_ids, clips.references, strict=True))
    return np.array(
        [any(set(normalize_text(text).split()) - known for text in references[clip_id]) for clip_id in clip_ids]
    )


def _subset(scores: ClipScores, chosen: np.ndarray) -> ClipScores:
    ids = tuple(clip_id for clip_id, kept in zip(scores.clip_ids, chosen, strict=True) if kept)
    return ClipScores(ids, scores.values[chosen])


def _scored(results: GridResults, row: tuple, main: tuple, chosen: np.ndarray, metric: str) -> dict[str, Any]:
    name, _, _, scores = row
    entry: dict[str, Any] = {"name": name, "mean": float(scores.values[chosen].mean())}
    if row is not main:
        claim = difference_claim(
            "", name, metric, _subset(scores, chosen), _subset(main[3], chosen), results.config.resamples
        )
        entry |= {"gain": claim.difference, "low": claim.low, "high": claim.high, "verdict": claim.verdict}
    return entry


def _examples(results: GridResults, rows: Sequence[tuple], chosen: np.ndarray) -> list[dict[str, Any]]:
    """The clips with the largest, the middle and the smallest gain of the first seed's captioner."""
    rival = next((row for row in rows if row[0] == _PREFIX), rows[1])
    gain = rows[0][3].values - rival[3].values
    numbers = np.flatnonzero(chosen)
    ordered = numbers[np.argsort(-gain[numbers], kind="stable")]
    picked = {"largest": ordered[0], "middle": ordered[len(ordered) // 2], "smallest": ordered[-1]}
    predictions = {name: _predictions(results, runs[0], system) for name, runs, system, _ in rows}
    examples: list[dict[str, Any]] = []
    for why, number in picked.items():
        own = predictions[rows[0][0]][number]
        if any(example["clip_id"] == own["clip_id"] for example in examples):
            continue
        examples.append(
            {
                "clip_id": own["clip_id"],
                "why": f"{why} gain over {rival[0]}: {gain[number]:+.3f}",
                "references": own["references"],
                "captions": {name: lines[number]["prediction"] for name, lines in predictions.items()},
                "retrieved": [hit["caption"] for hit in own["retrieved"]],
            }
        )
    return examples


def _predictions(results: GridResults, run: Run, system: str) -> list[dict[str, Any]]:
    text = (results.grid.path / run.folder / f"{system}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def settings_markdown(settings: Sequence[dict[str, Any]]) -> str:
    """The page as Markdown."""
    parts = ["### The settings of the paper's Table 3\n"]
    for setting in settings:
        parts.append(f"#### {setting['number']}. {setting['title']} ({setting['clips']} of {setting['of']} clips)\n")
        rows = [[row["name"], f"{row['mean']:.3f}", gain_text(row)] for row in setting["rows"]]
        parts.append(markdown_table(["Method", setting["metric"], "RECAP minus it, 95 % interval"], rows))
        for example in setting["examples"]:
            parts.append(f"Clip `{example['clip_id']}` ({example['why']})\n")
            lines = [["Ground truth", example["references"][0]], *map(list, example["captions"].items())]
            parts.append(markdown_table(["", ""], lines))
            parts.append("Retrieved: " + "; ".join(example["retrieved"]) + "\n")
    return "\n".join(parts)


def gain_text(row: dict[str, Any]) -> str:
    """The gain of RECAP over a row, with interval and verdict; empty for its own."""
    if "gain" not in row:
        return ""
    return f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['verdict']}"
