"""Tables of scores as plain text and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from recap_hf.scoring.metrics import METRIC_LABELS
from recap_hf.scoring.scorer import format_score

from .captioner import SYSTEMS
from .run import MAIN_SYSTEM, EvaluationResult

COLUMNS = {**METRIC_LABELS, "clap_score": "CLAPScore"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns aligned, so that it reads as plain text too."""
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def result_tables(result: EvaluationResult) -> str:
    """Scores of all systems, the differences to the captioner with their intervals, and the remarks."""
    keys = [key for key in COLUMNS if any(scores.corpus.get(key) is not None for scores in result.scores.values())]
    rows = [[name, *(format_score(scores.corpus.get(key)) for key in keys)] for name, scores in result.scores.items()]
    parts = [markdown_table(["system", *(COLUMNS[key] for key in keys)], rows)]
    if result.differences:
        rows = [
            [name, *(_difference(differences.get(key)) for key in keys)]
            for name, differences in result.differences.items()
        ]
        title = f"{MAIN_SYSTEM} minus the system of the row, {100 * result.confidence:g}% paired bootstrap interval"
        parts.append(f"{title} (* excludes 0)\n\n" + markdown_table(["system", *(COLUMNS[key] for key in keys)], rows))
    parts.append("\n".join(f"{name}: {SYSTEMS[name]}" for name in result.scores if name in SYSTEMS) + "\n")
    first = next(iter(result.scores.values()))
    remarks = [f"{first.clip_list['num_clips']} clips, list {result.clips_name} ({first.clip_list['sha256'][:12]})"]
    remarks += [f"{key} skipped: {reason}" for key, reason in first.skipped.items()]
    remarks += [f"note: {note}" for note in result.notes]
    parts.append("\n".join(remarks) + "\n")
    return "\n".join(parts)


def _difference(row) -> str:
    if row is None:
        return "-"
    return f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]{'*' if row.excludes_zero else ''}"
