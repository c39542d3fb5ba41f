"""Names of clips: matching them between files, hashing them, and restricting scores to a published list."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from recap_hf.data.caption_tables import read_rows
from recap_hf.modeling.retrieval_recap import normalize_clip_id

_EXTENSION = re.compile(r"\.(wav|flac|ogg|oga|opus|mp3|m4a|aac|webm|aiff?|npy|mp4|mkv)$", re.IGNORECASE)
_YOUTUBE = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_\d+(?:\.\d+)?){0,2}")
ID_COLUMNS = ("clip_id", "file_name", "fname", "filename", "file_path", "audio_id", "youtube_id", "id")


def clip_stem(clip_id: str, youtube: bool = False) -> str:
    """Name of a clip without folder and audio extension.

    `youtube=True` also removes what surrounds a YouTube id, a leading `Y` and the start and end times: then
    `Y7fmOlUlwoNg.wav`, `7fmOlUlwoNg_20.flac` and `7fmOlUlwoNg` are one clip.
    """
    stem = _EXTENSION.sub("", re.split(r"[/\\]", clip_id)[-1])
    match = _YOUTUBE.fullmatch(stem) if youtube else None
    return match[1] if match else stem


def clip_list_hash(names: Iterable[str]) -> str:
    """SHA-256 of the clips' names, independent of order, folder, extension and spelling (case, punctuation).

    Two scores with the same hash are about the same clips.
    """
    return sha256_of_lines(normalize_clip_id(clip_stem(name)) for name in names)


def sha256_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 of the sorted lines, as 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", errors="replace")).hexdigest()


def match_clips(first: Sequence[str], second: Sequence[str], youtube: bool = False) -> list[tuple[int, int]]:
    """Pairs of positions (in `first`, in `second`) that name the same clip, in the order of `first`.

    Equal names are matched first, then stems, then normalized spellings (one published list writes `Santa Motor`,
    another `Santa_Motor`). Stems and spellings match only where each side has one such clip: Clotho has different
    clips called `Watering Can` and `watering_can`, and folders may hold clips of the same name.

    Raises:
        ValueError: if a side has the same name twice.
    """
    for names in (first, second):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"the clip {repeated[0]!r} is named twice")

    def stem(name: str) -> str:
        return clip_stem(name, youtube)

    pairs: dict[int, int] = {}
    for key_of in (str, stem, lambda name: normalize_clip_id(stem(name))):
        own = _unambiguous(first, key_of, pairs.keys())
        other = _unambiguous(second, key_of, pairs.values())
        pairs |= {position: other[key] for key, position in own.items() if key in other}
    return sorted(pairs.items())


def _unambiguous(names: Sequence[str], key_of: Callable[[str], str], matched: Iterable[int]) -> dict[str, int]:
    """Position by key of the names that are not matched yet, for the keys that only one of them has."""
    matched = set(matched)
    keys = {position: key_of(name) for position, name in enumerate(names) if position not in matched}
    counts = Counter(keys.values())
    return {key: position for position, key in keys.items() if counts[key] == 1}


def read_clip_list(path: str | os.PathLike) -> list[str]:
    """The names in a text file with one name per line (`#` starts a comment line), or in a table, each once.

    Of a table the first of the columns `clip_id`, `file_name`, ... is read.

    Raises:
        ValueError: if the file holds no name, or the table no column of names.
    """
    path = Path(path)
    if path.suffix.lower() in ("", ".txt", ".lst"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        names = [line for line in lines if not line.lstrip().startswith("#")]
    else:
        rows = list(read_rows(path))
        columns = list(rows[0]) if rows else []
        column = next((name for name in ID_COLUMNS if name in columns), None)
        if column is None:
            raise ValueError(f"{path} has the columns {', '.join(columns)}; expected one of {', '.join(ID_COLUMNS)}")
        names = [str(row[column] or "") for row in rows]
    unique = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not unique:
        raise ValueError(f"{path} names no clip")
    return unique


def select_listed(
    clip_ids: Sequence[str], clip_list: str | os.PathLike, source: str, youtube: bool = False
) -> tuple[list[int], list[str]]:
    """Positions of the clips that a file of names lists, and remarks on clips that only one side has.

    Args:
        clip_ids: the clips to choose from.
        clip_list: see [`read_clip_list`].
        source: what has the clips, for the remarks.
        youtube: compare YouTube ids alone.

    Raises:
        ValueError: if none of the clips is on the list, or one is named twice.
    """
    listed, title = read_clip_list(clip_list), Path(clip_list).stem
    pairs = match_clips(clip_ids, listed, youtube)
    if not pairs:
        hint = "" if youtube else "; for AudioSet clips named in two ways, try --youtube-ids"
        names = f"(clips like {clip_ids[0]!r}, list like {listed[0]!r})"
        raise ValueError(f"none of the {len(clip_ids)} clips of {source} is on the list {title} {names}{hint}")
    found, notes = {pair[1] for pair in pairs}, []
    absent = [name for position, name in enumerate(listed) if position not in found]
    if absent:
        of = f"{len(absent)} of the {len(listed)} clips of the list {title}"
        notes.append(f"{of} are not in {source} (first: {absent[0]})")
    if len(pairs) < len(clip_ids):
        notes.append(f"{len(clip_ids) - len(pairs)} clips of {source} are not on the list {title} and were left out")
    return [pair[0] for pair in pairs], notes
