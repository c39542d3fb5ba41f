"""Clotho as published: `clotho_captions_{development,validation,evaluation}.csv` beside folders of audio."""

from __future__ import annotations

from pathlib import Path

from .files import AudioIndex, first_existing, read_table
from .schema import CaptionData, ClipRecord, LoadOptions, build_caption_data, require_columns

PUBLISHED_SPLITS = {"train": "development", "validation": "validation", "test": "evaluation"}
LICENCE = "Tampere University licence (attribution, non-commercial)"


def load_clotho(options: LoadOptions) -> CaptionData:
    """Clips of one split, five captions each. Audio is in `development/`, `clotho_audio_development/` or beside."""
    split, folder = PUBLISHED_SPLITS[options.split], Path(options.data_dir)
    names = [f"clotho_captions_{split}.csv", f"{split}.csv", f"clotho_captions_{options.split}.csv"]
    path = first_existing(folder, names, "caption file")
    table = read_table(path, mapping=options.columns)
    expected = {"file_name": "name of the audio file", "caption_1": "first of up to five captions"}
    require_columns(table.column_names, expected, str(path))
    audio = None
    if options.needs_audio:
        places = [split, f"clotho_audio_{split}", f"audio/{split}", f"clotho_audio_{split}/{split}", "audio"]
        audio = AudioIndex(options.audio_dir or first_existing(folder, places, "audio folder"))
    captions = [name for name in (f"caption_{number}" for number in range(1, 6)) if name in table.column_names]
    records = []
    for row in table:
        name = row["file_name"]
        found = audio.find(name) if audio else None
        missing = f"no audio file {name}" if audio and not found else None
        texts = [row[column] for column in captions]
        records.append(ClipRecord(name, found, texts, options.split, "clotho", LICENCE, missing))
    return build_caption_data(records)
