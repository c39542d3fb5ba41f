"""Predictions with their references, from tables in the usual layouts."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .clips import ID_COLUMNS
from .rows import read_rows

PREDICTION_COLUMNS = ("prediction", "predictions", "caption", "cands", "hypothesis", "generated")
REFERENCE_COLUMNS = ("references", "captions", "mrefs", "caption_1")


@dataclass
class PredictionTable:
    """Predictions with their references, read from a file.

    Attributes:
        predictions: one caption per clip.
        references: the references of each clip.
        clip_ids: names of the clips; None if the file has none.
        retrieved: the captions in each clip's prompt; None if the file has none.
        numbers: further columns of numbers, by name.
        notes: remarks for readers of the figures.
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

        columns = ("predictions", "references", "clip_ids", "retrieved")
        picked = {name: pick(getattr(self, name)) for name in columns}
        numbers = {name: pick(values) for name, values in self.numbers.items()}
        return replace(self, **picked, numbers=numbers, notes=list(self.notes))


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what; None: the usual names are looked for.

    Args:
        prediction: the captions to score.
        references: one column of lists, or several columns of captions.
        clip_id: names of the clips.
        retrieved: captions in the prompt.
        numbers: further columns of numbers.
    """

    prediction: str | None = None
    references: Sequence[str] | None = None
    clip_id: str | None = None
    retrieved: str | None = None
    numbers: Sequence[str] = ()


def read_predictions(path: str | os.PathLike, columns: Columns | None = None) -> PredictionTable:
    """Reads predictions and references.

    Several rows of one clip with the same prediction (one reference per row) become one clip with several references.

    Raises:
        ValueError: if a column is missing, a cell is malformed, or a clip has two predictions.
    """
    rows = read_rows(path)
    given = columns or Columns()
    found = _find_columns(given, list(rows[0]), path)
    table = PredictionTable([], [], [], [] if found.retrieved else None, {name: [] for name in found.numbers})
    for number, row in enumerate(rows, 1):
        _add_row(table, row, f"{path}: row {number}", found)
    if found.clip_id is None:
        table.clip_ids = None
        return table
    return _merge_rows(table, path, explicit=given.clip_id is not None)


def _find_columns(given: Columns, names: list[str], path: str | os.PathLike) -> Columns:
    """The columns to read, those that are not given under their usual names."""

    def usual(candidates: Sequence[str], flag: str, what: str) -> str:
        found = next((name for name in candidates if name in names), None)
        if found is None:
            raise ValueError(
                f"{path} has the columns {', '.join(map(repr, names))}; name the one with the {what} ({flag})"
            )
        return found

    for name in (given.prediction, *(given.references or ()), given.clip_id, given.retrieved, *given.numbers):
        if name is not None and name not in names:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(map(repr, names))}")
    prediction = given.prediction or usual(PREDICTION_COLUMNS, "--prediction-column", "predictions")
    references = list(given.references or [usual(REFERENCE_COLUMNS, "--references-column", "references")])
    if not given.references and references == ["caption_1"]:
        references = [name for name in names if name.startswith("caption_")]
    clip_id = given.clip_id or next((name for name in ID_COLUMNS if name in names and name not in references), None)
    retrieved = given.retrieved or ("retrieved" if "retrieved" in names else None)
    return Columns(prediction, references, clip_id, retrieved, given.numbers)


def _add_row(table: PredictionTable, row: dict[str, Any], where: str, columns: Columns) -> None:
    for name in (columns.prediction, *columns.references, columns.clip_id, columns.retrieved, *columns.numbers):
        if name is not None and name not in row:
            raise ValueError(f"{where} has no {name!r}")
    table.predictions.append(_text(row[columns.prediction] or "", f"{where}, column {columns.prediction!r}"))
    cells = [parse_references(row[name] or "", f"{where}, column {name!r}") for name in columns.references]
    references = [text for cell in cells for text in cell if text.strip()]
    if not references:
        raise ValueError(f"{where} has no reference caption in {', '.join(map(repr, columns.references))}")
    table.references.append(references)
    table.clip_ids.append("" if columns.clip_id is None else str(row[columns.clip_id]))
    if columns.retrieved is not None:
        cell = row[columns.retrieved] or ""
        table.retrieved.append(parse_references(cell, f"{where}, column {columns.retrieved!r}"))
    for name, values in table.numbers.items():
        values.append(_number(row[name], f"{where}, column {name!r}"))


def _merge_rows(table: PredictionTable, path: str | os.PathLike, explicit: bool) -> PredictionTable:
    first: dict[str, int] = {}
    for number, clip_id in enumerate(table.clip_ids):
        row = first.setdefault(clip_id, number)
        if row == number:
            continue
        if table.predictions[number] == table.predictions[row]:
            table.references[row] = table.references[row] + table.references[number]
        elif explicit:
            raise ValueError(f"{path}: the clip {clip_id!r} has two predictions (rows {row + 1} and {number + 1})")
        else:
            # A column that merely looked like one of names.
            table.clip_ids = None
            return table
    return table.select(list(first.values()))


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


def read_training_captions(path: str | os.PathLike) -> list[str]:
    """Captions alone, such as those of a training set: a text file with one per line, or a table.

    A table has the column `caption` or `captions`, or the columns `caption_1`, `caption_2`, ...

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        captions = path.read_text(encoding="utf-8-sig").splitlines()
    else:
        rows = read_rows(path)
        names = [name for name in rows[0] if name in ("caption", "captions")]
        names = names or [name for name in rows[0] if name.startswith("caption_")]
        if not names:
            raise ValueError(f"{path} has the columns {', '.join(map(repr, rows[0]))}; expected caption or captions")
        captions = [
            text for row in rows for name in names for text in parse_references(row[name], f"{path}, {name!r}")
        ]
    captions = [text.strip() for text in captions if text.strip()]
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions
