"""Tables of captions, as people and this package write them: text, CSV, TSV, JSON, JSON lines and Parquet."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recap_hf.modeling.retrieval_recap import CAPTION_SUFFIXES

# Columns of the package's own results, which say nothing of a caption in a datastore.
RESULT_COLUMNS = frozenset({"score", "row", "retrieved", "candidates", "similarity"})


def read_captions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a table of captions; see [`read_rows`] for the kinds of files.

    Returns:
        `list[dict]`: one record per caption: `caption` and the other cells of its row. A row gives the captions in
            its columns `caption`, `captions` and `caption_1`, `caption_2`, ...; rows without one give none.

    Raises:
        `OSError`, `ValueError`: see [`read_rows`]; also for a table without a column of captions, or without captions.
    """
    records = []
    for number, row in enumerate(read_rows(path), start=1):
        columns = caption_columns(row)
        if not columns:
            wanted = "expected a text under 'caption', 'captions' or 'caption_1', ..."
            raise ValueError(f"{path}, row {number}: {wanted}, found the columns {', '.join(map(str, row))}.")
        rest = {key: row[key] for key in row if row[key] is not None and key not in RESULT_COLUMNS.union(columns)}
        records += [{"caption": text, **rest} for text in captions_in(row, columns)]
    if not records:
        raise ValueError(f"{path}: holds no captions.")
    return records


def caption_columns(row: Iterable[str]) -> list[str]:
    """Columns that hold captions: `captions`, `caption`, and `caption_1`, `caption_2`, ... by number."""
    numbered = sorted((int(name[8:]), name) for name in row if name.startswith("caption_") and name[8:].isdigit())
    return [name for name in ("captions", "caption") if name in row] + [name for _, name in numbered]


def captions_in(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The captions in some columns of a row; each is a text or a list of texts."""
    values = [each for name in columns for each in (row[name] if isinstance(row[name], list) else [row[name]])]
    texts = [None if is_missing(value) else value for value in values]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"Expected captions as texts, got {values!r:.200}.")
    return [text for text in texts if text is not None]


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, white space or not a number ("nan", as tables without a value are saved)."""
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def read_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The rows of a table, one after the other (JSON is read as a whole). Missing cells are `None`.

    Args:
        path: `.txt` with a caption a line; `.csv` or `.tsv` with the column names in the first line; `.jsonl` with
            an object or a text a line; `.json` with a list of them, an object with that list under `data`, `rows`,
            `predictions` or `clips`, or an object of lists, the columns; `.parquet`.

    Raises:
        OSError: there is no such file. ValueError: for another suffix, text that is not UTF-8 and what does
            not parse, with the line; a row with more or fewer cells than the first line is refused.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in CAPTION_SUFFIXES:
        raise ValueError(f"{path}: captions are read from {', '.join(CAPTION_SUFFIXES)} files, not from {suffix!r}.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of captions.")
    try:
        for row in _parquet_rows(path) if suffix == ".parquet" else _text_rows(path, suffix):
            yield {str(name): None if is_missing(value) else value for name, value in row.items()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error


def _text_rows(path: Path, suffix: str) -> Iterator[Mapping[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if suffix == ".txt":
            yield from ({"caption": line.strip()} for line in file if line.strip())
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True))
        elif suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _as_row(_parse_json(line, f"{path}, line {number}"), f"{path}, line {number}")
        else:
            items = _json_rows(_parse_json(file.read(), str(path)), path)
            yield from (_as_row(item, f"{path}, entry {number}") for number, item in enumerate(items, start=1))


def _json_rows(content: Any, path: Path) -> list[Any]:
    if isinstance(content, Mapping):
        lists = {name: value for name, value in content.items() if isinstance(value, list)}
        keys = ("rows", "predictions", "clips")
        tables = [lists[key] for key in keys if isinstance((lists.get(key) or [""])[0], Mapping)]
        if "data" in lists or tables:
            return lists.get("data") or (tables[0] if tables else [])
        if content and len(lists) == len(content):
            lengths = {name: len(column) for name, column in lists.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"{path}: expected columns of one length, got {lengths}.")
            return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    if not isinstance(content, list):
        kinds = "a list, an object with one under data, rows, predictions or clips, or an object of columns"
        raise ValueError(f"{path}: expected {kinds}.")
    return content


def _csv_rows(path: Path, reader: Any) -> Iterator[Mapping[str, Any]]:
    names: list[str] | None = None
    while True:
        # A row may have several lines: its first one is named.
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            hint = "A text that begins with a double quote must end with one; a quote inside it is written twice."
            raise ValueError(f"{path}, line {line}: not readable ({error}). {hint}") from error
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = cells
            repeated = [name for name in names if name and names.count(name) > 1]
            if repeated:
                raise ValueError(f"{path}: expected each column once, got {repeated[0]!r} more than once.")
        elif len(cells) != len(names):
            wanted = f"expected {len(names)} cells, as in the first line, got {len(cells)}."
            hint = "Put a text that contains the separator into double quotes."
            raise ValueError(f"{path}, line {line}: {wanted} {hint}")
        else:
            yield {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as JSON ({error}).") from error


def _as_row(item: Any, where: str) -> Mapping[str, Any]:
    if isinstance(item, (str, Mapping)):
        return {"caption": item} if isinstance(item, str) else item
    raise ValueError(f"{where}: expected an object or a text, got {item!r:.80}.")


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs PyArrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not readable as Parquet ({error}).") from error
