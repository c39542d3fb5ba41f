"""One self-contained HTML page about an evaluation or a grid: tables, plots, clips to read and listen to."""

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, PackageLoader

from recap_hf.data.files import AudioIndex
from recap_hf.files import write_text
from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.scoring import METRIC_LABELS

from .grid_config import LARGE_ROW, MAIN_ROW
from .grid_results import ANALYSES, RESULT_FILE
from .runner import RUN_FILE, SCORES_FILE, read_json, read_predictions, scores_file
from .systems import MAIN_SYSTEM
from .tables import scored_keys

# The metric that ranks the clips: SPIDEr as in the paper, or the first of these that was computed.
_MAIN_METRICS = ("spider", "cider_d", "rouge_l", "bleu_4", "meteor", "fense")
_BLUE, _GREY, _ORANGE = "#2868b0", "#8a8f98", "#d9772b"
_PLAYER_RATE = 32_000  # Hz: good enough to listen to, and a small page

# From test set and clip to its recording as a data URI, or None.
Player = Callable[[str, str], str | None]


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
    folder, player = Path(folder), _player(audio_dir)
    grid, sections = None, []
    if (folder / RESULT_FILE).is_file():
        grid = _grid_content(folder, player)
        main_runs = [run for run in grid["runs"] if run["label"] == MAIN_ROW]
        for test_set in dict.fromkeys(run["test_set"] for run in main_runs):
            run = next(run for run in main_runs if run["test_set"] == test_set)
            name = f"{test_set}: trained on {' + '.join(run['training_set'])}, seed {run['seed']}, k = {run['k']}"
            sections.append(_section(folder / run["folder"], test_set, player, num_clips, name))
    else:
        sections.append(_section(folder, "", player, num_clips))
    loader = PackageLoader("recap_hf.evaluation", "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(title=title, grid=grid, sections=sections)
    return write_text(output, page)


def _player(folder: str | Path | None) -> Player:
    """Finds recordings by test set and name below `folder`, and gives them as MP3, which every browser plays."""
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder} (--audio-dir)")
    found: dict[Path, AudioIndex] = {}

    def player(test_set: str, clip_id: str) -> str | None:
        if folder is None:
            return None
        place = Path(folder, test_set) if Path(folder, test_set).is_dir() else Path(folder)
        found[place] = found.get(place) or AudioIndex(place)
        source = found[place].find(clip_id)
        if source is None:
            return None
        waveform, rate = load_audio(source)
        waveform, buffer = resample(to_mono(waveform), rate, _PLAYER_RATE), io.BytesIO()
        soundfile.write(buffer, waveform.clip(-1, 1), _PLAYER_RATE, format="MP3", subtype="MPEG_LAYER_III")
        return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    return player


def _main_metric(corpus: dict[str, float | None]) -> str:
    return next(key for key in (*_MAIN_METRICS, *corpus) if corpus.get(key) is not None)


