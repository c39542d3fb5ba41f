"""One self-contained HTML page about an evaluation or a grid: tables, plots, clips to read and listen to."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.files import write_text
from recap_hf.scoring import METRIC_LABELS

from . import plots
from .folder import RUN_FILE, SCORES_FILE, EvaluationFolder
from .grid_config import MAIN_ROW
from .grid_report import grid_section
from .tables import scored_keys

# The metric that ranks the clips: SPIDEr as in the paper, or the first of these that was computed.
_MAIN_METRICS = ("spider", "cider_d", "rouge_l", "bleu_4", "meteor", "fense")
_PLAYER_RATE = 32_000  # Hz: good enough to listen to, and a small page

# From a clip's name to its recording (whatever `load_audio` takes), or None.
Audio = Callable[[str], Any]


def evaluation_section(
    folder: Path, audio: Audio | None = None, num_clips: int = 8, title: str | None = None
) -> dict[str, Any]:
    """Content of the page about one evaluation.

    Args:
        folder: what `recap evaluate` wrote.
        audio: finds the recordings; None: no players.
        num_clips: number of best and of worst clips to show.
        title: default: name of the clip list.

    Raises:
        FileNotFoundError: if the folder has no scores.
    """
    if not (folder / SCORES_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {SCORES_FILE}: run `recap evaluate` there first")
    scores = _read_json(folder / SCORES_FILE)
    systems = scores["systems"]
    lead = next(iter(systems))
    metric = _main_metric(systems[lead]["corpus"])
    per_clip = {name: _read_json(EvaluationFolder.scores_path(folder, name))["clips"] for name in systems}
    rows = EvaluationFolder.read_predictions(folder, lead)
    values = [clip[metric] for clip in per_clip[lead]]
    order = np.argsort(values, kind="stable")
    best, worst = order[::-1][:num_clips], order[: min(num_clips, max(0, len(order) - num_clips))]

    def card(number: int) -> dict[str, Any]:
        row = {key: rows[number][key] for key in ("clip_id", "references", "retrieved")}
        captions = {name: clips[number]["prediction"] for name, clips in per_clip.items()}
        player = _player(audio(row["clip_id"])) if audio else None
        return {**row, "score": values[number], "captions": captions, "player": player}

    return {
        **scores,
        "title": title or scores["clip_list"]["name"],
        "metric": METRIC_LABELS[metric],
        "columns": {key: METRIC_LABELS[key] for key in scored_keys(scores)},
        "settings": _read_json(folder / RUN_FILE),
        "statistics": systems[lead]["statistics"],
        "plots": _plots(systems, metric, values, rows),
        "sources": _sources(rows, values),
        "best": [card(number) for number in best],
        "worst": [card(number) for number in worst],
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _main_metric(corpus: dict[str, float | None]) -> str:
    return next(key for key in (*_MAIN_METRICS, *corpus) if corpus.get(key) is not None)


def _plots(systems: dict[str, Any], metric: str, values: list[float], rows: list[dict]) -> list[str]:
    label = METRIC_LABELS[metric]
    intervals = {name: (entry["corpus"][metric], *entry["intervals"][metric]) for name, entry in systems.items()}
    drawn = [plots.interval_plot(intervals, label), plots.histogram(values, label)]
    similar = [
        (row["retrieved"][0]["score"], value) for row, value in zip(rows, values, strict=True) if row["retrieved"]
    ]
    if len(similar) > 1:
        x_label = "cosine similarity of the first retrieved caption"
        drawn.append(plots.scatter(*zip(*similar, strict=True), x_label, f"{label} of the caption"))
    return drawn


def _sources(rows: list[dict], values: list[float]) -> list[dict[str, Any]]:
    """By source of the first retrieved caption: number of clips, and their mean score."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        first = row["retrieved"][0] if row["retrieved"] else {}
        groups[str(first.get("source", "not stated" if first else "nothing retrieved"))].append(value)
    return [
        {"source": source, "clips": len(scores), "mean": float(np.mean(scores))}
        for source, scores in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _player(source: Any) -> str | None:
    """The recording as a data URI that every browser plays (MP3), or None if it was not found."""
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
    audio_dir: str | Path | None = None,
    num_clips: int = 8,
    title: str = "Evaluation of a RECAP captioner",
) -> Path:
    """Writes the page about an evaluation, or about a grid and the first main run of each of its test sets.

    Args:
        folder: what `recap evaluate` or `recap grid` wrote.
        output: the HTML file; it needs no other file.
        audio_dir: folder of the recordings, for players. If it has a folder for each test set of a grid, clips are
            found in their own: two datasets may have recordings of the same name.
        num_clips: number of best and of worst clips to show of each evaluation.
        title: of the page.

    Raises:
        FileNotFoundError: if the folder holds neither, or there is no `audio_dir`.
    """
    from jinja2 import Environment, PackageLoader

    folder, audio_of = Path(folder), _audio_finder(audio_dir)

    def player(test_set: str, clip_id: str) -> str | None:
        audio = audio_of(test_set)
        return _player(audio(clip_id)) if audio else None

    grid = grid_section(folder, _main_metric, player)
    sections = [evaluation_section(folder, audio_of(""), num_clips)] if grid is None else []
    shown: dict[str, dict[str, Any]] = {}
    for run in grid["runs"] if grid else ():
        if run["label"] == MAIN_ROW:
            shown.setdefault(run["test_set"], run)
    for test_set, run in shown.items():
        name = f"{test_set}: trained on {' + '.join(run['training_set'])}, seed {run['seed']}, k = {run['k']}"
        sections.append(evaluation_section(folder / run["folder"], audio_of(test_set), num_clips, name))
    environment = Environment(
        loader=PackageLoader("recap_hf.evaluation", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(title=title, grid=grid, sections=sections)
    return write_text(output, page)


def _audio_finder(folder: str | Path | None) -> Callable[[str], Audio | None]:
    """From a test set to what finds its recordings by their names."""
    from recap_hf.data.files import AudioIndex

    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder} (--audio-dir)")
    found: dict[Path, Audio] = {}

    def audio_of(test_set: str) -> Audio | None:
        if folder is None:
            return None
        own = Path(folder, test_set)
        own = own if own.is_dir() else Path(folder)
        if own not in found:
            found[own] = AudioIndex(own).find
        return found[own]

    return audio_of
