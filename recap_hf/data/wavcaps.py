"""WavCaps: JSON files (`{"data": [{"id", "caption", ...}]}`) beside folders of FLAC files named by id."""

from __future__ import annotations

from pathlib import Path

from .files import AudioIndex, read_table
from .options import LoadOptions
from .schema import CaptionData, ClipRecord, Problem, build_caption_data, require_columns

LICENCE = "WavCaps (academic use only)"
_EXPECTED = {"id": "id of the clip, its file name without extension", "caption": "the caption"}


def load_wavcaps(options: LoadOptions) -> CaptionData:
    """Every JSON below `data_dir` (or the one file that it names); WavCaps has one split, train.

    Raises:
        ValueError: for another split.
    """
    if options.split != "train":
        raise ValueError(f"WavCaps has no {options.split} split, only train")
    root = Path(options.data_dir)
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{root} holds no WavCaps JSON file (such as json_files/BBC_Sound_Effects/bbc_final.json)"
        )
    audio = None
    if options.needs_audio:
        audio = AudioIndex(Path(options.audio_dir) if options.audio_dir else (root.parent if root.is_file() else root))
    records, problems = [], []
    for file in files:
        table = read_table(file, field="data", mapping=options.columns)
        require_columns(table.column_names, _EXPECTED, str(file))
        for row in table:
            clip_id = str(row["id"])
            path = audio.find(clip_id) if audio else None
            if audio and path is None:
                problems.append(Problem(clip_id, "missing", f"no audio file of id {clip_id} ({file.name})"))
                continue
            source = f"wavcaps-{file.stem.removesuffix('_final')}"
            records.append(ClipRecord(clip_id, path, [row["caption"] or ""], "train", source, LICENCE))
    return build_caption_data(records, problems)
