"""The one table that all training and evaluation code reads, whatever a dataset looked like on disk.

A row is a clip: `clip_id`, `audio` (undecoded: path or bytes), `captions` (a list), `split`, `source`, `licence`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, Features

COLUMNS = ("clip_id", "audio", "captions", "split", "source", "licence")

SPLITS = {
    "train": ("train", "training", "development"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "evaluation", "eval"),
}


@dataclass(frozen=True)
class Problem:
    """Something in the data that was left out, and why.

    `kind` is "missing" (no audio file), "empty-caption", "unreadable" (audio that does not decode) or "too-short".
    """

    clip_id: str
    kind: str
    detail: str


@dataclass
class ClipRecord:
    """One clip on its way into the table; `audio` is a path, `{"path", "bytes"}`, or None for text-only use."""

    clip_id: str
    audio: str | dict | None
    captions: list[str]
    split: str
    source: str
    licence: str | None = None


@dataclass
class CaptionData:
    """A loaded dataset and what had to be left out of it."""

    dataset: Dataset
    problems: list[Problem] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Clips, captions and one count per kind of problem."""
        counts = {"clips": len(self.dataset), "captions": sum(len(c) for c in self.dataset["captions"])}
        counts.update(sorted(Counter(problem.kind for problem in self.problems).items()))
        return counts


def canonical_split(name: str) -> str:
    """`train`, `validation` or `test` for any usual spelling of a split (`development`, `val`, `dev`, ...)."""
    for canonical, spellings in SPLITS.items():
        if name.lower() in spellings:
            return canonical
    known = ", ".join(spelling for spellings in SPLITS.values() for spelling in spellings)
    raise ValueError(f"unknown split {name!r}: expected one of {known}")


def features() -> Features:
    """The `datasets.Features` of the table; audio stays undecoded, so no codec library is needed to load it."""
    from datasets import Audio, Features, List, Value

    return Features(
        {
            "clip_id": Value("string"),
            "audio": Audio(decode=False),
            "captions": List(Value("string")),
            "split": Value("string"),
            "source": Value("string"),
            "licence": Value("string"),
        }
    )


def build_caption_data(records: Iterable[ClipRecord], problems: Iterable[Problem] = ()) -> CaptionData:
    """Table of the records: clips of one id and source are merged, empty captions are dropped and named."""
    from datasets import Dataset, Features, Value

    problems = list(problems)
    merged: dict[tuple[str, str], ClipRecord] = {}
    for record in records:
        kept = []
        for caption in record.captions:
            text = (caption or "").strip()
            if text:
                kept.append(text)
            else:
                problems.append(Problem(record.clip_id, "empty-caption", f"{record.clip_id}: an empty caption"))
        if not kept:
            continue
        known = merged.get((record.source, record.clip_id))
        if known is None:
            record.captions = kept
            merged[(record.source, record.clip_id)] = record
        else:
            known.captions.extend(kept)
    columns = {name: [getattr(record, name) for record in merged.values()] for name in COLUMNS}
    columns["audio"] = [_undecoded(audio) for audio in columns["audio"]]
    # `Audio` refuses to encode even a path without torchcodec; casting the plain struct to it asks for no codec.
    stored = Features(features() | {"audio": {"bytes": Value("binary"), "path": Value("string")}})
    table = Dataset.from_dict(columns, features=stored).cast(features())
    return CaptionData(table, problems)


def _undecoded(audio: str | dict | None) -> dict | None:
    if audio is None:
        return None
    if isinstance(audio, dict):
        return {"bytes": audio.get("bytes"), "path": audio.get("path")}
    return {"bytes": None, "path": str(audio)}


def require_columns(found: Sequence[str], expected: Mapping[str, str], where: str) -> None:
    """Stop with a lesson where columns are missing.

    Args:
        found: the columns that the table has, after mapping.
        expected: needed column -> what it holds.
        where: the file or dataset, for the message.

    Raises:
        ValueError: naming what was expected, what was found and what to map.
    """
    missing = [name for name in expected if name not in found]
    if not missing:
        return
    wanted = "; ".join(f"{name} ({meaning})" for name, meaning in expected.items())
    example = " ".join(f"{name}=YOURS" for name in missing)
    raise ValueError(
        f"{where} has the columns {listed(found)}. Expected: {wanted}. Not found: {listed(missing)}. "
        f"If the same thing stands under another name, map it: --columns {example}"
    )


def listed(names: Sequence[str]) -> str:
    """Column names for a message."""
    return ", ".join(map(repr, names)) if names else "(none)"
