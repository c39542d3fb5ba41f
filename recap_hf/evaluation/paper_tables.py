"""Our rows in the layout of the paper's Tables 1 and 2, beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from recap_hf.scoring import METRIC_LABELS

from .published import FOOTNOTES, METRIC_KEYS, TEST_SETS, TRAINING_SETS, PublishedRow, published_rows
from .tables import markdown_table

_HEADER = (
    "Training set",
    "Method",
    *(METRIC_LABELS[key] for key in METRIC_KEYS),
    "(CIDEr + SPICE) / 2 [a]",
    "Clips",
    "Seeds",
    "CLAP",
)


@dataclass(frozen=True)
class OurRow:
    """One of our systems on one test set.

    Attributes:
        training_set: as in the table's first column.
        label: the system and its datastore.
        seeds: corpus scores of each seed, by metric.
        num_clips: clips scored.
        clap: name of the CLAP checkpoint.
        published_as: label of the published row that this one reproduces; empty where there is none.
    """

    training_set: str
    label: str
    seeds: Sequence[dict[str, float | None]]
    num_clips: int
    clap: str
    published_as: str = ""

    def mean(self, key: str) -> float | None:
        """Mean over the seeds; None where a seed lacks the score."""
        values = [scores.get(key) for scores in self.seeds]
        return None if not values or any(value is None for value in values) else float(np.mean(values))

    def cell(self, key: str) -> str:
        """Mean and, with several seeds, standard deviation over them (n - 1)."""
        mean = self.mean(key)
        if mean is None:
            return "-"
        if len(self.seeds) == 1:
            return f"{mean:.3f}"
        return f"{mean:.3f} ±{np.std([scores[key] for scores in self.seeds], ddof=1):.3f}"


@dataclass
class PaperTable:
    """A table ready to print: header, rows of cells, notes below; `ours` marks our rows."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]
    ours: list[bool] = field(default_factory=list)

    def to_markdown(self) -> str:
        """Title, table and notes as Markdown."""
        return "\n".join([f"### {self.title}\n", markdown_table(self.header, self.rows), *self.notes]) + "\n"


def paper_table(
    test_set: str,
    ours: Sequence[OurRow],
    *,
    title: str | None = None,
    notes: Sequence[str] = (),
    with_published: bool = True,
) -> PaperTable:
    """A table in the layout of the paper.

    Args:
        test_set: `clotho` (Table 1) or `audiocaps` (Table 2); any other name with `with_published=False`.
        ours: our rows; each block of a training set ends with its own.
        title: default: as in the paper.
        notes: printed below: clip list, CLAP's training data, sources of the large datastore.
        with_published: whether to add the published rows.
    """
    published = [row for row in published_rows() if row.test_set == test_set] if with_published else []
    if with_published and not published:
        raise ValueError(f"the paper has no table on {test_set!r}; it has {', '.join(TEST_SETS)}")
    order = [TRAINING_SETS[key] for key in dict.fromkeys(row.training_set for row in published)]
    order += [name for name in dict.fromkeys(row.training_set for row in ours) if name not in order]
    rows, is_ours = [], []
    for training_set in order:
        block = [_published_cells(row) for row in published if TRAINING_SETS[row.training_set] == training_set]
        own = [_our_cells(row) for row in ours if row.training_set == training_set]
        for cells in (*block, *own):
            rows.append([training_set, *cells])
        is_ours += [False] * len(block) + [True] * len(own)
    footnotes = [f"[{mark}] {text}" for mark, text in FOOTNOTES.items() if _applies(mark, published)]
    number = published[0].table if published else None
    default = f"Evaluation on {TEST_SETS.get(test_set, test_set)}" + (
        f" (the paper's Table {number})" if number else ""
    )
    return PaperTable(title or default, _HEADER, rows, [*footnotes, *notes], is_ours)


def _applies(mark: str, published: Sequence[PublishedRow]) -> bool:
    if not published:
        return False
    if mark == "b":
        return any(row.misprinted_spice for row in published)
    return mark != "c" or published[0].table == 1


def _published_cells(row: PublishedRow) -> list[str]:
    cells = [row.printed[key] + (" [b]" if key == "spice" and row.misprinted_spice else "") for key in METRIC_KEYS]
    parts = row.spider_from_parts
    # With four decimals: halves of thousandths would hide small deviations.
    return [row.label, *cells, "-" if parts is None else f"{parts:.4f}", "?", "?", "?" if row.datastore else "-"]


def _our_cells(row: OurRow) -> list[str]:
    parts = [row.mean("cider_d"), row.mean("spice")]
    combined = "-" if None in parts else f"{sum(parts) / 2:.4f}"
    cells = [row.cell(key) for key in METRIC_KEYS]
    return [f"recap_hf: {row.label}", *cells, combined, str(row.num_clips), str(len(row.seeds)), row.clap]
