"""Our rows in the layout of the paper's Tables 1 and 2, beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from recap_hf.scoring import METRIC_LABELS

from .published import FOOTNOTES, METRIC_KEYS, TEST_SETS, TRAINING_SETS, PublishedRow, published_rows
from .tables import markdown_table

_COLUMNS = [METRIC_LABELS[key] for key in METRIC_KEYS]
_HEADER = ("Training set", "Method", *_COLUMNS, "(CIDEr + SPICE) / 2 [a]", "Clips", "Seeds", "CLAP")


@dataclass(frozen=True)
class OurRow:
    """One of our systems on one test set.

    Attributes:
        training_set: as in the table's first column.
        label: the system and its datastore.
        seeds: corpus scores of each seed, by metric.
        num_clips: clips scored.
        clap: name of the CLAP checkpoint.
    """

    training_set: str
    label: str
    seeds: Sequence[dict[str, float | None]]
    num_clips: int
    clap: str

    def mean(self, key: str) -> float | None:
        """Mean over the seeds; None where a seed lacks the score."""
        values = [scores.get(key) for scores in self.seeds]
        return None if not values or any(value is None for value in values) else float(np.mean(values))

    def cells(self) -> list[str]:
        """Cells of the row: means and, with several seeds, standard deviations over them (n - 1)."""
        cells = []
        for key in METRIC_KEYS:
            mean = self.mean(key)
            text = "-" if mean is None else f"{mean:.3f}"
            if mean is not None and len(self.seeds) > 1:
                text += f" ±{np.std([scores[key] for scores in self.seeds], ddof=1):.3f}"
            cells.append(text)
        parts = [self.mean("cider_d"), self.mean("spice")]
        combined = "-" if None in parts else f"{sum(parts) / 2:.4f}"
        return [f"recap_hf: {self.label}", *cells, combined, str(self.num_clips), str(len(self.seeds)), self.clap]


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
    test_set: str, ours: Sequence[OurRow], notes: Sequence[str] = (), with_published: bool = True
) -> PaperTable:
    """A table in the layout of the paper.

    Args:
        test_set: `clotho` (Table 1) or `audiocaps` (Table 2); any other name with `with_published=False`.
        ours: our rows; each block of a training set ends with them.
        notes: printed below: clip list, CLAP's training data, sources of the large datastore.
        with_published: whether to add the published rows.
    """
    published = [row for row in published_rows() if row.test_set == test_set] if with_published else []
    if with_published and not published:
        raise ValueError(f"the paper has no table on {test_set!r}; it has {', '.join(TEST_SETS)}")
    blocks: dict[str, list[tuple[bool, list[str]]]] = {}
    for row in published:
        blocks.setdefault(TRAINING_SETS[row.training_set], []).append((False, _published_cells(row)))
    for row in ours:
        blocks.setdefault(row.training_set, []).append((True, row.cells()))
    rows = [[training_set, *cells] for training_set, block in blocks.items() for _, cells in block]
    is_ours = [own for block in blocks.values() for own, _ in block]
    title, footnotes = f"Evaluation on {TEST_SETS.get(test_set, test_set)}", []
    if published:
        title += f" (the paper's Table {published[0].table})"
        # [b] and [c] are about some tables only.
        skipped = set() if any(row.misprinted_spice for row in published) else {"b"}
        skipped |= set() if published[0].table == 1 else {"c"}
        footnotes = [f"[{mark}] {text}" for mark, text in FOOTNOTES.items() if mark not in skipped]
    return PaperTable(title, _HEADER, rows, [*footnotes, *notes], is_ours)


def _published_cells(row: PublishedRow) -> list[str]:
    cells = [row.printed[key] + (" [b]" if key == "spice" and row.misprinted_spice else "") for key in METRIC_KEYS]
    parts = row.spider_from_parts
    # With four decimals: halves of thousandths would hide small deviations.
    return [row.label, *cells, "-" if parts is None else f"{parts:.4f}", "?", "?", "?" if row.datastore else "-"]
