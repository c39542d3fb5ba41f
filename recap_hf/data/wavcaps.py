"""WavCaps: JSON files (`{"data": [{"id", "caption", ...}]}`) beside folders of FLAC files named by id."""

from __future__ import annotations

from pathlib import Path

from .files import AudioIndex, read_table
from .schema import CaptionData, ClipRecord, LoadOptions, build_caption_data, require_columns

LICENCE = "WavCaps (academic use only)"
_EXPECTED = {"id": "id of the clip, its file name without extension", "caption": "the caption"}


def load_wavcaps(options: LoadOptions) -> CaptionData:
    """Every JSON below `data_dir` (or the file that it is); WavCaps has one split, train.

    Raises:
        ValueError: for another split.
    """
    if options.split != "train":
        raise ValueError(f"WavCaps has no {options.split} split, only train")
    root = Path(options.data_dir)
    files = [root] if root.is_file() else sorted(root.rglob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{root} holds no WavCaps JSON file (such as json_files/BBC_Sound_Effects/bbc_final.json)"
        )
    folder = options.audio_dir or (root.parent if root.is_file() else root)
    audio = AudioIndex(Path(folder)) if options.needs_audio else None
    records = []
    for file in files:
        table = read_table(file, field="data", mapping=options.columns)
        require_columns(table.column_names, _EXPECTED, str(file))
        source = f"wavcaps-{file.stem.removesuffix('_final')}"
        for row in table:
            clip_id = str(row["id"])
            path = audio.find(clip_id) if audio else None
            missing = f"no audio file of id {clip_id} ({file.name})" if audio and not path else None
            records.append(ClipRecord(clip_id, path, [row["caption"]], "train", source, LICENCE, missing))
    return build_caption_data(records)
