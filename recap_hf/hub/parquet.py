"""The captions of a datastore as Parquet, so that `load_dataset` and the Hub's viewer show them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

FIRST_COLUMNS = ("caption", "clip_id", "source", "licence")
ROWS_PER_FILE = 1_000_000
PATTERN = "train-*.parquet"
INT64 = range(-(2**63), 2**63)


def write_parquet(
    records: Sequence[Mapping[str, Any]], folder: str | Path, rows_per_file: int = ROWS_PER_FILE
) -> list[str]:
    """Writes the rows of a datastore as Parquet files; the same rows give the same bytes.

    Args:
        records: one mapping per caption; keys that only some of them have are null in the others.
        folder: made if need be.
        rows_per_file: rows of one file; only these are in memory at a time.

    Returns:
        The columns: `caption` first, then those with a meaning of their own, then the others by name.
    """
    import pyarrow.parquet

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    schema = schema_of(records)
    number = max(1, -(-len(records) // rows_per_file))
    for part in range(number):
        rows = records[part * rows_per_file : (part + 1) * rows_per_file]
        columns = [column_of(rows, field) for field in schema]
        path = folder / PATTERN.replace("*", f"{part:05d}-of-{number:05d}")
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path)
    return schema.names


def schema_of(records: Sequence[Mapping[str, Any]]) -> pyarrow.Schema:
    """One type per column for all files; a column without a common type is one of JSON texts."""
    import pyarrow

    kinds: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, value in record.items():
            if value is not None:
                kinds[name].add(kind_of(value))
    types = {
        "str": pyarrow.string(),
        "bool": pyarrow.bool_(),
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
        "list of str": pyarrow.list_(pyarrow.string()),
    }
    names = [name for name in FIRST_COLUMNS if name in kinds]
    names += sorted(set(kinds) - set(FIRST_COLUMNS))
    fields = []
    for name in names:
        found = {"float"} if kinds[name] == {"int", "float"} else kinds[name]
        kind = next(iter(found)) if len(found) == 1 else "json"
        metadata = {"encoding": "json"} if kind not in types else None
        fields.append(pyarrow.field(name, types.get(kind, pyarrow.string()), metadata=metadata))
    return pyarrow.schema(fields)


def kind_of(value: Any) -> str:
    """The kind of a JSON value, as a column's type is chosen by it."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "list of str"
    if isinstance(value, int) and not isinstance(value, bool) and value not in INT64:
        return "json"
    return type(value).__name__


def column_of(rows: Sequence[Mapping[str, Any]], field: pyarrow.Field) -> pyarrow.Array:
    """One column of some rows."""
    import pyarrow

    values = [row.get(field.name) for row in rows]
    if field.metadata:
        values = [None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
    return pyarrow.array(values, field.type)
