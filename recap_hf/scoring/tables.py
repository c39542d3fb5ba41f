"""Predictions with their references, from tables in the usual layouts."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import tokenize
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recap_hf.data.caption_tables import read_captions, read_rows

from .clips import ID_COLUMNS

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
        columns = (self.predictions, self.references, self.clip_ids, self.retrieved)
        picked = [column and [column[position] for position in positions] for column in columns]
        numbers = {name: [values[position] for position in positions] for name, values in self.numbers.items()}
        return PredictionTable(*picked, numbers, list(self.notes))


def read_predictions(
    path: str | os.PathLike,
    *,
    prediction: str | None = None,
    references: Sequence[str] | None = None,
    clip_id: str | None = None,
    retrieved: str | None = None,
    numbers: Sequence[str] = (),
) -> PredictionTable:
    """Reads predictions and references from a table.

    Several rows of one clip with the same prediction (one reference per row) become one clip with several references.

    Args:
        path: a file that [`recap_hf.data.caption_tables.read_rows`] reads.
        prediction: column of the captions to score; None, here and below: the usual names are looked for.
        references: one column of lists, or several columns of captions.
        clip_id: column of the clips' names.
        retrieved: column of the captions in the prompt.
        numbers: further columns of numbers to read.

    Raises:
        ValueError: if the file does not parse, a column is missing, a cell is malformed, or a clip has two
            predictions.
    """
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path} has no row")
    columns = list(rows[0])
    for name in (prediction, *(references or ()), clip_id, retrieved, *numbers):
        if name is not None and name not in columns:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(map(repr, columns))}")
    id_is_named = clip_id is not None
    prediction = prediction or _usual(columns, PREDICTION_COLUMNS, path, "predictions (--prediction-column)")
    if not references:
        references = [_usual(columns, REFERENCE_COLUMNS, path, "references (--references-column)")]
        if references == ["caption_1"]:
            references = [name for name in columns if name.startswith("caption_")]
    clip_id = clip_id or next((name for name in ID_COLUMNS if name in columns and name not in references), None)
    retrieved = retrieved or ("retrieved" if "retrieved" in columns else None)
    needed = [name for name in (prediction, *references, clip_id, retrieved, *numbers) if name is not None]

    table = PredictionTable([], [], clip_id and [], retrieved and [], {name: [] for name in numbers})
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        absent = [name for name in needed if name not in row]
        if absent:
            raise ValueError(f"{where} has no {absent[0]!r}")
        table.predictions.append(_text(row[prediction] or "", f"{where}, column {prediction!r}"))
        cells = [parse_references(row[name] or "", f"{where}, column {name!r}") for name in references]
        table.references.append([text for cell in cells for text in cell if text.strip()])
        if not table.references[-1]:
            raise ValueError(f"{where} has no reference caption in {', '.join(map(repr, references))}")
        if clip_id:
            table.clip_ids.append(str(row[clip_id]))
        if retrieved:
            table.retrieved.append(parse_references(row[retrieved] or "", f"{where}, column {retrieved!r}"))
        for name, values in table.numbers.items():
            values.append(_number(row[name], f"{where}, column {name!r}"))
    return _merge_rows(table, path, id_is_named) if clip_id else table


def _usual(columns: Sequence[str], names: Sequence[str], path: str | os.PathLike, what: str) -> str:
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise ValueError(f"{path} has the columns {', '.join(map(repr, columns))}; name the one with the {what}")
    return found


def _merge_rows(table: PredictionTable, path: str | os.PathLike, id_is_named: bool) -> PredictionTable:
    """One row per clip, with the references of all its rows."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, clip_id in enumerate(table.clip_ids):
        rows_of[clip_id].append(row)
    for clip_id, rows in rows_of.items():
        if len({table.predictions[row] for row in rows}) > 1:
            if not id_is_named:
                # The column merely looked like one of names.
                table.clip_ids = None
                return table
            numbers = ", ".join(str(row + 1) for row in rows)
            raise ValueError(f"{path}: the clip {clip_id!r} has different predictions in the rows {numbers}")
    merged = table.select([rows[0] for rows in rows_of.values()])
    merged.references = [[text for row in rows for text in table.references[row]] for rows in rows_of.values()]
    return merged


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
    """Captions alone, such as those of a training set, from any file of captions; see [`recap_hf.read_captions`].

    Raises:
        ValueError: if there is none.
    """
    records = read_captions(path)
    return [text for record in records for text in parse_references(record["caption"], str(path)) if text.strip()]
