"""Which clips a score is about: their names, their hash, and the restriction to a published list."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recap_hf.modeling.retrieval_recap import normalize_clip_id

_EXTENSION = re.compile(r"\.(wav|flac|ogg|oga|opus|mp3|m4a|aac|webm|aiff?|npy|mp4|mkv)$", re.IGNORECASE)
_YOUTUBE = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_\d+(?:\.\d+)?){0,2}")
ID_COLUMNS = ("clip_id", "file_name", "fname", "filename", "file_path", "audio_id", "youtube_id", "id")


def clip_stem(clip_id: str, youtube: bool = False) -> str:
    """Name of a clip without folder and audio extension.

    `youtube=True` also takes away what surrounds a YouTube id: a leading `Y` and the start and end times, so that
    `Y7fmOlUlwoNg.wav`, `7fmOlUlwoNg_20.flac` and `7fmOlUlwoNg` are one clip.
    """
    stem = _EXTENSION.sub("", re.split(r"[/\\]", clip_id)[-1])
    match = _YOUTUBE.fullmatch(stem) if youtube else None
    return match[1] if match else stem


def clip_list_hash(names: Iterable[str]) -> str:
    """SHA-256 of the clips' names, whatever their order, folder, extension and spelling (case, punctuation).

    Two scores with the same hash are about the same clips.
    """
    return sha256_of_lines(normalize_clip_id(clip_stem(name)) for name in names)


def sha256_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 of the sorted lines, as 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", errors="replace")).hexdigest()


def match_clips(first: Sequence[str], second: Sequence[str], youtube: bool = False) -> list[tuple[int, int]]:
    """Pairs of positions (in `first`, in `second`) that name the same clip, in the order of `first`.

    Names that are equal are matched first, then stems, then folded spellings (one published list writes `Santa Motor`
    and another `Santa_Motor`); the last two only where one clip of either side can be meant: Clotho has different
    clips called `Watering Can` and `watering_can`, and folders may hold clips of the same name.

    Raises:
        ValueError: if a side has the same name twice.
    """
    for names in (first, second):
        repeated = next((name for name, count in Counter(names).items() if count > 1), None)
        if repeated is not None:
            raise ValueError(f"the clip {repeated!r} is named twice")
    pairs: list[tuple[int, int]] = []
    rest = dict(enumerate(first)), dict(enumerate(second))
    for key_of in (
        str,
        lambda name: clip_stem(name, youtube),
        lambda name: normalize_clip_id(clip_stem(name, youtube)),
    ):
        indices = [_unambiguous(names, key_of) for names in rest]
        found = [(number, indices[1][key]) for key, number in indices[0].items() if key in indices[1]]
        for one, two in found:
            del rest[0][one], rest[1][two]
        pairs += found
    return sorted(pairs)


def _unambiguous(names: dict[int, str], key_of: Callable[[str], str]) -> dict[str, int]:
    """Position by key, for the keys that only one of the names has."""
    keys = {number: key_of(name) for number, name in names.items()}
    counts = Counter(keys.values())
    return {key: number for number, key in keys.items() if counts[key] == 1}


@dataclass(frozen=True)
class ClipList:
    """A named list of clips, as published with a test set."""

    name: str
    clip_ids: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the list."""
        return clip_list_hash(self.clip_ids)

    def select(self, clip_ids: Sequence[str], youtube: bool = False) -> tuple[list[int], list[str]]:
        """Positions in `clip_ids` of the clips on the list, and the names on the list that `clip_ids` lacks.

        Raises:
            ValueError: if none of the clips is on the list, or one is named twice.
        """
        pairs = match_clips(clip_ids, self.clip_ids, youtube)
        if not pairs:
            hint = "" if youtube else "; where both are AudioSet clips named in two ways, try --youtube-ids"
            raise ValueError(
                f"none of the {len(clip_ids)} clips is on the list {self.name} "
                f"(clips like {clip_ids[0]!r}, list like {self.clip_ids[0]!r}){hint}"
            )
        found = {pair[1] for pair in pairs}
        return [pair[0] for pair in pairs], [name for n, name in enumerate(self.clip_ids) if n not in found]


def read_clip_list(path: str | os.PathLike, column: str | None = None) -> ClipList:
    """A clip list from a text file with one name a line (`#` starts a comment line) or from a column of a CSV file.

    A name that occurs several times (a CSV with one row a caption) counts once.

    Raises:
        ValueError: if the file holds no name, or the CSV no column of names.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            columns = list(reader.fieldnames or [])
            chosen = column or next((name for name in ID_COLUMNS if name in columns), None)
            if chosen not in columns:
                expected = repr(column) if column else f"one of {', '.join(ID_COLUMNS)}"
                raise ValueError(f"{path} has the columns {', '.join(columns)}; expected {expected}")
            names = [row[chosen] or "" for row in reader]
    else:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        names = [line for line in lines if not line.lstrip().startswith("#")]
    unique = dict.fromkeys(name.strip() for name in names if name.strip())
    if not unique:
        raise ValueError(f"{path} names no clip")
    return ClipList(path.stem, tuple(unique))
