"""Tables of scores as plain text and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recap_hf.scoring import METRIC_LABELS, Difference

from .runner import EvaluationResult
from .systems import MAIN_SYSTEM, SYSTEMS


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


def result_tables(result: EvaluationResult) -> str:
    """Scores of all systems, differences to the captioner with their intervals, and remarks."""
    corpora = {name: scores.corpus for name, scores in result.scores.items()}
    keys = [key for key in METRIC_LABELS if any(corpus.get(key) is not None for corpus in corpora.values())]
    header = ["system", *(METRIC_LABELS[key] for key in keys)]
    rows = [[name, *(format_score(corpus.get(key)) for key in keys)] for name, corpus in corpora.items()]
    parts = [markdown_table(header, rows)]
    if result.differences:
        rows = [[name, *(_difference(row.get(key)) for key in keys)] for name, row in result.differences.items()]
        title = f"{MAIN_SYSTEM} minus the system of the row, {100 * result.confidence:g}% paired bootstrap interval"
        parts.append(f"{title} (* excludes 0)\n\n{markdown_table(header, rows)}")
    parts.append("\n".join(f"{name}: {SYSTEMS[name]}" for name in corpora if name in SYSTEMS) + "\n")
    first = next(iter(result.scores.values()))
    remarks = [f"{first.clip_list['num_clips']} clips, list {result.clips_name} ({first.clip_list['sha256'][:12]})"]
    remarks += [f"{key} skipped: {reason}" for key, reason in first.skipped.items()]
    remarks += [f"note: {note}" for note in result.notes]
    return "\n".join([*parts, "\n".join(remarks) + "\n"])


def _difference(row: Difference | None) -> str:
    if row is None:
        return "-"
    return f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]{'*' if row.excludes_zero else ''}"
