"""Plots of an evaluation as SVG text, to be embedded in a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_BLUE, _GREY, _ORANGE = "#2868b0", "#8a8f98", "#d9772b"


def _svg(draw: Callable[[Any], None], height: float, title: str, x_label: str, y_label: str = "") -> str:
    """What `draw` puts on axes, as an `<svg>` element with a title for screen readers; the same bytes every time."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plots of a report need matplotlib: pip install "recap-hf[report]"') from error
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_legend_handles_labels()[0]:
        # Above the plot, where it hides no point.
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "recap", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def interval_plot(rows: Mapping[str, tuple[float, float, float]], label: str) -> str:
    """Scores of several systems with their intervals: name -> (score, low, high), the first highlighted."""

    def draw(axes: Any) -> None:
        names = list(rows)[::-1]
        for place, name in enumerate(names):
            score, low, high = rows[name]
            colour = _BLUE if place == len(names) - 1 else _GREY
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([score], [place], "o", color=colour)
            above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{score:.3f}", (score, place), fontsize=8, **above)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.2)

    return _svg(draw, 0.6 + 0.42 * len(rows), f"{label} of {', '.join(rows)} with intervals", label)


def histogram(values: Sequence[float], label: str) -> str:
    """Number of clips by score."""

    def draw(axes: Any) -> None:
        axes.hist(values, bins=min(30, max(5, len(values) // 4)), color=_BLUE)
        axes.axvline(float(np.mean(values)), color=_ORANGE, linewidth=2)

    return _svg(draw, 2.6, f"Histogram of {label} over clips", f"{label} of a clip (line: mean)", "clips")


def scatter(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    """One point a clip."""

    def draw(axes: Any) -> None:
        axes.scatter(x, y, s=14, color=_BLUE, alpha=0.5, linewidths=0)

    return _svg(draw, 3.2, f"{y_label} against {x_label}", x_label, y_label)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, log: bool = False) -> str:
    """Named series of points, joined; `log`: a logarithmic axis."""

    def draw(axes: Any) -> None:
        for name, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        if log:
            axes.set_xscale("log")
        else:
            axes.set_xticks(sorted({x for points in series.values() for x, _ in points}))

    return _svg(draw, 3.4, f"{y_label} against {x_label}", x_label, y_label)


def categories(series: Mapping[str, Sequence[tuple[str, float]]], x_label: str, y_label: str) -> str:
    """Named series of points over names, in the given order."""

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(name for points in series.values() for name, _ in points))
        for number, (label, points) in enumerate(series.items()):
            # Side by side, so that equal scores do not hide each other.
            shift = 0.12 * (number - (len(series) - 1) / 2)
            places, values = [names.index(name) + shift for name, _ in points], [value for _, value in points]
            axes.plot(places, values, "o", label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", alpha=0.3)

    return _svg(draw, 3.4, f"{y_label} by {x_label}", x_label, y_label)
