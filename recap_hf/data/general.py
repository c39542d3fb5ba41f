"""Your own data: a folder of audio with a metadata file, or a dataset of the Hub, with columns as you name them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .caption_tables import caption_columns
from .files import find_one, read_table, renamed
from .schema import (
    SPLITS,
    CaptionData,
    ClipRecord,
    LoadOptions,
    build_caption_data,
    canonical_split,
    class_columns,
    require_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "metadata.tsv")


def load_audiofolder(options: LoadOptions) -> CaptionData:
    """Clips of one split: `<data_dir>/<split>/metadata.*`, or `<data_dir>/metadata.*` with a column `split`.

    A metadata file at the top without such a column is the training split. Further columns that are read where
    present: `clip_id`, `captions` or `caption_1`, `caption_2`, ..., `source`, `licence` (or `license`),
    `classes` and `class_scores`.

    Raises:
        ValueError: for missing columns or a split that is not there.
    """
    folder = Path(options.data_dir)
    places = [f"{part}/{name}" for part in SPLITS[options.split] for name in _METADATA]
    table = find_one(folder, [*places, *_METADATA], "metadata file")
    split_is_column = table in (folder, folder / table.name)
    rows = read_table(table, {}, options.columns)
    _require(rows[0], {"file_name": "path of the audio file, from the metadata file"}, table)
    if split_is_column and "split" not in rows[0] and options.split != "train":
        hint = f"add the column, or put the clips in {folder}/{options.split}/ with a metadata file of their own"
        problem = f"{table} has no column 'split', so all of it is training data"
        raise ValueError(f"{problem}: for a {options.split} split {hint}")
    root = Path(options.audio_dir or table.parent)
    records = []
    for row in rows:
        if split_is_column and row.get("split") and canonical_split(row["split"]) != options.split:
            continue
        path = root / row["file_name"]
        clip_id = row.get("clip_id") or row["file_name"]
        audio = str(path) if path.is_file() else None
        records.append(_record(row, clip_id, audio, folder.resolve().name, f"no audio file {path}"))
    return build_caption_data(records, options)


def load_caption_list(path: Path, options: LoadOptions) -> CaptionData:
    """Captions without audio, of a datastore or of a file (see `read_rows`), as the training split.

    Raises:
        ValueError: for another split, or if recordings are needed.
    """
    if options.needs_audio or options.split != "train":
        wanted = "recordings" if options.needs_audio else f"{options.split} split"
        raise ValueError(f"{path} holds captions to train on, and no {wanted}")
    is_table = path.is_file()
    rows = read_table(path, {}, options.columns) if is_table else CaptionDatastore.from_pretrained(path).records
    _require(rows[0], {}, path)
    named = ((row.get("clip_id") or f"caption-{number}", row) for number, row in enumerate(rows))
    return build_caption_data((_record(row, clip_id, None, path.name, "") for clip_id, row in named), options)


def load_hub_dataset(name: str, options: LoadOptions) -> CaptionData:
    """Clips of one split of `name` (a Hub id with an optional `:config`, or a folder that `load_dataset` reads)."""
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = name.partition(":") if not Path(name).exists() else (name, "", "")
    data_dir = options.data_dir
    present = get_dataset_split_names(path, config_name=config or None, data_dir=data_dir)
    split = next((spelling for spelling in SPLITS[options.split] if spelling in present), None)
    if split is None:
        raise ValueError(f"{name} has the splits {', '.join(present)}: none of them is a {options.split} split")
    return from_dataset(load_dataset(path, config or None, data_dir=data_dir, split=split), options, source=name)


def from_dataset(table: "Dataset", options: LoadOptions, source: str) -> CaptionData:
    """A `datasets.Dataset` as caption data; audio is not decoded (path or bytes).

    Optional columns: `clip_id`, `source`, `licence` or `license`, `classes` and `class_scores`; without `clip_id`, the
    audio's file name is the id, and without that the row number.
    """
    from datasets import Audio

    expected, columns = {}, dict(options.columns or {})
    if options.needs_audio:
        expected = {"audio": "an Audio column"}
    else:
        columns.pop("audio", None)
        table = table.remove_columns([name for name, kind in table.features.items() if isinstance(kind, Audio)])
    names = next(renamed([dict.fromkeys(table.column_names)], table.column_names, columns, source))
    _require(names, expected, source)
    if options.needs_audio:
        table = table.cast_column(columns.get("audio", "audio"), Audio(decode=False))
    records = []
    for number, row in enumerate(renamed(table, table.column_names, columns, source)):
        audio = (row.get("audio") if options.needs_audio else None) or {}
        there = audio.get("bytes") is not None or Path(audio.get("path") or "").is_file()
        clip_id = Path(str(row.get("clip_id") or audio.get("path") or f"{source}-{number}")).name
        wanted = f"{source}: row {number} has no audio"
        records.append(_record(row, clip_id, audio if there else None, source, wanted))
    return build_caption_data(records, options)


def _require(names: Iterable[str], expected: dict[str, str], where: str | Path) -> None:
    found = [*names, *(["caption"] if caption_columns(names) else [])]
    require_columns(found, expected | {"caption": "the caption, or a list of them"}, str(where))


def _record(row: Mapping[str, Any], clip_id: str, audio: Any, source: str, wanted: str) -> ClipRecord:
    """A clip of a row; of several columns of captions only the first may not be empty."""
    values = [row[name] if isinstance(row[name], list) else [row[name]] for name in caption_columns(row)]
    captions = values[0] + [text for value in values[1:] for text in value if text and text.strip()]
    licence = row.get("licence") or row.get("license")
    classes = class_columns(row, f"{source}: {clip_id}")
    return ClipRecord(clip_id, audio, captions, str(row.get("source") or source), licence, wanted, *classes)
