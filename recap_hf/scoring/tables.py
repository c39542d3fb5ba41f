"""Predictions and references from CSV, JSON and JSONL files, in all the shapes in which people keep them."""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .clips import ID_COLUMNS

PREDICTION_COLUMNS = ("prediction", "predictions", "caption", "cands", "hypothesis", "generated")
REFERENCE_COLUMNS = ("references", "captions", "mrefs", "caption_1")


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
            rows = list(csv.DictReader(handle, delimiter=delimiter))
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


def parse_references(cell: Any, where: str) -> list[str]:
    """References from one cell: a list, a list written as JSON or Python, or one caption.

    Raises:
        ValueError: for a list that does not parse, and for one without commas, which Python would read as one caption.
    """
    if isinstance(cell, (list, tuple)):
        return [_text(item, where) for item in cell]
    text = _text(cell, where).strip()
    if not text.startswith("["):
        return [text] if text else []
    try:
        return [_text(item, where) for item in json.loads(text)]
    except json.JSONDecodeError:
        pass
    try:
        parsed = ast.literal_eval(text)
        strings = sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as error:
        if text[1:].lstrip()[:1] not in ("'", '"'):
            return [text]  # a caption that begins with a bracket, such as "[music] a band plays"
        raise ValueError(f"{where}: a list of captions that is neither JSON nor Python: {text[:80]!r}") from error
    if not isinstance(parsed, list):
        return [text]
    if strings != len(parsed):
        raise ValueError(f"{where}: captions without commas between them (a printed NumPy array?): {text[:80]!r}")
    return [_text(item, where) for item in parsed]


def _text(value: Any, where: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("caption"), str):
        return value["caption"]
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}; expected text")
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} is {value!r}; expected a number")
    return number


@dataclass
class PredictionTable:
    """Predictions with their references, read from a file.

    Attributes:
        predictions: one caption a clip.
        references: the references of each clip.
        clip_ids: names of the clips; None where the file has none.
        retrieved: the captions of each clip's prompt; None where the file has none.
        numbers: further columns of numbers by name.
        notes: what a reader of the figures should know.
    """

    predictions: list[str]
    references: list[list[str]]
    clip_ids: list[str] | None = None
    retrieved: list[list[str]] | None = None
    numbers: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.predictions)

    def select(self, positions: Sequence[int]) -> PredictionTable:
        """The table of the clips at `positions`, in that order."""

        def pick(values):
            return None if values is None else [values[position] for position in positions]

        return replace(
            self,
            predictions=pick(self.predictions),
            references=pick(self.references),
            clip_ids=pick(self.clip_ids),
            retrieved=pick(self.retrieved),
            numbers={name: pick(values) for name, values in self.numbers.items()},
            notes=list(self.notes),
        )


def read_predictions(
    path: str | os.PathLike,
    prediction_column: str | None = None,
    references_columns: Sequence[str] | None = None,
    id_column: str | None = None,
    retrieved_column: str | None = None,
    number_columns: Sequence[str] = (),
) -> PredictionTable:
    """Reads predictions and references; columns that are not named are looked for under the usual names.

    Several rows of one clip with the same prediction (one reference a row) become one clip with several references.

    Raises:
        ValueError: if a column is missing, a cell is malformed, or one clip has two predictions.
    """
    rows = read_rows(path)
    columns = list(rows[0])
    prediction = _column(prediction_column, PREDICTION_COLUMNS, columns, path, "--prediction-column", "predictions")
    chosen = list(references_columns or [])
    if not chosen:
        chosen = [_column(None, REFERENCE_COLUMNS, columns, path, "--references-column", "references")]
        if chosen == ["caption_1"]:
            chosen = [name for name in columns if name.startswith("caption_")]
    for name in chosen + [name for name in (id_column, retrieved_column, *number_columns) if name]:
        _require(name, columns, path)
    identifier = id_column or next((name for name in ID_COLUMNS if name in columns and name not in chosen), None)
    retrieved = retrieved_column or ("retrieved" if "retrieved" in columns else None)
    table = PredictionTable([], [], [], [] if retrieved else None, {name: [] for name in number_columns})
    for number, row in enumerate(rows, 1):
        _add_row(table, row, f"{path}: row {number}", prediction, chosen, identifier, retrieved)
    if identifier is None:
        table.clip_ids = None
        return table
    return _merge_rows(table, path, explicit=id_column is not None)


def _add_row(
    table: PredictionTable,
    row: dict[str, Any],
    where: str,
    prediction: str,
    references: list[str],
    identifier: str | None,
    retrieved: str | None,
) -> None:
    for name in (prediction, *references, identifier, retrieved, *table.numbers):
        if name is not None and name not in row:
            raise ValueError(f"{where} has no {name!r}")
    table.predictions.append(_text(row[prediction], f"{where}, column {prediction!r}"))
    found = []
    for name in references:
        found += parse_references(row[name], f"{where}, column {name!r}")
    found = [text for text in found if text.strip()]
    if not found:
        raise ValueError(f"{where} has no reference caption in {', '.join(map(repr, references))}")
    table.references.append(found)
    table.clip_ids.append("" if identifier is None else str(row[identifier]))
    if retrieved is not None:
        table.retrieved.append(parse_references(row[retrieved], f"{where}, column {retrieved!r}"))
    for name, values in table.numbers.items():
        values.append(_number(row[name], f"{where}, column {name!r}"))


def _merge_rows(table: PredictionTable, path: str | os.PathLike, explicit: bool) -> PredictionTable:
    first: dict[str, int] = {}
    kept: list[int] = []
    for number, clip_id in enumerate(table.clip_ids):
        if clip_id not in first:
            first[clip_id] = number
            kept.append(number)
            continue
        if table.predictions[number] != table.predictions[first[clip_id]]:
            if explicit:
                raise ValueError(
                    f"{path}: the clip {clip_id!r} has two predictions (rows {first[clip_id] + 1} and {number + 1})"
                )
            # A column that merely looked like one of names.
            table.clip_ids = None
            return table
        table.references[first[clip_id]] = table.references[first[clip_id]] + table.references[number]
    return table.select(kept)


def _column(
    given: str | None, usual: Sequence[str], columns: list[str], path: str | os.PathLike, flag: str, what: str
) -> str:
    if given is not None:
        _require(given, columns, path)
        return given
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise ValueError(
            f"{path} has the columns {', '.join(map(repr, columns))}; name the one with the {what} ({flag})"
        )
    return found


def _require(name: str, columns: list[str], path: str | os.PathLike) -> None:
    if name not in columns:
        raise ValueError(f"{path} has no column {name!r}; it has {', '.join(map(repr, columns))}")


def read_captions(path: str | os.PathLike, columns: Sequence[str] | None = None) -> list[str]:
    """Captions alone, such as those of a training set: a text file with one a line, or columns of a table.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        captions = path.read_text(encoding="utf-8-sig").splitlines()
    else:
        rows = read_rows(path)
        chosen = list(columns or [name for name in rows[0] if name in ("caption", "captions")])
        chosen = chosen or [name for name in rows[0] if name.startswith("caption_")]
        if not chosen:
            raise ValueError(f"{path} has the columns {', '.join(map(repr, rows[0]))}; expected caption or captions")
        captions = [
            text for row in rows for name in chosen for text in parse_references(row[name], f"{path}, {name!r}")
        ]
    captions = [text.strip() for text in captions if text.strip()]
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions
