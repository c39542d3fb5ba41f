"""Any `datasets` dataset with audio and captions, from the Hub or a local folder, under a column mapping."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .audiofolder import captions_of, find_caption_columns
from .files import rename_mapped
from .schema import SPLITS, CaptionData, ClipRecord, LoadOptions, build_caption_data, require_columns

if TYPE_CHECKING:
    from datasets import Dataset

_EXPECTED = {"audio": "an Audio column", "caption": "the caption, or a list of captions"}


def load_hub_dataset(name: str, options: LoadOptions) -> CaptionData:
    """Clips of one split of `name` (a Hub id with an optional `:config`, or a folder that `load_dataset` reads)."""
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = name.partition(":") if not Path(name).exists() else (name, "", "")
    arguments = {"name": config or None, "data_dir": options.data_dir}
    present = get_dataset_split_names(path, config_name=arguments["name"], data_dir=options.data_dir)
    split = next((spelling for spelling in SPLITS[options.split] if spelling in present), None)
    if split is None:
        raise ValueError(f"{name} has the splits {', '.join(present)}: none of them is a {options.split} split")
    return from_dataset(load_dataset(path, split=split, **arguments), options, source=name)


def from_dataset(table: Dataset, options: LoadOptions, source: str) -> CaptionData:
    """A `datasets.Dataset` in memory as caption data: undecoded audio is not decoded (path or bytes).

    Optional columns: `clip_id`, `source`, `licence` or `license`; without `clip_id`, the audio's file
    name is the id, and without that the row number.
    """
    from datasets import Audio

    table = rename_mapped(table, options.columns, source)
    caption_columns = find_caption_columns(table.column_names)
    found = [*table.column_names, *(["caption"] if caption_columns else [])]
    expected = _EXPECTED if options.needs_audio else {"caption": _EXPECTED["caption"]}
    require_columns(found, expected, source)
    if options.needs_audio:
        table = table.cast_column("audio", Audio(decode=False))
    else:
        table = table.select_columns([name for name in table.column_names if name != "audio"])
    records = []
    for number, row in enumerate(table):
        audio = row.get("audio")
        clip_id = row.get("clip_id") or (audio or {}).get("path") or f"{source}-{number}"
        clip_id = Path(str(clip_id)).name
        missing = f"{source}: row {number} has no audio" if options.needs_audio and not _has_audio(audio) else None
        licence = row.get("licence") or row.get("license")
        captions, named = captions_of(row, caption_columns), str(row.get("source") or source)
        records.append(ClipRecord(clip_id, audio, captions, options.split, named, licence, missing))
    return build_caption_data(records)


def _has_audio(audio: dict | None) -> bool:
    if not audio:
        return False
    return audio.get("bytes") is not None or (audio.get("path") is not None and Path(audio["path"]).is_file())