def _section(folder: Path, test_set: str, player: Player, num_clips: int, title: str | None = None) -> dict[str, Any]:
    """Content of the page about one evaluation, the name of its clip list as the default title."""
    if not (folder / SCORES_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {SCORES_FILE}: run `recap evaluate` there first")
    scores = read_json(folder / SCORES_FILE)
    systems = scores["systems"]
    lead = next(iter(systems))
    metric = _main_metric(systems[lead]["corpus"])
    per_clip = {name: read_json(scores_file(folder, name))["clips"] for name in systems}
    rows = read_predictions(folder, lead)
    values = [clip[metric] for clip in per_clip[lead]]
    order = np.argsort(values, kind="stable")

    def card(number: int) -> dict[str, Any]:
        captions = {name: clips[number]["prediction"] for name, clips in per_clip.items()}
        recording = player(test_set, rows[number]["clip_id"])
        return {**rows[number], "score": values[number], "captions": captions, "player": recording}

    return {
        **scores,
        "title": title or scores["clip_list"]["name"],
        "metric": METRIC_LABELS[metric],
        "columns": {key: METRIC_LABELS[key] for key in scored_keys(scores)},
        "settings": read_json(folder / RUN_FILE),
        "statistics": systems[lead]["statistics"],
        "plots": _section_plots(systems, metric, values, rows),
        "sources": _sources(rows, values),
        "best": [card(number) for number in order[::-1][:num_clips]],
        "worst": [card(number) for number in order[: min(num_clips, max(0, len(order) - num_clips))]],
    }


def _section_plots(systems: dict[str, Any], metric: str, values: list[float], rows: list[dict]) -> list[str]:
    label = METRIC_LABELS[metric]
    intervals = {name: (entry["corpus"][metric], *entry["intervals"][metric]) for name, entry in systems.items()}
    drawn = [_interval_plot(intervals, label), _histogram(values, label)]
    pairs = zip(rows, values, strict=True)
    similar = [(row["retrieved"][0]["score"], value) for row, value in pairs if row["retrieved"]]
    if len(similar) > 1:
        x_label = "cosine similarity of the first retrieved caption"
        drawn.append(_scatter(*zip(*similar, strict=True), x_label, f"{label} of the caption"))
    return drawn


def _sources(rows: list[dict], values: list[float]) -> list[dict[str, Any]]:
    """By source of the first retrieved caption: number of clips, and their mean score."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        first = row["retrieved"][0] if row["retrieved"] else {}
        groups[str(first.get("source", "not stated" if first else "nothing retrieved"))].append(value)
    means = [{"source": name, "clips": len(each), "mean": float(np.mean(each))} for name, each in groups.items()]
    return sorted(means, key=lambda row: -row["clips"])


def _grid_content(folder: Path, player: Player) -> dict[str, Any]:
    grid = read_json(folder / RESULT_FILE)
    for setting in grid["settings"]:
        for example in setting["examples"]:
            example["player"] = player(setting["test_set"], example["clip_id"])
    analyses = [grid[name] for name in ANALYSES if grid[name]["rows"]]
    return {**grid, "analyses": analyses, "plots": _grid_plots(folder, grid["runs"])}


def _grid_plots(folder: Path, runs: list[dict[str, Any]]) -> list[str]:
    """Scores of RECAP against k, datastore size and search index, as far as the grid varies them."""
    runs = [run for run in runs if not run["method"]]
    if not runs:
        return []
    corpora = [read_json(folder / run["folder"] / SCORES_FILE)["systems"][MAIN_SYSTEM]["corpus"] for run in runs]
    metric = _main_metric(corpora[0])
    for run, corpus in zip(runs, corpora, strict=True):
        run["score"] = corpus[metric]
        run["captions"] = read_json(folder / run["folder"] / RUN_FILE)["captioner"]["datastore"]["captions"]
    at_k = [run for run in runs if run["k"] == runs[0]["k"]]
    exact, whole = [run for run in at_k if not run["index"]], [run for run in at_k if run["share"] == 1]
    # Datastores that are parts of each other: random shares of one, or DS inside DSlarge.
    shared = [run["datastore"] for run in exact if run["share"] < 1]
    growing = [run for run in exact if run["datastore"] in shared]
    growing = growing or [run for run in exact if run["label"] in (MAIN_ROW, LARGE_ROW)]
    indexed = [run["datastore"] for run in whole if run["index"]]
    by_k = [(run, run["k"]) for run in runs if run["label"] == MAIN_ROW]
    by_size = [(run, run["captions"]) for run in growing]
    by_index = [(run, run["index"] or "exact") for run in whole if run["datastore"] in indexed]
    drawn = []
    labels = ("captions in the prompt (k)", "captions in the datastore", "search index of the datastore")
    for points, x_label in zip((by_k, by_size, by_index), labels, strict=True):
        series = _series(points)
        if any(len(each) > 1 for each in series.values()):
            drawn.append(_lines(series, x_label, METRIC_LABELS[metric], log=points is by_size))
    return drawn


def _series(points: Sequence[tuple[dict[str, Any], Any]]) -> dict[str, list[tuple[Any, float]]]:
    """Scores at each x, the mean over the seeds, by training and test set."""
    values: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, x in points:
        values[f"{' + '.join(run['training_set'])}, tested on {run['test_set']}"][x].append(run["score"])
    return {name: [(x, float(np.mean(scores))) for x, scores in by_x.items()] for name, by_x in values.items()}


def _axes(height: float) -> Any:
    """Axes of a plot that is attached to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plots of a report need matplotlib: pip install "recap-hf[report]"') from error
    axes = Figure(figsize=(7, height), layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _svg(axes: Any, title: str, x_label: str, y_label: str = "") -> str:
    """A plot as an `<svg>` element with a title for screen readers; the same bytes every time."""
    import matplotlib

    figure = axes.figure
    axes.set(xlabel=x_label, ylabel=y_label)
    if axes.get_legend_handles_labels()[0]:
        # Above the plot, where it hides no point.
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "recap", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def _interval_plot(rows: Mapping[str, tuple[float, float, float]], label: str) -> str:
    """Scores of several systems with their intervals: name -> (score, low, high), the first highlighted."""
    axes, names = _axes(0.6 + 0.42 * len(rows)), list(rows)[::-1]
    for place, name in enumerate(names):
        score, low, high = rows[name]
        colour = _BLUE if place == len(names) - 1 else _GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([score], [place], "o", color=colour)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{score:.3f}", (score, place), fontsize=8, **above)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.2)
    return _svg(axes, f"{label} of {', '.join(rows)} with intervals", label)


def _histogram(values: Sequence[float], label: str) -> str:
    """Number of clips by score."""
    axes = _axes(2.6)
    axes.hist(values, bins=min(30, max(5, len(values) // 4)), color=_BLUE)
    axes.axvline(float(np.mean(values)), color=_ORANGE, linewidth=2)
    return _svg(axes, f"Histogram of {label} over clips", f"{label} of a clip (line: mean)", "clips")


def _scatter(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    """One point a clip."""
    axes = _axes(3.2)
    axes.scatter(x, y, s=14, color=_BLUE, alpha=0.5, linewidths=0)
    return _svg(axes, f"{y_label} against {x_label}", x_label, y_label)


def _lines(series: Mapping[str, Sequence[tuple[Any, float]]], x_label: str, y_label: str, log: bool = False) -> str:
    """Named series of points: joined over numbers (`log`: on a logarithmic axis), or alone over names."""
    xs = list(dict.fromkeys(x for points in series.values() for x, _ in points))
    axes, named = _axes(3.4), isinstance(xs[0], str)
    for number, (label, points) in enumerate(series.items()):
        # Over names side by side, so that equal scores do not hide each other.
        shift = 0.12 * (number - (len(series) - 1) / 2)
        points = [(xs.index(x) + shift, y) for x, y in points] if named else sorted(points)
        axes.plot(*zip(*points, strict=True), "o" if named else "o-", label=label)
    if named:
        axes.set_xticks(range(len(xs)), xs)
    elif log:
        axes.set_xscale("log")
    else:
        axes.set_xticks(sorted(xs))
    return _svg(axes, f"{y_label} {'by' if named else 'against'} {x_label}", x_label, y_label)
