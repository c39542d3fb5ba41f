"""What the page says about a grid: tables, claims, the four settings, scores against k, datastore size and index."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .folder import RUN_FILE, SCORES_FILE
from .text_tables import COLUMNS

ANALYSES = ("events", "novel_words", "stores")
Player = Callable[[str, str], "str | None"]


def grid_section(folder: Path, main_metric: Callable[[dict], str], player: Player) -> dict[str, Any] | None:
    """What the page says about the grid in `folder`; None where there is no grid.

    Args:
        folder: what `recap grid` wrote.
        main_metric: from the scores of a corpus to the metric that is drawn.
        player: from a test set and a clip's name to its recording as a data URI, or None.
    """
    path = folder / "grid.json"
    if not path.is_file():
        return None
    grid = json.loads(path.read_text(encoding="utf-8"))
    settings = grid.get("settings", [])
    for setting in settings:
        for example in setting["examples"]:
            example["player"] = player(setting["test_set"], example["clip_id"])
    return {
        "tables": grid["tables"],
        "claims": grid["claims"],
        "analyses": [grid[name] for name in ANALYSES if grid.get(name, {}).get("rows")],
        "settings": settings,
        "plots": _plots(folder, grid["runs"], main_metric),
    }


def _plots(folder: Path, runs: list[dict[str, Any]], main_metric: Callable[[dict], str]) -> list[str]:
    metric, points = "", []
    for run in runs:
        if run.get("neighbour"):
            continue
        corpus = _read_json(folder / run["folder"] / SCORES_FILE)["systems"]["recap"]["corpus"]
        metric = metric or main_metric(corpus)
        store = _read_json(folder / run["folder"] / RUN_FILE)["captioner"]["datastore"]
        points.append((run, store, corpus[metric]))
    if not points:
        return []
    label, drawn = COLUMNS[metric], []
    by_k, by_size, by_index = _by_k(points), _by_size(points), _by_index(points)
    if any(len(series) > 1 for series in by_k.values()):
        drawn.append(plots.lines(by_k, "captions in the prompt (k)", label))
    if any(len(series) > 1 for series in by_size.values()):
        drawn.append(plots.lines(by_size, "captions in the datastore", label, log=True))
    if any(len(series) > 1 for series in by_index.values()):
        drawn.append(plots.categories(by_index, "search index of the datastore", label))
    return drawn


def _by_k(points: list[tuple]) -> dict[str, list[tuple[float, float]]]:
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run, _, score in points:
        if run["label"] == "w/ DS":
            values[_place(run), run["k"]].append(score)
    return _series(values)


def _by_size(points: list[tuple]) -> dict[str, list[tuple[float, float]]]:
    """Stores that grow into one another: random shares of the varied store, or DS inside DSlarge."""
    first_k = points[0][0]["k"]
    chosen = [point for point in points if point[0]["k"] == first_k and not point[0].get("index")]
    shared = any(run.get("share", 1) < 1 for run, _, _ in chosen)
    stores = {tuple(run["datastore"]) for run, _, _ in chosen if run.get("share", 1) < 1}
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run, store, score in chosen:
        grows = tuple(run["datastore"]) in stores if shared else run["label"] in ("w/ DS", "w/ DSlarge")
        if grows:
            values[_place(run), store["captions"]].append(score)
    return _series(values)


def _by_index(points: list[tuple]) -> dict[str, list[tuple[str, float]]]:
    """Kinds of index on one datastore, the exact search first."""
    stores = {tuple(run["datastore"]) for run, _, _ in points if run.get("index")}
    first_k = points[0][0]["k"]
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run, _, score in points:
        if tuple(run["datastore"]) in stores and run["k"] == first_k and run.get("share", 1) == 1:
            values[_place(run), run.get("index") or "exact"].append(score)
    return _series(values)


def _series(values: dict[tuple[str, Any], list[float]]) -> dict[str, list[tuple[Any, float]]]:
    """Means over the seeds, by place."""
    series: dict[str, list[tuple[Any, float]]] = defaultdict(list)
    for (place, x), scores in values.items():
        series[place].append((x, float(np.mean(scores))))
    return dict(series)


def _place(run: dict[str, Any]) -> str:
    return f"{' + '.join(run['training_set'])}, tested on {run['test_set']}"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
