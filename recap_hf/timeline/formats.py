"""Timelines as files: text, JSON, JSONL, CSV, TSV, SRT, VTT, Audacity labels and Raven selection tables.

Every writer takes segment after segment and holds none of them, so that hours take no more memory than minutes.
"""

from __future__ import annotations

import csv
import json
from typing import IO, Any

from .subtitles import Cue, CuePlacer, SubtitleStyle, srt_block, vtt_block

__all__ = ["SUFFIXES", "WRITERS", "TimelineWriter", "clock"]

_CSV_COLUMNS = ("file", "start", "end", "caption", "score", "retrieved")
_RAVEN_COLUMNS = (
    "Selection",
    "View",
    "Channel",
    "Begin Time (s)",
    "End Time (s)",
    "Low Freq (Hz)",
    "High Freq (Hz)",
    "Annotation",
)


def clock(seconds: float) -> str:
    """Seconds as `hh:mm:ss.mmm`."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def one_line(caption: str) -> str:
    """A caption without line breaks and tabs, which end a cell or a cue."""
    return " ".join(caption.split())


class TimelineWriter:
    """Writes timelines into an open text file: `begin`, `write` for each segment, `end`; `close` after the last.

    Args:
        file (`IO[str]`): opened with `newline=""`.
        style ([`SubtitleStyle`], *optional*): of SRT and VTT.
        max_frequency (`float`, *optional*): of the encoder in Hz, for Raven.
    """

    def __init__(self, file: IO[str], style: SubtitleStyle | None = None, max_frequency: float = 14_000.0) -> None:
        self.file = file
        self.style = style
        self.max_frequency = max_frequency
        self.name = ""
        self.count = 0
        self.start()

    def start(self) -> None:
        """What stands at the head of the file."""

    def begin(self, name: str) -> None:
        """A recording begins."""
        self.name = name

    def write(self, segment: dict[str, Any]) -> None:
        """Writes a segment, and flushes it: whoever reads along, or interrupts, has what is done."""
        self.count += 1
        self.segment(segment)
        self.file.flush()

    def segment(self, segment: dict[str, Any]) -> None:
        """Writes one segment."""
        raise NotImplementedError

    def end(self, summary: dict[str, Any] | None) -> None:
        """The recording is over; `summary` is [`TimelineSummary`]'s result, or `None` if it could not be read on."""

    def close(self) -> None:
        """No recording follows."""
        self.file.flush()


class TextWriter(TimelineWriter):
    """The recording's name, a line a segment, as whisper prints them, and the summary.

    Live captions have no name: they do not `begin`.
    """

    heading = ""

    def begin(self, name: str) -> None:
        super().begin(name)
        # Written with the first segment: a recording that cannot be read has none.
        self.heading = f"{name}\n"

    def segment(self, segment: dict[str, Any]) -> None:
        times = f"[{clock(segment['start'])} --> {clock(segment['end'])}]"
        self.file.write(f"{self.heading}{times}  {one_line(segment['caption'])}\n")
        self.heading = ""

    def end(self, summary: dict[str, Any] | None) -> None:
        if summary is not None:
            self.file.write(f"{self.heading}summary: {one_line(summary['caption'])}\n")


class JsonWriter(TimelineWriter):
    """A list with an object a recording: `file`, `segments`, and the summary's fields."""

    def start(self) -> None:
        self.separator = "[\n"

    def begin(self, name: str) -> None:
        super().begin(name)
        self.file.write(f'{self.separator}{{"file": {json.dumps(name, ensure_ascii=False)}, "segments": [')
        self.separator = ",\n"
        self.inner = "\n "

    def segment(self, segment: dict[str, Any]) -> None:
        self.file.write(self.inner + json.dumps(segment, ensure_ascii=False))
        self.inner = ",\n "

    def end(self, summary: dict[str, Any] | None) -> None:
        fields = {"error": "the recording could not be read to its end"} if summary is None else summary
        self.file.write("\n]" + "".join(f', "{key}": {json.dumps(fields[key], ensure_ascii=False)}' for key in fields))
        self.file.write("}")

    def close(self) -> None:
        self.file.write("[]\n" if self.separator == "[\n" else "\n]\n")
        super().close()


