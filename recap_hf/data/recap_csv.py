"""The CSVs that the authors of RECAP published: a row per caption, with the weakly labelled captions of its clip."""

from __future__ import annotations

import ast
from pathlib import Path

from .audiocaps import YouTubeIndex
from .files import AudioIndex, first_existing, read_table
from .schema import CaptionData, ClipRecord, LoadOptions, build_caption_data, require_columns

PUBLISHED_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_EXPECTED = {"file_name": "name of the audio file", "caption": "the caption"}


def load_recap(options: LoadOptions) -> CaptionData:
    """Clips of one split from `file_name, caption_num, caption, abstract_captions`.

    The weakly labelled captions are not targets; `parse_abstract_captions` reads them for datastores.
    """
    table_name = find_table(options)
    table = read_table(table_name, mapping=options.columns)
    require_columns(table.column_names, _EXPECTED, str(table_name))
    audio = youtube = None
    if options.needs_audio:
        audio = AudioIndex(Path(options.audio_dir) if options.audio_dir else table_name.parent)
        youtube = YouTubeIndex(audio.paths())
    domain = "audiocaps" if "audiocaps" in table_name.name.lower() else "clotho"
    records = []
    for row in table:
        name = row["file_name"]
        path = (audio.find(name) or youtube.find(Path(name).stem, 0.0)) if audio else None
        missing = f"no audio file {name}" if audio and not path else None
        records.append(ClipRecord(name, path, [row["caption"]], options.split, f"recap-{domain}", None, missing))
    return build_caption_data(records)


def find_table(options: LoadOptions) -> Path:
    """The CSV of a split: the file that `data_dir` is, or the one in that folder.

    Raises:
        ValueError: if several fit. FileNotFoundError: if none does.
    """
    folder = Path(options.data_dir)
    if folder.is_file():
        return folder
    split = PUBLISHED_SPLITS[options.split]
    fitting = sorted(folder.glob(f"recap_{split}_*.csv")) if folder.is_dir() else []
    if len(fitting) > 1:
        names = ", ".join(path.name for path in fitting)
        raise ValueError(f"{folder} holds several RECAP files of this split ({names}): give one as --data-dir")
    return fitting[0] if fitting else first_existing(folder, [f"{split}.csv", f"recap_{split}.csv"], "caption file")


def parse_abstract_captions(cell: str) -> list[str]:
    """Weakly labelled captions from a cell such as `"[['A', 'B'], ['C']]"`: flat, in order, each once.

    Raises:
        ValueError: if the cell is not a Python list of lists of strings.
    """
    try:
        nested = ast.literal_eval(cell) if cell.strip() else []
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"abstract_captions: expected a list of lists of captions, found {cell[:80]!r}") from error
    flat: list[str] = []
    pending = [nested]
    while pending:
        item = pending.pop(0)
        if isinstance(item, (list, tuple)):
            pending = [*item, *pending]
        elif isinstance(item, str) and item.strip():
            flat.append(item.strip())
    return list(dict.fromkeys(flat))
