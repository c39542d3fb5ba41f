"""The one table that all training and evaluation code reads, whatever a dataset looked like on disk.

A row is a clip: `clip_id`, `audio` (undecoded: path or bytes), `captions` (a list), `split`, `source`, `licence`, and
where a tagger or labels say so, `classes` (names of sounds) and `class_scores` (a number from 0 to 1 for each).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("clip_id", "audio", "captions", "split", "source", "licence", "classes", "class_scores")

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


@dataclass(frozen=True)
class LoadOptions:
    """What every loader is given; see `load_captions`. `split` is `train`, `validation` or `test`."""

    data_dir: str | Path | None = None
    split: str = "train"
    audio_dir: str | Path | None = None
    columns: Mapping[str, str] | None = None
    needs_audio: bool = True


@dataclass
class ClipRecord:
    """One clip before it is a row of the table.

    `audio` is a path, `{"path", "bytes"}` or None; `wanted` says what is missing then.
    """

    clip_id: str
    audio: str | dict | None
    captions: list[str | None]
    source: str
    licence: str | None = None
    wanted: str = ""
    classes: list[str] = field(default_factory=list)
    class_scores: list[float] = field(default_factory=list)


@dataclass
class CaptionData:
    """A loaded dataset and what had to be left out of it."""

    dataset: "Dataset"
    problems: list[Problem] = field(default_factory=list)


def canonical_split(name: str) -> str:
    """`train`, `validation` or `test` for any usual spelling of a split (`development`, `val`, `dev`, ...)."""
    for canonical, spellings in SPLITS.items():
        if name.lower() in spellings:
            return canonical
    known = ", ".join(spelling for spellings in SPLITS.values() for spelling in spellings)
    raise ValueError(f"unknown split {name!r}: expected one of {known}")


def column_mapping(pairs: Iterable[str]) -> dict[str, str]:
    """OURS=THEIRS pairs, as `--columns` takes them, as our column name -> the dataset's."""
    mapping = {}
    for pair in pairs:
        ours, _, theirs = pair.partition("=")
        if not (ours and theirs):
            raise ValueError(f"--columns takes OURS=THEIRS pairs, such as caption=text, got {pair!r}")
        mapping[ours] = theirs
    return mapping


def build_caption_data(records: Iterable[ClipRecord], options: LoadOptions) -> CaptionData:
    """Table of the records: clips of one id and source are merged; empty captions, and clips without the audio that
    they need, are left out and named."""
    from datasets import Audio, Dataset, Features, List, Value

    # A clip with five captions is missing once: dictionaries have each problem once.
    missing: dict[Problem, None] = {}
    empty: list[Problem] = []
    merged: dict[tuple[str, str], ClipRecord] = {}
    for record in records:
        if options.needs_audio and record.audio is None:
            wanted = record.wanted or f"no audio file {record.clip_id}"
            missing[Problem(record.clip_id, "missing", wanted)] = None
            continue
        texts = [(caption or "").strip() for caption in record.captions]
        problem = Problem(record.clip_id, "empty-caption", f"{record.clip_id}: an empty caption")
        empty += [problem] * texts.count("")
        kept = list(filter(None, texts))
        if kept:
            key = (record.source, record.clip_id)
            merged.setdefault(key, replace(record, captions=[])).captions.extend(kept)
    clips = list(merged.values())
    named = [name for name in COLUMNS if name not in ("audio", "split")]
    columns = {name: [getattr(clip, name) for clip in clips] for name in named}
    columns["split"] = [options.split] * len(clips)
    audio = [clip.audio for clip in clips]
    columns["audio"] = [{"path": each, "bytes": None} if isinstance(each, str) else each for each in audio]
    kinds = dict.fromkeys(COLUMNS, Value("string")) | dict.fromkeys(("captions", "classes"), List(Value("string")))
    kinds["class_scores"] = List(Value("float32"))
    # `Audio` refuses to encode even a path without torchcodec; casting the plain struct to it asks for no codec.
    stored = Features(kinds | {"audio": {"bytes": Value("binary"), "path": Value("string")}})
    table = Dataset.from_dict({name: columns[name] for name in COLUMNS}, features=stored)
    return CaptionData(table.cast(Features(kinds | {"audio": Audio(decode=False)})), [*missing, *empty])


def class_columns(row: Mapping, where: str) -> tuple[list[str], list[float]]:
    """`classes` and `class_scores` of a row of a table: lists, or texts with `;`. Without scores, each class has 1.

    Raises:
        ValueError: if their numbers differ, or a score is not from 0 to 1; the message begins with `where`.
    """
    classes, scores = (row.get(name) or [] for name in ("classes", "class_scores"))
    if isinstance(classes, str):
        # A cell of a CSV file.
        cells = [(cell or "").split(";") for cell in (classes, scores)]
        classes, scores = ([part.strip() for part in cell if part.strip()] for cell in cells)
        scores = [float(score) for score in scores]
    scores = list(scores) or [1.0] * len(classes)
    if len(scores) != len(classes) or not all(0 <= score <= 1 for score in scores):
        wanted = f"a number from 0 to 1 for each of the {len(classes)} `classes`"
        got = f"{scores[:5]}{'...' if len(scores) > 5 else ''}"
        raise ValueError(f"{where}: `class_scores` must hold {wanted}, got {got}")
    return list(classes), scores


def require_columns(found: Sequence[str], expected: Mapping[str, str], where: str) -> None:
    """Refuses a table without the needed columns.

    Args:
        found: the columns that the table has, after mapping.
        expected: needed column -> what it holds.
        where: the file or dataset, for the message.

    Raises:
        ValueError: naming what was expected, what was found and what to map.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        wanted = "; ".join(f"{name} ({meaning})" for name, meaning in expected.items())
        example = " ".join(f"{name}=YOURS" for name in missing)
        hint = f"If the same thing stands under another name, map it: --columns {example}"
        has = f"{where} has the columns {listed(found)}. Expected: {wanted}. Not found: {listed(missing)}."
        raise ValueError(f"{has} {hint}")


def listed(names: Sequence[str]) -> str:
    """Column names for a message."""
    return ", ".join(map(repr, names)) if names else "(none)"