class JsonlWriter(TimelineWriter):
    """An object a segment, with its `file`."""

    def segment(self, segment: dict[str, Any]) -> None:
        self.file.write(json.dumps({"file": self.name, **segment}, ensure_ascii=False) + "\n")


class CsvWriter(TimelineWriter):
    """A row a segment; the retrieved captions as JSON in their cell."""

    def start(self) -> None:
        self.rows = csv.DictWriter(self.file, _CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        self.rows.writeheader()

    def segment(self, segment: dict[str, Any]) -> None:
        retrieved = json.dumps(segment["retrieved"], ensure_ascii=False)
        self.rows.writerow({"file": self.name, **segment, "retrieved": retrieved})


class TsvWriter(TimelineWriter):
    """Whisper's: `start`, `end` in whole milliseconds, and `text`."""

    def start(self) -> None:
        self.file.write("start\tend\ttext\n")

    def segment(self, segment: dict[str, Any]) -> None:
        start, end = round(segment["start"] * 1000), round(segment["end"] * 1000)
        self.file.write(f"{start}\t{end}\t{one_line(segment['caption'])}\n")


class AudacityWriter(TimelineWriter):
    """A label track of Audacity: start, end in seconds, and the label, between tabs."""

    def segment(self, segment: dict[str, Any]) -> None:
        self.file.write(f"{segment['start']:.6f}\t{segment['end']:.6f}\t{one_line(segment['caption'])}\n")


class RavenWriter(TimelineWriter):
    """A selection table of Raven. Segments have no band: they reach from 0 to the encoder's highest frequency."""

    def start(self) -> None:
        self.file.write("\t".join(_RAVEN_COLUMNS) + "\n")

    def segment(self, segment: dict[str, Any]) -> None:
        cells = (
            str(self.count),
            "Spectrogram 1",
            "1",
            f"{segment['start']:.3f}",
            f"{segment['end']:.3f}",
            "0.0",
            f"{self.max_frequency:.1f}",
            one_line(segment["caption"]),
        )
        self.file.write("\t".join(cells) + "\n")


class SrtWriter(TimelineWriter):
    """SubRip. Without a style a cue a segment, silence included; see [`SubtitleStyle`] for the other way."""

    def start(self) -> None:
        self.number = 0
        self.placer = CuePlacer(self.style) if self.style is not None else None

    def segment(self, segment: dict[str, Any]) -> None:
        plain = Cue(segment["start"], segment["end"], one_line(segment["caption"]))
        for cue in [plain] if self.placer is None else self.placer.add(segment):
            self.cue(cue)

    def end(self, summary: dict[str, Any] | None) -> None:
        for cue in [] if self.placer is None else self.placer.finish():
            self.cue(cue)

    def cue(self, cue: Cue) -> None:
        """Writes one cue."""
        self.number += 1
        self.file.write(srt_block(self.number, cue))


class VttWriter(SrtWriter):
    """WebVTT; the summary stands in a note at the end."""

    def start(self) -> None:
        super().start()
        self.file.write("WEBVTT\n\n")

    def cue(self, cue: Cue) -> None:
        self.file.write(vtt_block(cue))

    def end(self, summary: dict[str, Any] | None) -> None:
        super().end(summary)
        if summary is not None:
            # An arrow would end the note.
            self.file.write(f"NOTE summary: {one_line(summary['caption']).replace('-->', '->')}\n")


WRITERS: dict[str, type[TimelineWriter]] = {
    "text": TextWriter,
    "json": JsonWriter,
    "jsonl": JsonlWriter,
    "csv": CsvWriter,
    "tsv": TsvWriter,
    "srt": SrtWriter,
    "vtt": VttWriter,
    "audacity": AudacityWriter,
    "raven": RavenWriter,
}
# Names of the files in an output folder: `<recording><suffix>`.
SUFFIXES = {
    "text": ".txt",
    "json": ".json",
    "jsonl": ".jsonl",
    "csv": ".csv",
    "tsv": ".tsv",
    "srt": ".srt",
    "vtt": ".vtt",
    "audacity": ".labels.txt",
    "raven": ".selections.txt",
}
