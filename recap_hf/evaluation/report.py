"""One self-contained HTML page about an evaluation or a grid: tables, plots, clips to read and listen to."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .captioner import SYSTEMS
from .folder import RUN_FILE, SCORES_FILE, EvaluationFolder
from .grid_report import grid_section
from .text_tables import COLUMNS

# The metric that ranks the clips: SPIDEr as in the paper, what comes nearest where SPICE was skipped.
_MAIN_METRICS = ("spider", "cider_d", "rouge_l", "bleu_4", "meteor", "fense")
_PLAYER_RATE = 32_000  # Hz: enough for what one wants to hear, and a small page

Audio = Callable[[str], Any]


@dataclass
class ClipCard:
    """One clip as the page shows it."""

    clip_id: str
    score: float
    captions: dict[str, str]
    references: list[str]
    retrieved: list[dict[str, Any]]
    player: str | None


def evaluation_section(folder: Path, audio: Audio | None = None, num_clips: int = 8, title: str | None = None) -> dict:
    """What the page says about one evaluation.

    Args:
        folder: what `recap evaluate` wrote.
        audio: from a clip's name to its recording (anything that `load_audio` takes), or None.
        num_clips: best clips and worst clips to show.
        title: default: name of the clip list.

    Raises:
        FileNotFoundError: if the folder has no scores.
    """
    if not (folder / SCORES_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {SCORES_FILE}: run `recap evaluate` there first")
    scores = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
    settings = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    systems = list(scores["systems"])
    lead = systems[0]
    metric = _main_metric(scores["systems"][lead]["corpus"])
    per_clip = {name: _read_json(EvaluationFolder.scores_path(folder, name))["clips"] for name in systems}
    rows = [json.loads(line) for line in (folder / f"{lead}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    values = [clip[metric] for clip in per_clip[lead]]
    order = np.argsort(values, kind="stable")
    best, worst = order[::-1][:num_clips], order[: min(num_clips, max(0, len(order) - num_clips))]
    return {
        "title": title or scores["clip_list"]["name"],
        "metric": COLUMNS[metric],
        "table": _score_table(scores),
        "differences": _difference_table(scores),
        "systems": {name: SYSTEMS[name] for name in systems},
        "clip_list": scores["clip_list"],
        "implementation": scores["implementation"],
        "skipped": scores["skipped"],
        "notes": scores["notes"],
        "settings": settings,
        "statistics": scores["systems"][lead]["statistics"],
        "plots": _plots(scores, metric, values, rows),
        "sources": _sources(rows, values),
        "best": [_card(number, per_clip, rows, metric, lead, audio) for number in best],
        "worst": [_card(number, per_clip, rows, metric, lead, audio) for number in worst],
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _main_metric(corpus: dict[str, float | None]) -> str:
    return next(key for key in (*_MAIN_METRICS, *corpus) if corpus.get(key) is not None)


def _score_table(scores: dict[str, Any]) -> dict[str, Any]:
    systems = scores["systems"]
    keys = [key for key in COLUMNS if any(entry["corpus"].get(key) is not None for entry in systems.values())]
    rows = []
    for name, entry in systems.items():
        cells = []
        for key in keys:
            value, interval = entry["corpus"].get(key), entry["intervals"].get(key)
            cells.append({"value": value, "low": interval[0], "high": interval[1]} if interval else {"value": None})
        rows.append({"name": name, "cells": cells})
    return {"columns": [COLUMNS[key] for key in keys], "rows": rows}


def _difference_table(scores: dict[str, Any]) -> dict[str, Any] | None:
    differences = scores["recap_minus"]
    if not differences:
        return None
    keys = [key for key in COLUMNS if any(key in row for row in differences.values())]
    rows = [{"name": name, "cells": [row.get(key) for key in keys]} for name, row in differences.items()]
    return {"columns": [COLUMNS[key] for key in keys], "rows": rows}


def _plots(scores: dict[str, Any], metric: str, values: list[float], rows: list[dict]) -> list[str]:
    label = COLUMNS[metric]
    intervals = {
        name: (entry["corpus"][metric], *entry["intervals"][metric]) for name, entry in scores["systems"].items()
    }
    drawn = [plots.interval_plot(intervals, label), plots.histogram(values, label)]
    similar = [
        (row["retrieved"][0]["score"], value) for row, value in zip(rows, values, strict=True) if row["retrieved"]
    ]
    if len(similar) > 1:
        x_label = "cosine similarity of the first retrieved caption"
        drawn.append(plots.scatter(*zip(*similar, strict=True), x_label, f"{label} of the caption"))
    return drawn


def _sources(rows: list[dict], values: list[float]) -> list[dict[str, Any]]:
    """By source of the first retrieved caption: how many clips, and their mean score."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        first = row["retrieved"][0] if row["retrieved"] else {}
        groups[str(first.get("source", "not stated" if first else "nothing retrieved"))].append(value)
    return [
        {"source": source, "clips": len(scores), "mean": float(np.mean(scores))}
        for source, scores in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _card(number: int, per_clip: dict, rows: list[dict], metric: str, lead: str, audio: Audio | None) -> ClipCard:
    row = rows[number]
    return ClipCard(
        clip_id=row["clip_id"],
        score=per_clip[lead][number][metric],
        captions={name: clips[number]["prediction"] for name, clips in per_clip.items()},
        references=row["references"],
        retrieved=row["retrieved"],
        player=_player(audio(row["clip_id"])) if audio else None,
    )


def _player(source: Any) -> str | None:
    """The recording as a data URI that every browser plays (MP3), or None where it is not at hand."""
    if source is None:
        return None
    import soundfile

    from recap_hf.modeling.audio_recap import load_audio, resample, to_mono

    waveform, rate = load_audio(source)
    waveform = resample(to_mono(waveform), rate, _PLAYER_RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.clip(-1, 1), _PLAYER_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(
    folder: str | Path,
    output: str | Path,
    *,
    audio: Audio | None = None,
    num_clips: int = 8,
    title: str = "Evaluation of a RECAP captioner",
) -> Path:
    """Writes the page about an evaluation, or about a grid and the first main run of each of its test sets.

    Args:
        folder: what `recap evaluate` or `recap grid` wrote.
        output: the HTML file; nothing else is needed to read it.
        audio: from a clip's name to its recording, or None for a page without players.
        num_clips: best clips and worst clips to show of each evaluation.
        title: of the page.

    Raises:
        FileNotFoundError: if the folder holds neither.
    """
    from jinja2 import Environment, PackageLoader

    folder = Path(folder)

    def player(test_set: str, clip_id: str) -> str | None:
        return _player(_audio_of(audio, test_set)(clip_id)) if audio else None

    grid = grid_section(folder, _main_metric, player)
    if grid is None:
        sections = [evaluation_section(folder, audio, num_clips)]
    else:
        shown: dict[str, dict] = {}
        for run in _read_json(folder / "grid.json")["runs"]:
            if run["label"] == "w/ DS" and run["test_set"] not in shown:
                trained = " + ".join(run["training_set"])
                name = f"{run['test_set']}: trained on {trained}, seed {run['seed']}, k = {run['k']}"
                own = _audio_of(audio, run["test_set"])
                shown[run["test_set"]] = evaluation_section(folder / run["folder"], own, num_clips, name)
        sections = list(shown.values())
    environment = Environment(
        loader=PackageLoader("recap_hf.evaluation", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(title=title, grid=grid, sections=sections)
    output = Path(output)
    output.write_text(page, encoding="utf-8")
    return output


class AudioFolder:
    """Finds the recordings of clips by their names below a folder.

    Args:
        folder: of the recordings. Where it has a folder for each test set, clips are looked for in their own: two
            datasets may give two recordings one name.
    """

    def __init__(self, folder: str | Path) -> None:
        from recap_hf.data.files import AudioIndex

        self.folder = Path(folder)
        self._find = AudioIndex(self.folder).find
        self._within: dict[str, AudioFolder] = {}

    def __call__(self, clip_id: str) -> str | None:
        return self._find(clip_id)

    def within(self, test_set: str) -> AudioFolder:
        """The folder of a test set, or all of it."""
        if not (self.folder / test_set).is_dir():
            return self
        if test_set not in self._within:
            self._within[test_set] = AudioFolder(self.folder / test_set)
        return self._within[test_set]


def _audio_of(audio: Audio | None, test_set: str) -> Audio | None:
    return audio.within(test_set) if isinstance(audio, AudioFolder) else audio
