"""Tables of captions, and the audio files that they name."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recap_hf.modeling.retrieval_recap import normalize_clip_id
from recap_hf.recordings import AUDIO_SUFFIXES

from .caption_tables import read_rows
from .schema import listed, require_columns


def read_table(path: str | Path, expected: Mapping[str, str], mapping: Mapping | None = None) -> list[dict[str, Any]]:
    """Rows of a CSV, TSV, JSON, JSONL or Parquet file, all with the same columns, mapped ones under our names.

    Args:
        path: the file; see `read_rows`.
        expected: needed column -> what it holds.
        mapping: our column name -> the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that does not parse, has no rows or lacks a column.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = list(renamed(({name: row.get(name) for name in names} for row in rows), names, mapping, str(path)))
    require_columns(list(rows[0]), expected, str(path))
    return rows


def renamed(
    rows: Iterable[Mapping[str, Any]], names: list[str], mapping: Mapping[str, str] | None, where: str
) -> Iterator[dict[str, Any]]:
    """Rows with mapped columns under our names; another column with such a name is left out.

    Raises:
        ValueError: if the mapping names a column that the table does not have.
    """
    for ours, theirs in (mapping or {}).items():
        if theirs not in names:
            raise ValueError(f"{where} has columns {listed(names)}; the mapping {ours}={theirs} names none of them")
    taken = set((mapping or {}).values())
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in taken}
        yield kept | {ours: row[theirs] for ours, theirs in (mapping or {}).items()}


class AudioIndex:
    """The audio files below a folder, found by name without asking the disk again for each clip.

    Args:
        folder: searched recursively.
    """

    def __init__(self, folder: str | Path) -> None:
        self._by_name: dict[str, str] = {}
        self._by_id: dict[str, list[str]] = defaultdict(list)
        for parent, folders, files in os.walk(folder, followlinks=True):
            folders.sort()
            for name in sorted(files):
                if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                    path = os.path.join(parent, name)
                    self._by_name.setdefault(name, path)
                    self._by_name.setdefault(os.path.relpath(path, folder).replace(os.sep, "/"), path)
                    self._by_id[normalize_clip_id(name)].append(path)

    def find(self, name: str) -> str | None:
        """Path of the file called `name`; another extension or spelling is accepted if only one file fits."""
        exact = self._by_name.get(name) or self._by_name.get(name.rsplit("/", 1)[-1])
        folded = self._by_id.get(normalize_clip_id(name), [])
        return exact or (folded[0] if len(folded) == 1 else None)

    def paths(self) -> list[str]:
        """Every file once, in order of path."""
        return sorted(path for paths in self._by_id.values() for path in paths)


def find_one(folder: str | Path, patterns: list[str], what: str) -> Path:
    """`folder` if it is a file; else what fits the first of the patterns that anything below it fits.

    Raises:
        FileNotFoundError: naming the patterns, if nothing fits. ValueError: if several files do.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}")
    found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several files that may be the {what} ({names}): give one as --data-dir")
    if not found:
        raise FileNotFoundError(f"{folder} holds no {what}: looked for {', '.join(patterns)}")
    return found[0]
