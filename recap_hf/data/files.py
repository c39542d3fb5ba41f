"""Reading caption tables through `datasets`, and finding the audio that they name."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recap_hf.modeling.caption_tables_recap import read_rows

from .clip_ids import normalize_clip_id
from .schema import listed

if TYPE_CHECKING:
    from datasets import Dataset

_SOUND_FILES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
_CONTAINERS = {".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".mov"}
AUDIO_EXTENSIONS = frozenset(_SOUND_FILES | _CONTAINERS)


def read_table(path: Path, field: str | None = None, mapping: Mapping[str, str] | None = None) -> Dataset:
    """A CSV, TSV, JSON, JSONL or Parquet file as a `datasets.Dataset`, with mapped columns under our names.

    Every CSV cell stays text: a YouTube id that looks like a number, or a caption that reads "None", is not converted.

    Args:
        path: the file.
        field: for a JSON object, the key that holds the rows.
        mapping: our column name -> the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown kind of file, or one that does not parse.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    suffix = path.suffix.lower()
    kinds = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if suffix not in kinds:
        raise ValueError(f"{path}: expected a .csv, .tsv, .json, .jsonl or .parquet file")
    options = {}
    if kinds[suffix] == "csv":
        options = _csv_options(path)
        # Ragged rows and open quotes are refused here, with their line: what reads the table would shift the columns.
        for _ in read_rows(path):
            pass
    options |= {"field": field} if field else {}
    try:
        table = load_dataset(kinds[suffix], data_files=str(path), split="train", **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} does not read as {suffix[1:].upper()}: {error.__cause__ or error}") from error
    return rename_mapped(table, mapping, str(path))


def rename_mapped(table: Dataset, mapping: Mapping[str, str] | None, where: str) -> Dataset:
    """Columns under our names; another column with the wanted name is removed.

    Raises:
        ValueError: if the mapping names a column that the table does not have.
    """
    for ours, theirs in (mapping or {}).items():
        if theirs not in table.column_names:
            raise ValueError(
                f"{where} has the columns {listed(table.column_names)}; the mapping {ours}={theirs} names none of them"
            )
        if ours != theirs:
            others = table.remove_columns(ours) if ours in table.column_names else table
            table = others.rename_column(theirs, ours)
    return table


def _csv_options(path: Path) -> dict:
    from datasets import Features, Value

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as handle:
        header = next(csv.reader(handle, delimiter=delimiter), None)
    if not header:
        raise ValueError(f"{path} is empty: expected a first line with column names")
    # An index column without a name (as pandas writes it) gets one, since features need names.
    names = [name if name else f"unnamed_{number}" for number, name in enumerate(header)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} has the column {repeated[0]!r} more than once")
    return {
        "sep": delimiter,
        "column_names": names,
        "skiprows": 1,
        "na_filter": False,
        "encoding": "utf-8-sig",
        "features": Features({name: Value("string") for name in names}),
    }


class AudioIndex:
    """The audio files below some folders, found by name without asking the disk again for each clip.

    Args:
        folders: searched recursively.
    """

    def __init__(self, *folders: Path) -> None:
        self._by_name: dict[str, str] = {}
        self._by_id: dict[str, list[str]] = defaultdict(list)
        for folder in folders:
            for path in _walk(folder):
                name = os.path.basename(path)
                self._by_name.setdefault(name, path)
                self._by_name.setdefault(os.path.relpath(path, folder).replace(os.sep, "/"), path)
                self._by_id[normalize_clip_id(name)].append(path)

    def find(self, name: str) -> str | None:
        """Path of the file called `name`; another extension or spelling is accepted if only one file fits."""
        exact = self._by_name.get(name) or self._by_name.get(name.rsplit("/", 1)[-1])
        if exact:
            return exact
        folded = self._by_id.get(normalize_clip_id(name), [])
        return folded[0] if len(folded) == 1 else None

    def paths(self) -> Iterator[str]:
        """Every file once, in order of path."""
        return iter(sorted(path for paths in self._by_id.values() for path in paths))


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in AUDIO_EXTENSIONS:
                yield os.path.join(parent, name)


def first_existing(folder: Path, names: list[str], what: str) -> Path:
    """First of `names` that exists below `folder`.

    Raises:
        FileNotFoundError: listing what was looked for.
    """
    for name in names:
        if (folder / name).exists():
            return folder / name
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}")
    raise FileNotFoundError(f"{folder} holds no {what}: looked for {', '.join(names)}")
