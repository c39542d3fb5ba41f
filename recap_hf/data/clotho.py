"""Clotho as its authors publish it: `clotho_captions_{development,validation,evaluation}.csv` beside audio folders."""

from __future__ import annotations

from pathlib import Path

from .files import AudioIndex, first_existing, read_table
from .options import LoadOptions
from .schema import CaptionData, ClipRecord, Problem, build_caption_data, require_columns

PUBLISHED_SPLITS = {"train": "development", "validation": "validation", "test": "evaluation"}
LICENCE = "Tampere University licence (attribution, non-commercial)"
_CAPTIONS = [f"caption_{number}" for number in range(1, 6)]


def load_clotho(options: LoadOptions) -> CaptionData:
    """Clips of one split, five captions each. Audio lies in `development/`, `clotho_audio_development/` or beside."""
    split = PUBLISHED_SPLITS[options.split]
    folder = Path(options.data_dir)
    table_name = first_existing(
        folder,
        [f"clotho_captions_{split}.csv", f"{split}.csv", f"clotho_captions_{options.split}.csv"],
        "caption file",
    )
    table = read_table(table_name, mapping=options.columns)
    expected = {"file_name": "name of the audio file"} | {"caption_1": "first of up to five captions"}
    require_columns(table.column_names, expected, str(table_name))
    audio = None
    if options.needs_audio:
        places = [split, f"clotho_audio_{split}", f"audio/{split}", f"clotho_audio_{split}/{split}", "audio"]
        audio = AudioIndex(options.audio_dir or first_existing(folder, places, "audio folder"))
    captions = [name for name in _CAPTIONS if name in table.column_names]
    records, problems = [], []
    for row in table:
        path = audio.find(row["file_name"]) if audio else None
        if audio and path is None:
            problems.append(Problem(row["file_name"], "missing", f"no audio file {row['file_name']}"))
            continue
        texts = [row[name] for name in captions]
        records.append(ClipRecord(row["file_name"], path, texts, options.split, "clotho", LICENCE))
    return build_caption_data(records, problems)
