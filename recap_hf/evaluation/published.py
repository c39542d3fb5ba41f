"""The published rows of the paper's Tables 1 and 2, as printed, with remarks on them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

METRIC_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider")
TEST_SETS = {"clotho": "Clotho", "audiocaps": "AudioCaps"}
TRAINING_SETS = {"clotho": "Clotho", "audiocaps": "AudioCaps", "clotho+audiocaps": "Clotho & AudioCaps"}

# Printed SPICE values that cannot be SPICE (it lies between 0 and 1, here near 0.1): a factor of ten.
_MISPRINTED_SPICE = {"0.988": 0.0988, "1.004": 0.1004}

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


@dataclass(frozen=True)
class PublishedRow:
    """One row of Table 1 or 2.

    Attributes:
        table: 1 or 2.
        test_set: `clotho` (Table 1) or `audiocaps` (Table 2).
        training_set: a key of `TRAINING_SETS`.
        method: authors of the system, or RECAP.
        reference: number in the paper's list of references, empty for RECAP.
        datastore: `DS` (captions of the test set's own training split), `DScaps`, `DSclotho`, `DSlarge`, or empty.
        printed: the printed values by metric; "-" where the paper has none.
    """

    table: int
    test_set: str
    training_set: str
    method: str
    reference: str
    datastore: str
    printed: dict[str, str]

    @property
    def label(self) -> str:
        """The row's name, as printed."""
        return f"RECAP (w/ {self.datastore})" if self.datastore else f"{self.method} [{self.reference}]"

    @property
    def misprinted_spice(self) -> bool:
        """Whether the printed SPICE is ten times what it can be."""
        return self.printed["spice"] in _MISPRINTED_SPICE

    def value(self, key: str) -> float | None:
        """The value of a metric, SPICE with its two misprints corrected; None where the paper has none."""
        text = self.printed[key]
        if key == "spice" and text in _MISPRINTED_SPICE:
            return _MISPRINTED_SPICE[text]
        return None if text == "-" else float(text)

    @property
    def spider_from_parts(self) -> float | None:
        """(CIDEr + SPICE) / 2."""
        cider, spice = self.value("cider_d"), self.value("spice")
        return None if cider is None or spice is None else (cider + spice) / 2


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All 41 rows, in the order of the paper."""
    with open(Path(__file__).with_name("published_tables.csv"), encoding="utf-8", newline="") as handle:
        rows = []
        for row in csv.DictReader(handle):
            printed = {key: row.pop(key) for key in METRIC_KEYS}
            rows.append(PublishedRow(**{**row, "table": int(row["table"])}, printed=printed))
    return tuple(rows)
