"""Figures for a card out of the files that `recap score` and `recap evaluate` write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recap_hf.scoring.metrics import METRIC_LABELS

from .facts import Result

MAIN_SYSTEM = "recap"
# Of BLEU a card shows the first and the last order.
METRICS = {key: label for key, label in METRIC_LABELS.items() if key not in ("bleu_2", "bleu_3")}


def read_scores(path: str | Path, dataset: str | None = None, split: str = "test") -> tuple[list[Result], list[str]]:
    """Figures and the notes to them from a file of scores.

    Args:
        path: `scores.json` of a `recap evaluate` folder, or the output of `recap score`.
        dataset: what was measured on; by default the name of the clip list, or of the file's folder.
        split: split of the dataset.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a file of scores.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        clip_list = content["clip_list"]
        systems = content.get("systems") or {MAIN_SYSTEM: content}
        corpora = {name: (system["corpus"], system.get("intervals") or {}) for name, system in systems.items()}
        code = content["implementation"]
        list_name = clip_list.get("name") or f"sha256 {clip_list['sha256'][:12]}"
        clips = int(clip_list["num_clips"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        expected = "expected what `recap evaluate` or `recap score` writes"
        raise ValueError(f"{path} is no file of scores ({error!r}): {expected}") from error
    dataset = dataset or clip_list.get("name") or path.resolve().parent.name
    results = []
    for system, (corpus, intervals) in corpora.items():
        for key, name in METRICS.items():
            if corpus.get(key) is None:
                continue
            low, high = intervals.get(key) or (None, None)
            where = {"split": split, "clips": clips, "clip_list": list_name}
            where["system"] = None if system == MAIN_SYSTEM else system.replace("_", " ")
            figure = (name, corpus[key], dataset, implementation_of(key, code))
            results.append(Result(*figure, low=low, high=high, **where))
    return results, list(content.get("notes") or [])


def implementation_of(metric: str, code: Mapping[str, Any]) -> str:
    """What computed a metric, out of a file's `implementation`: its keys list metrics, `bleu` for all four."""
    for names, text in code.items():
        if metric in names.split(", ") or metric.rstrip("_1234") in names.split(", "):
            tokenizer = f", {code['tokenizer']}" if code.get("tokenizer") else ""
            return f"{text}{tokenizer}"
    return f"recap_hf {code.get('recap_hf', '')}".strip()
