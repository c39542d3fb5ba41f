"""Files of captions, and every form in which a datastore can be given."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .retrieval_recap import MANIFEST_NAME, CaptionDatastore

CAPTION_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json")


def read_captions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a file of captions.

    Args:
        path: `.txt` with one caption a line (empty lines are skipped); `.csv` or `.tsv` with a column `caption`;
            `.jsonl` with objects or texts, one a line; `.json` with a list of objects or texts.

    Returns:
        `list[dict]`: one record per caption: `caption` and what stands beside it.

    Raises:
        `ValueError`: on another suffix, a missing column, text that is not UTF-8, or a file without captions.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in CAPTION_SUFFIXES:
        raise ValueError(f"{path}: captions are read from {', '.join(CAPTION_SUFFIXES)} files, not from {suffix!r}.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix == ".txt":
                items: list[Any] = [line.strip() for line in file]
            elif suffix in (".csv", ".tsv"):
                items = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
            elif suffix == ".jsonl":
                items = [json.loads(line) for line in file if line.strip()]
            else:
                items = json.load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error
    except (json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as {suffix[1:].upper()} ({error}).") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of captions, got a {type(items).__name__}.")
    records = [_record(path, number, item) for number, item in enumerate(items, start=1)]
    records = [record for record in records if record["caption"].strip()]
    if not records:
        raise ValueError(f"{path}: holds no captions.")
    return records


def _record(path: Path, number: int, item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        return {"caption": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("caption"), str):
        found = f"the columns {', '.join(map(str, item))}" if isinstance(item, Mapping) else repr(item)[:80]
        raise ValueError(f"{path}, entry {number}: expected a text under 'caption', found {found}.")
    return {str(key): value for key, value in item.items() if value not in (None, "")} | {"caption": item["caption"]}


def open_datastore(source: Any, model: Any, processor: Any) -> CaptionDatastore:
    """A datastore out of whatever names one.

    Args:
        source: a [`CaptionDatastore`], a folder or Hub id of one, a file of captions, or a list of captions.
        model, processor: embed the captions of a file or a list.
    """
    if isinstance(source, (list, tuple)):
        return CaptionDatastore.from_captions(source, model, processor)
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if path.is_file():
        return CaptionDatastore.from_captions(read_captions(path), model, processor)
    if path.suffix.lower() in CAPTION_SUFFIXES and not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file of captions.")
    if path.is_dir() and not (path / MANIFEST_NAME).is_file() and (path / "datastore" / MANIFEST_NAME).is_file():
        # A checkpoint folder stands for the datastore inside it.
        path = path / "datastore"
    return CaptionDatastore.from_pretrained(path if path.is_dir() else str(source))


__all__ = ["CAPTION_SUFFIXES", "open_datastore", "read_captions"]
