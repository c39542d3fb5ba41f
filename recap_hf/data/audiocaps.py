"""AudioCaps: CSVs of captions by YouTube id, and the audio that could still be downloaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .clip_ids import parse_youtube_name
from .files import AudioIndex, first_existing, read_table
from .schema import CaptionData, ClipRecord, LoadOptions, build_caption_data, require_columns

PUBLISHED_SPLITS = {"train": "train", "validation": "val", "test": "test"}
LICENCE = "MIT"
_EXPECTED = {"youtube_id": "11 characters", "start_time": "seconds into the video", "caption": "the caption"}


def load_audiocaps(options: LoadOptions) -> CaptionData:
    """Clips of one split, from audio files named by YouTube id: `ID`, `YID`, `ID_START` or `ID_START_END`.

    Start and end may be in seconds or milliseconds. A file that is there under another start time is another clip.
    """
    split = PUBLISHED_SPLITS[options.split]
    folder = Path(options.data_dir)
    names = [f"{split}.csv", f"audiocaps_{split}.csv", f"dataset/{split}.csv"]
    table_name = folder if folder.is_file() else first_existing(folder, names, "caption file")
    table = read_table(table_name, mapping=options.columns)
    require_columns(table.column_names, _EXPECTED, str(table_name))
    index = None
    if options.needs_audio:
        root = Path(options.audio_dir) if options.audio_dir else table_name.parent
        index = YouTubeIndex(AudioIndex(root).paths())
    records = []
    for row in table:
        name, start = row["youtube_id"], row["start_time"]
        path = index.find(name, float(start or 0)) if index else None
        missing = f"no audio of YouTube id {name} from {start} s" if index and not path else None
        records.append(ClipRecord(name, path, [row["caption"]], options.split, "audiocaps", LICENCE, missing))
    return build_caption_data(records)


class YouTubeIndex:
    """Audio files by YouTube id and start time."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._files: dict[str, list[tuple[float | None, str]]] = defaultdict(list)
        for path in paths:
            for youtube_id, start in parse_youtube_name(Path(path).stem):
                self._files[youtube_id].append((start, path))

    def find(self, youtube_id: str, start_s: float) -> str | None:
        """The file of this id that starts at `start_s` seconds, or the one that names no start."""
        files = self._files.get(youtube_id, [])
        for wanted in (start_s, start_s * 1000, None):
            for start, path in files:
                if start == wanted:
                    return path
        return None
