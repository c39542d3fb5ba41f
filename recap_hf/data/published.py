"""Datasets as published: Clotho, AudioCaps, the CSVs of RECAP's authors, and WavCaps."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import AudioIndex, find_one, read_table
from .schema import CaptionData, ClipRecord, LoadOptions, build_caption_data

LICENCES = {
    "clotho": "Tampere University licence (attribution, non-commercial)",
    "audiocaps": "MIT",
    "wavcaps": "WavCaps (academic use only)",
}


def load_clotho(options: LoadOptions) -> CaptionData:
    """`clotho_captions_{development,validation,evaluation}.csv`, five captions a clip.

    Audio is in `development/`, `clotho_audio_development/` or beside.
    """
    split = {"train": "development", "validation": "validation", "test": "evaluation"}[options.split]
    names = [f"clotho_captions_{split}.csv", f"{split}.csv", f"clotho_captions_{options.split}.csv"]
    table = find_one(options.data_dir, names, "caption file")
    expected = {"file_name": "name of the audio file", "caption_1": "first of up to five captions"}
    rows = read_table(table, expected, options.columns)
    audio = None
    if options.needs_audio:
        places = [split, f"clotho_audio_{split}", f"audio/{split}", f"clotho_audio_{split}/{split}", "audio"]
        audio = AudioIndex(options.audio_dir or find_one(table.parent, places, "audio folder"))

    def record(row: dict) -> ClipRecord:
        name = row["file_name"]
        captions = [row[column] for number in range(1, 6) if (column := f"caption_{number}") in row]
        return ClipRecord(name, audio and audio.find(name), captions, "clotho", LICENCES["clotho"])

    return build_caption_data(map(record, rows), options)


def load_audiocaps(options: LoadOptions) -> CaptionData:
    """CSVs of captions by YouTube id, and the audio that could still be downloaded.

    Audio files are named `ID`, `YID`, `ID_START` or `ID_START_END`, in seconds or milliseconds. A file that is there
    under another start time is another clip.
    """
    split = {"train": "train", "validation": "val", "test": "test"}[options.split]
    names = [f"{split}.csv", f"audiocaps_{split}.csv", f"dataset/{split}.csv"]
    table = find_one(options.data_dir, names, "caption file")
    expected = {"youtube_id": "11 characters", "start_time": "seconds into the video", "caption": "the caption"}
    rows = read_table(table, expected, options.columns)
    index = YouTubeIndex(AudioIndex(options.audio_dir or table.parent).paths()) if options.needs_audio else None

    def record(row: dict) -> ClipRecord:
        name, start = row["youtube_id"], row["start_time"]
        path = index and index.find(name, float(start or 0))
        wanted = f"no audio of YouTube id {name} from {start} s"
        return ClipRecord(name, path, [row["caption"]], "audiocaps", LICENCES["audiocaps"], wanted)

    return build_caption_data(map(record, rows), options)


def load_recap(options: LoadOptions) -> CaptionData:
    """The CSVs that the authors of RECAP published: `file_name, caption_num, caption, abstract_captions`.

    The weakly labelled captions are not targets; `parse_abstract_captions` reads them for datastores.
    """
    table = find_recap_table(options)
    expected = {"file_name": "name of the audio file", "caption": "the caption"}
    rows = read_table(table, expected, options.columns)
    audio = AudioIndex(options.audio_dir or table.parent) if options.needs_audio else None
    youtube = audio and YouTubeIndex(audio.paths())
    source = "recap-audiocaps" if "audiocaps" in table.name.lower() else "recap-clotho"

    def record(row: dict) -> ClipRecord:
        name = row["file_name"]
        path = audio and (audio.find(name) or youtube.find(Path(name).stem, 0.0))
        return ClipRecord(name, path, [row["caption"]], source)

    return build_caption_data(map(record, rows), options)


def find_recap_table(options: LoadOptions) -> Path:
    """The CSV of a split: the file that `data_dir` is, or the one in that folder; see `find_one` for errors."""
    split = {"train": "train", "validation": "dev", "test": "test"}[options.split]
    return find_one(options.data_dir, [f"recap_{split}_*.csv", f"{split}.csv", f"recap_{split}.csv"], "caption file")


def parse_abstract_captions(cell: str) -> list[str]:
    """Weakly labelled captions from a cell such as `"[['A', 'B'], ['C']]"`: flat, in order, each once.

    Raises:
        ValueError: if the cell is not a Python list of lists of strings.
    """

    def flat(item: Any) -> list[str]:
        if isinstance(item, str):
            return [item.strip()] if item.strip() else []
        return [text for part in item for text in flat(part)]

    try:
        return list(dict.fromkeys(flat(ast.literal_eval(cell)))) if cell.strip() else []
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"abstract_captions: expected a list of lists of captions, got {cell[:80]!r}") from error


def load_wavcaps(options: LoadOptions) -> CaptionData:
    """JSON files (`{"data": [{"id", "caption", ...}]}`) below `data_dir`, and FLAC files named by id.

    Raises:
        ValueError: for another split than train.
    """
    if options.split != "train":
        raise ValueError(f"WavCaps has no {options.split} split, only train")
    root = Path(options.data_dir)
    files = [root] if root.is_file() else sorted(root.rglob("*.json"))
    if not files:
        raise FileNotFoundError(f"{root} holds no WavCaps JSON (such as json_files/BBC_Sound_Effects/bbc_final.json)")
    folder = options.audio_dir or (root.parent if root.is_file() else root)
    audio = AudioIndex(folder) if options.needs_audio else None
    expected = {"id": "id of the clip, its file name without extension", "caption": "the caption"}
    records = []
    for file in files:
        source = f"wavcaps-{file.stem.removesuffix('_final')}"
        for row in read_table(file, expected, options.columns):
            name = str(row["id"])
            wanted = f"no audio file of id {name} ({file.name})"
            clip = (name, audio and audio.find(name), [row["caption"]])
            records.append(ClipRecord(*clip, source, LICENCES["wavcaps"], wanted))
    return build_caption_data(records, options)


# AudioSet-style names: optional Y, the 11 characters of a YouTube id, then perhaps start and end (seconds or ms).
_YOUTUBE_NAME = re.compile(r"(?P<id>[\w-]{11})(?:[_-](?P<start>\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?", re.ASCII)


def parse_youtube_name(stem: str) -> list[tuple[str, float | None]]:
    """Every (YouTube id, start in seconds or milliseconds, or None) that an audio file's stem may mean.

    There may be two, as a first `Y` may belong to the id.
    """
    candidates = [stem, stem[1:]] if stem[:1] == "Y" else [stem]
    matches = filter(None, map(_YOUTUBE_NAME.fullmatch, candidates))
    return [(match["id"], None if match["start"] is None else float(match["start"])) for match in matches]


class YouTubeIndex:
    """Audio files by YouTube id and start time."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._files: dict[str, dict[float | None, str]] = defaultdict(dict)
        for path in paths:
            for youtube_id, start in parse_youtube_name(Path(path).stem):
                self._files[youtube_id].setdefault(start, path)

    def find(self, youtube_id: str, start_s: float) -> str | None:
        """The file of this id that starts at `start_s` seconds, or the one that names no start."""
        files = self._files.get(youtube_id, {})
        return next((files[start] for start in (start_s, start_s * 1000, None) if start in files), None)
