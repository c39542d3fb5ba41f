"""The part of the HTML page about a grid: tables, claims, settings, and scores against k, datastore size and index."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.scoring import METRIC_LABELS

from . import plots
from .folder import RUN_FILE, SCORES_FILE
from .grid_config import LARGE_ROW, MAIN_ROW
from .systems import MAIN_SYSTEM

_ANALYSES = ("events", "novel_words", "stores")


def grid_section(
    folder: Path, main_metric: Callable[[dict], str], player: Callable[[str, str], str | None]
) -> dict[str, Any] | None:
    """Content of the page about the grid in `folder`; None if there is no grid.

    Args:
        folder: what `recap grid` wrote.
        main_metric: from corpus scores to the metric that is drawn.
        player: from a test set and a clip's name to its recording as a data URI, or None.
    """
    path = folder / "grid.json"
    if not path.is_file():
        return None
    grid = json.loads(path.read_text(encoding="utf-8"))
    for setting in grid["settings"]:
        for example in setting["examples"]:
            example["player"] = player(setting["test_set"], example["clip_id"])
    analyses = [grid[name] for name in _ANALYSES if grid[name]["rows"]]
    content = {name: grid[name] for name in ("tables", "claims", "settings", "runs")}
    return {**content, "analyses": analyses, "plots": _plots(folder, grid["runs"], main_metric)}


def _plots(folder: Path, runs: list[dict[str, Any]], main_metric: Callable[[dict], str]) -> list[str]:
    runs = [run for run in runs if not run["method"]]
    if not runs:
        return []
    corpora = [_read_json(folder / run["folder"] / SCORES_FILE)["systems"][MAIN_SYSTEM]["corpus"] for run in runs]
    metric = main_metric(corpora[0])
    label, first_k = METRIC_LABELS[metric], runs[0]["k"]
    for run, corpus in zip(runs, corpora, strict=True):
        run["score"] = corpus[metric]
        run["captions"] = _read_json(folder / run["folder"] / RUN_FILE)["captioner"]["datastore"]["captions"]
    at_k = [run for run in runs if run["k"] == first_k]
    exact, whole = [run for run in at_k if not run["index"]], [run for run in at_k if run["share"] == 1]
    # Datastores that are parts of each other: random shares of one, or DS inside DSlarge.
    varied = [run["datastore"] for run in exact if run["share"] < 1]
    growing = [run for run in exact if run["datastore"] in varied] or [
        run for run in exact if run["label"] in (MAIN_ROW, LARGE_ROW)
    ]
    indexed = [run["datastore"] for run in whole if run["index"]]
    by_k = _series((run, run["k"]) for run in runs if run["label"] == MAIN_ROW)
    by_size = _series((run, run["captions"]) for run in growing)
    by_index = _series((run, run["index"] or "exact") for run in whole if run["datastore"] in indexed)
    drawn = []
    if any(len(series) > 1 for series in by_k.values()):
        drawn.append(plots.lines(by_k, "captions in the prompt (k)", label))
    if any(len(series) > 1 for series in by_size.values()):
        drawn.append(plots.lines(by_size, "captions in the datastore", label, log=True))
    if any(len(series) > 1 for series in by_index.values()):
        drawn.append(plots.categories(by_index, "search index of the datastore", label))
    return drawn


def _series(points: Iterable[tuple[dict[str, Any], Any]]) -> dict[str, list[tuple[Any, float]]]:
    """Scores at each x, the mean over the seeds, by training and test set."""
    values: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, x in points:
        values[f"{' + '.join(run['training_set'])}, tested on {run['test_set']}"][x].append(run["score"])
    return {name: [(x, float(np.mean(scores))) for x, scores in by_x.items()] for name, by_x in values.items()}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
