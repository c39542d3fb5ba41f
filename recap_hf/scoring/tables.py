"""Predictions with their references, from tables in the usual layouts."""

import ast
import io
import json
import math
import os
import tokenize
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from recap_hf.data.caption_tables import read_captions, read_rows

from .clips import ID_COLUMNS

PREDICTION_COLUMNS = ("prediction", "predictions", "caption", "cands", "hypothesis", "generated")
REFERENCE_COLUMNS = ("references", "captions", "mrefs", "caption_1")


def read_predictions(
    path: str | os.PathLike,
    *,
    prediction: str | None = None,
    references: Sequence[str] | None = None,
    clip_id: str | None = None,
    retrieved: str | None = None,
    numbers: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Reads predictions and references from a table.

    Several rows of one clip with the same prediction (one reference per row) become one clip with several references.

    Args:
        path: a file that [`recap_hf.data.caption_tables.read_rows`] reads.
        prediction: column of the captions to score; None, here and below: the usual names are looked for.
        references: one column of lists, or several columns of captions.
        clip_id: column of the clips' names.
        retrieved: column of the captions in the prompt.
        numbers: further columns of numbers to read.

    Returns:
        One dictionary per clip: `prediction`, `references` (a list), the columns of numbers under their names, and if
        the file has them `clip_id` and `retrieved` (a list of captions).

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

    clips = []
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        absent = [name for name in needed if name not in row]
        if absent:
            raise ValueError(f"{where} has no {absent[0]!r}")
        cells = [parse_references(row[name] or "", f"{where}, column {name!r}") for name in references]
        texts = [text for cell in cells for text in cell if text.strip()]
        if not texts:
            raise ValueError(f"{where} has no reference caption in {', '.join(map(repr, references))}")
        clip = {"prediction": _text(row[prediction] or "", f"{where}, column {prediction!r}"), "references": texts}
        if clip_id:
            clip["clip_id"] = str(row[clip_id])
        if retrieved:
            clip["retrieved"] = parse_references(row[retrieved] or "", f"{where}, column {retrieved!r}")
        clips.append(clip | {name: _number(row[name], f"{where}, column {name!r}") for name in numbers})
    return _merge_rows(clips, path, id_is_named) if clip_id else clips


def _usual(columns: Sequence[str], names: Sequence[str], path: str | os.PathLike, what: str) -> str:
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise ValueError(f"{path} has the columns {', '.join(map(repr, columns))}; name the one with the {what}")
    return found


def _merge_rows(rows: list[dict[str, Any]], path: str | os.PathLike, id_is_named: bool) -> list[dict[str, Any]]:
    """One row per clip, with the references of all its rows."""
    rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        rows_of[row["clip_id"]].append(row)
    for clip_id, each in rows_of.items():
        if len({row["prediction"] for row in each}) > 1:
            if not id_is_named:
                # The column merely looked like one of names.
                return [{key: value for key, value in row.items() if key != "clip_id"} for row in rows]
            raise ValueError(f"{path}: the clip {clip_id!r} has different predictions in its {len(each)} rows")
    merged = [(each[0], [text for row in each for text in row["references"]]) for each in rows_of.values()]
    return [{**row, "references": texts} for row, texts in merged]


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
