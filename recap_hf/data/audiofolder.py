"""The `audiofolder` convention: a folder of audio with `metadata.csv`, `.jsonl` or `.parquet`, in folders by split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .files import read_table
from .schema import SPLITS, CaptionData, ClipRecord, LoadOptions, build_caption_data, canonical_split, require_columns

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "metadata.tsv")
_EXPECTED = {
    "file_name": "path of the audio file, from the metadata file",
    "caption": "the caption, or a list of them",
}


def load_audiofolder(options: LoadOptions) -> CaptionData:
    """Clips of one split: `<data_dir>/<split>/metadata.*`, or `<data_dir>/metadata.*` with a column `split`.

    A metadata file at the top without such a column is the training split. Further columns that are read where
    present: `clip_id`, `captions` or `caption_1`, `caption_2`, ..., `source`, `licence` (or `license`).

    Raises:
        ValueError: for missing columns or a split that is not there.
    """
    table_name, split_is_column = _find_metadata(Path(options.data_dir), options.split)
    table = read_table(table_name, mapping=options.columns)
    caption_columns = find_caption_columns(table.column_names)
    found = [*table.column_names, *(["caption"] if caption_columns else [])]
    require_columns(found, _EXPECTED, str(table_name))
    if split_is_column and "split" not in table.column_names and options.split != "train":
        raise ValueError(
            f"{table_name} has no column 'split', so all of it is training data: for a {options.split} split add the "
            f"column, or put the clips in {options.data_dir}/{options.split}/ with a metadata file of their own"
        )
    root = Path(options.audio_dir) if options.audio_dir else table_name.parent
    records = []
    for row in table:
        if split_is_column and row.get("split") and canonical_split(row["split"]) != options.split:
            continue
        path = str(root / row["file_name"])
        missing = f"no audio file {path}" if options.needs_audio and not Path(path).is_file() else None
        origin = (row.get("source") or Path(options.data_dir).resolve().name, row.get("licence") or row.get("license"))
        clip_id, audio = row.get("clip_id") or row["file_name"], path if options.needs_audio else None
        captions = captions_of(row, caption_columns)
        records.append(ClipRecord(clip_id, audio, captions, options.split, *origin, missing))
    return build_caption_data(records)


def find_caption_columns(names: list[str]) -> list[str]:
    """Columns that hold captions: `captions`, `caption` and `caption_1`, `caption_2`, ... in order of number."""
    numbered = [name for name in names if name.startswith("caption_") and name[8:].isdigit()]
    return [name for name in ("captions", "caption") if name in names] + sorted(numbered, key=lambda n: int(n[8:]))


def captions_of(row: Mapping, columns: list[str]) -> list[str]:
    """All captions of a row; an empty later column of several is absence, not an empty caption."""
    texts: list[str] = []
    for name in columns:
        value = row[name]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(columns) > 1 and name != columns[0]:
            values = [text for text in values if text and text.strip()]
        texts.extend(text or "" for text in values)
    return texts


def _find_metadata(folder: Path, split: str) -> tuple[Path, bool]:
    if folder.is_file():
        return folder, True
    for spelling in SPLITS[split]:
        for name in _METADATA:
            if (folder / spelling / name).is_file():
                return folder / spelling / name, False
    for name in _METADATA:
        if (folder / name).is_file():
            return folder / name, True
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}")
    raise FileNotFoundError(
        f"{folder} holds no metadata file: looked for {', '.join(_METADATA)} there and in {split}/"
    )
