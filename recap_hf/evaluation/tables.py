"""Tables of scores as plain text and Markdown."""

import math
from collections.abc import Sequence
from typing import Any

from recap_hf.scoring import METRIC_LABELS

from .systems import MAIN_SYSTEM


def format_score(value: float | None) -> str:
    """A score with four decimals, or a dash for one that was skipped."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable as plain text."""
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def result_tables(scores: dict[str, Any]) -> str:
    """Scores of all systems, differences to the captioner with their intervals, and remarks.

    Args:
        scores: what `score_folder` returned.
    """
    systems, differences = scores["systems"], scores["recap_minus"]
    keys = scored_keys(scores)
    header = ["system", *(METRIC_LABELS[key] for key in keys)]
    rows = [[name, *(format_score(entry["corpus"].get(key)) for key in keys)] for name, entry in systems.items()]
    parts = [markdown_table(header, rows)]
    if differences:
        rows = [[name, *(_difference(row.get(key)) for key in keys)] for name, row in differences.items()]
        title = f"{MAIN_SYSTEM} minus the system of the row, {100 * scores['confidence']:g}% paired bootstrap interval"
        parts.append(f"{title} (* excludes 0)\n\n{markdown_table(header, rows)}")
    parts.append("\n".join(f"{name}: {entry['description']}" for name, entry in systems.items()) + "\n")
    clips = scores["clip_list"]
    remarks = [f"{clips['num_clips']} clips, list {clips['name']} ({clips['sha256'][:12]})"]
    remarks += [f"{key} skipped: {reason}" for key, reason in scores["skipped"].items()]
    remarks += [f"note: {note}" for note in scores["notes"]]
    return "\n".join([*parts, "\n".join(remarks) + "\n"])


def scored_keys(scores: dict[str, Any]) -> list[str]:
    """The metrics that a system of a `scores.json` has, in the order of columns."""
    corpora = [entry["corpus"] for entry in scores["systems"].values()]
    return [key for key in METRIC_LABELS if any(corpus.get(key) is not None for corpus in corpora)]


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]{'*' if row['excludes_zero'] else ''}"
