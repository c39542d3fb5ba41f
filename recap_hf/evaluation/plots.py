"""Plots of an evaluation as SVG text, to be embedded in a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_BLUE, _GREY, _ORANGE = "#2868b0", "#8a8f98", "#d9772b"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plots of a report need matplotlib: pip install "recap-hf[report]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The figure as an `<svg>` element with a label for screen readers; the same bytes every time."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "recap", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": label})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def interval_plot(rows: Mapping[str, tuple[float, float, float]], label: str) -> str:
    """Scores of several systems with their intervals: name -> (score, low, high), the first highlighted."""
    figure, axes = _figure(7, 0.6 + 0.42 * len(rows))
    names = list(rows)[::-1]
    for place, name in enumerate(names):
        score, low, high = rows[name]
        colour = _BLUE if name == next(iter(rows)) else _GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([score], [place], "o", color=colour)
        axes.annotate(
            f"{score:.3f}", (score, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.2)
    axes.set_xlabel(label)
    return _svg(figure, f"{label} of {', '.join(rows)} with intervals")


def histogram(values: Sequence[float], label: str) -> str:
    """How many clips have which score."""
    figure, axes = _figure(7, 2.6)
    axes.hist(values, bins=min(30, max(5, len(values) // 4)), color=_BLUE)
    axes.axvline(float(np.mean(values)), color=_ORANGE, linewidth=2)
    axes.set_xlabel(f"{label} of a clip (line: mean)")
    axes.set_ylabel("clips")
    return _svg(figure, f"Histogram of {label} over clips")


def scatter(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    """One point a clip."""
    figure, axes = _figure(7, 3.2)
    axes.scatter(x, y, s=14, color=_BLUE, alpha=0.5, linewidths=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return _svg(figure, f"{y_label} against {x_label}")


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, log: bool = False) -> str:
    """Named series of points, joined; `log`: a logarithmic axis."""
    figure, axes = _figure(7, 3.4)
    for name, points in series.items():
        ordered = sorted(points)
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], "o-", label=name)
    if log:
        axes.set_xscale("log")
    else:
        axes.set_xticks(sorted({x for points in series.values() for x, _ in points}))
    return _with_legend(figure, axes, x_label, y_label, "against")


def categories(series: Mapping[str, Sequence[tuple[str, float]]], x_label: str, y_label: str) -> str:
    """Named series of points over names, in the given order."""
    figure, axes = _figure(7, 3.4)
    names = list(dict.fromkeys(name for points in series.values() for name, _ in points))
    for number, (label, points) in enumerate(series.items()):
        # Side by side, so that equal scores do not hide each other.
        shift = 0.12 * (number - (len(series) - 1) / 2)
        axes.plot([names.index(name) + shift for name, _ in points], [value for _, value in points], "o", label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    return _with_legend(figure, axes, x_label, y_label, "by")


def _with_legend(figure: Any, axes: Any, x_label: str, y_label: str, joint: str) -> str:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    # Above the plot, where it hides no point.
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return _svg(figure, f"{y_label} {joint} {x_label}")
