"""The paper's Tables 1 and 2: the published rows as printed, with remarks on them, and ours beside them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.scoring import METRIC_LABELS

from .tables import format_score, markdown_table

METRIC_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider")
TEST_SETS = {"clotho": "Clotho", "audiocaps": "AudioCaps"}
TRAINING_SETS = {**TEST_SETS, "clotho+audiocaps": "Clotho & AudioCaps"}
# Printed SPICE values that cannot be SPICE (it lies between 0 and 1, here near 0.1): a factor of ten.
MISPRINTED_SPICE = {"0.988": 0.0988, "1.004": 0.1004}
FOOTNOTES = {
    "a": "Second SPIDEr column: (CIDEr + SPICE) / 2, which is what SPIDEr means. It agrees with the printed SPIDEr in "
    "every row of the other systems and in none of RECAP's.",
    "b": "SPICE of this row is printed as 0.988 or 1.004, which can only be 0.0988 or 0.1004; the second SPIDEr "
    "column reads it so.",
    "c": "The caption of the paper's Table 1 says AudioCaps where it means Clotho.",
    "d": "Published rows are as printed in Ghosh et al., RECAP: Retrieval-Augmented Audio Captioning, ICASSP 2024. "
    "The paper does not say which AudioCaps test list it used (975, 957, 912, 886 and 748 clips are in use), which "
    "CLAP checkpoint, or which CIDEr; the field's implementations compute CIDEr-D.",
    "e": "The sources of the paper's large datastore (600,000 captions) are not listed where it says; ours is a "
    "reconstruction and no copy.",
}
_COLUMNS = [METRIC_LABELS[key] for key in METRIC_KEYS]
_HEADER = ["Training set", "Method", *_COLUMNS, "(CIDEr + SPICE) / 2 [a]", "Clips", "Seeds", "CLAP"]


def published_rows() -> list[dict[str, str]]:
    """All 41 rows, in the order of the paper.

    Each has `table` ("1" or "2"), `test_set`, `training_set` (a key of `TRAINING_SETS`), `method` (the authors, or
    RECAP), `reference` (number in the paper's list, empty for RECAP), `datastore` (`DS`, captions of the test set's
    own training split; `DScaps`, `DSclotho`, `DSlarge`, or empty) and the printed values of `METRIC_KEYS`, "-" where
    the paper has none.
    """
    with open(Path(__file__).with_name("published_tables.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def row_label(row: dict[str, str]) -> str:
    """The name of a published row, as printed."""
    return f"RECAP (w/ {row['datastore']})" if row["datastore"] else f"{row['method']} [{row['reference']}]"


def published_value(row: dict[str, str], key: str) -> float | None:
    """The value of a metric, SPICE with its two misprints corrected; None where the paper has none."""
    if key == "spice" and row[key] in MISPRINTED_SPICE:
        return MISPRINTED_SPICE[row[key]]
    return None if row[key] == "-" else float(row[key])


def spider_from_parts(cider: float | None, spice: float | None) -> float | None:
    """(CIDEr + SPICE) / 2, None if one is missing."""
    return None if cider is None or spice is None else (cider + spice) / 2


def our_cells(label: str, corpora: Sequence[dict[str, float | None]], num_clips: int, clap: str) -> list[str]:
    """Cells of one of our rows, after the training set.

    Args:
        label: the system and its datastore.
        corpora: corpus scores of each seed, by metric. Printed are their means and, with several seeds, standard
            deviations (n - 1); a dash where a seed lacks the score.
        num_clips: clips scored.
        clap: name of the CLAP checkpoint.
    """
    columns = {key: [scores.get(key) for scores in corpora] for key in METRIC_KEYS}
    means = {key: None if None in values else float(np.mean(values)) for key, values in columns.items()}
    cells = ["-" if mean is None else f"{mean:.3f}" for mean in means.values()]
    if len(corpora) > 1:
        spreads = ["" if None in values else f" ±{np.std(values, ddof=1):.3f}" for values in columns.values()]
        cells = [cell + spread for cell, spread in zip(cells, spreads, strict=True)]
    combined = format_score(spider_from_parts(means["cider_d"], means["spice"]))
    return [f"recap_hf: {label}", *cells, combined, str(num_clips), str(len(corpora)), clap]


def paper_table(test_set: str, ours: Sequence[tuple[str, list[str]]], notes: Sequence[str] = ()) -> dict[str, Any]:
    """A table in the layout of the paper.

    Args:
        test_set: for `clotho` (Table 1) and `audiocaps` (Table 2) the published rows are added.
        ours: title of the training set and cells of our rows; each block of a training set ends with them.
        notes: printed below: clip list, CLAP's training data, sources of the large datastore.

    Returns:
        `title`, `header`, `rows` (of cells), `notes`, and `ours`, which marks our rows.
    """
    published = [row for row in published_rows() if row["test_set"] == test_set]
    blocks: dict[str, list[tuple[bool, list[str]]]] = {}
    for row in published:
        blocks.setdefault(TRAINING_SETS[row["training_set"]], []).append((False, _published_cells(row)))
    for training_set, cells in ours:
        blocks.setdefault(training_set, []).append((True, cells))
    title, footnotes = f"Evaluation on {TEST_SETS.get(test_set, test_set)}", []
    if published:
        title += f" (the paper's Table {published[0]['table']})"
        # [b] and [c] are about some tables only.
        absent = {"b": all(row["spice"] not in MISPRINTED_SPICE for row in published), "c": test_set != "clotho"}
        footnotes = [f"[{mark}] {text}" for mark, text in FOOTNOTES.items() if not absent.get(mark)]
    return {
        "title": title,
        "header": _HEADER,
        "rows": [[training_set, *cells] for training_set, block in blocks.items() for _, cells in block],
        "notes": [*footnotes, *notes],
        "ours": [is_ours for block in blocks.values() for is_ours, _ in block],
    }


def table_markdown(table: dict[str, Any]) -> str:
    """A table of [`paper_table`] as Markdown."""
    return (
        "\n".join([f"### {table['title']}\n", markdown_table(table["header"], table["rows"]), *table["notes"]]) + "\n"
    )


def _published_cells(row: dict[str, str]) -> list[str]:
    misprinted = row["spice"] in MISPRINTED_SPICE
    cells = [row[key] + (" [b]" if key == "spice" and misprinted else "") for key in METRIC_KEYS]
    combined = format_score(spider_from_parts(published_value(row, "cider_d"), published_value(row, "spice")))
    return [row_label(row), *cells, combined, "?", "?", "?" if row["datastore"] else "-"]
