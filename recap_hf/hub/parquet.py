"""The captions of a datastore as Parquet, so that `load_dataset` and the Hub's viewer show them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

FIRST_COLUMNS = ("caption", "clip_id", "source", "licence")
ROWS_PER_FILE = 1_000_000
PATTERN = "train-*.parquet"


def write_parquet(records: Sequence, folder: str | Path, rows_per_file: int = ROWS_PER_FILE) -> list[str]:
    """Writes the rows of a datastore as Parquet files; the same rows give the same bytes.

    Args:
        records: one mapping per caption; keys that only some of them have are null in the others.
        folder: made if need be.
        rows_per_file: rows of one file.

    Returns:
        The columns: `caption` first, then those with a meaning of their own, then the others by name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = to_table(records)
    number = max(1, -(-len(records) // rows_per_file))
    for part in range(number):
        path = folder / PATTERN.replace("*", f"{part:05d}-of-{number:05d}")
        pyarrow.parquet.write_table(table.slice(part * rows_per_file, rows_per_file), path)
    return table.column_names


def column_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the columns that hold a value, in the order of `write_parquet`."""
    found = {name for record in records for name, value in record.items() if value is not None}
    return [name for name in FIRST_COLUMNS if name in found] + sorted(found.difference(FIRST_COLUMNS))


def to_table(records: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """The records as columns."""
    names = column_names(records)
    return pyarrow.table([_column([record.get(name) for record in records]) for name in names], names)


def _column(values: list[Any]) -> pyarrow.Array:
    """Values of one column; JSON texts where they have no common type, or one that is neither plain nor a list of
    texts."""
    types = [pyarrow.string(), pyarrow.bool_(), pyarrow.int64(), pyarrow.float64(), pyarrow.list_(pyarrow.string())]
    try:
        column = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        column = None
    if column is not None and column.type in types:
        return column
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
    return pyarrow.array(texts, pyarrow.string())
