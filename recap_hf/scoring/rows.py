"""Rows of tables: CSV, TSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSON or JSONL file as dictionaries.

    JSON may be a list of objects, an object of lists (columns), or an object with one of them under `rows`,
    `predictions`, `clips` or `data`.

    Raises:
        ValueError: if the file is of another kind, malformed or empty.
    """
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            rows = _read_csv(path, "\t" if kind == ".tsv" else ",")
        elif kind in (".jsonl", ".ndjson"):
            # Not splitlines: a caption may hold a line separator other than \n.
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        elif kind == ".json":
            rows = _rows_of(json.loads(path.read_text(encoding="utf-8-sig")), path)
        else:
            raise ValueError(f"{path}: expected a .csv, .tsv, .json or .jsonl file")
    except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not read as {kind[1:].upper()}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no row")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected one object a row, with the columns as its keys")
    return rows


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(before)
    ragged = next((number for number, row in enumerate(rows, 1) if None in row or None in row.values()), None)
    if ragged:
        raise ValueError(f"{path}: row {ragged} has another number of cells than the first line has columns")
    return rows


def _rows_of(content: Any, path: Path) -> list[dict[str, Any]]:
    if isinstance(content, dict):
        for key in ("rows", "predictions", "clips", "data"):
            if isinstance(content.get(key), list) and content[key] and isinstance(content[key][0], dict):
                return content[key]
        if content and all(isinstance(values, list) for values in content.values()):
            lengths = {key: len(values) for key, values in content.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"{path}: its columns have different lengths: {lengths}")
            return [dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)]
    if isinstance(content, list):
        return content
    raise ValueError(f"{path}: expected a list of objects or an object of lists")
