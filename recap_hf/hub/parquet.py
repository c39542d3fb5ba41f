"""The captions of a datastore as Parquet, so that `load_dataset` and the Hub's viewer show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

FIRST_COLUMNS = ("caption", "clip_id", "source", "licence")
ROWS_PER_FILE = 1_000_000
PATTERN = "train-*.parquet"


def write_parquet(
    records: Sequence[Mapping[str, Any]], folder: str | Path, rows_per_file: int = ROWS_PER_FILE
) -> list[str]:
    """Writes the rows of a datastore as Parquet files; the same rows give the same bytes.

    Args:
        records: one mapping per caption; keys that only some of them have are null in the others.
        folder: made if need be.
        rows_per_file: rows of one file.

    Returns:
        The columns: `caption` first, then those with a meaning of their own, then the others by name.
    """
    import pyarrow.parquet

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {key for record in records for key, value in record.items() if value is not None}
    columns = [name for name in FIRST_COLUMNS if name in found]
    columns += sorted(found - set(FIRST_COLUMNS))
    table = pyarrow.table({name: as_array([record.get(name) for record in records]) for name in columns})
    number = max(1, -(-len(records) // rows_per_file))
    for part in range(number):
        path = folder / PATTERN.replace("*", f"{part:05d}-of-{number:05d}")
        pyarrow.parquet.write_table(table.slice(part * rows_per_file, rows_per_file), path)
    return columns


def as_array(values: Sequence[Any]) -> pyarrow.Array:
    """A column; values that have no common type are written as JSON texts."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        texts = [None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
        return pyarrow.array(texts, pyarrow.string())
