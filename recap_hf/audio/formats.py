"""Timelines as files: text, JSON, JSONL, CSV, TSV, SRT, VTT, Audacity labels and Raven selection tables.

Writers take one segment after the other and keep none, so that memory does not grow with the recording.
"""

from __future__ import annotations

import csv
import json
from typing import IO, Any

from .subtitles import Cue, CuePlacer, SubtitleStyle, clock, srt_block, vtt_block

_CSV_COLUMNS = ("file", "start", "end", "caption", "score", "retrieved")
_RAVEN_COLUMNS = "Selection,View,Channel,Begin Time (s),End Time (s),Low Freq (Hz),High Freq (Hz),Annotation"


def _one_line(caption: str) -> str:
    """A caption without line breaks and tabs, which would end a cell or a cue."""
    return " ".join(caption.split())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class TimelineWriter:
    """Writes timelines to an open text file: `begin`, `write` for each segment, `end`; `close` after the last.

    A subclass defines `line`, or `segment` if a segment is not one line.

    Args:
        file (`IO[str]`): opened with `newline=""`.
        style ([`SubtitleStyle`], *optional*): of SRT and VTT.
        max_frequency (`float`, *optional*, defaults to 14,000): upper limit of Raven's selections in Hz.
    """

    # Of the files in an output folder: `<recording><suffix>`.
    suffix = ""
    # First text of the file.
    head = ""

    def __init__(self, file: IO[str], style: SubtitleStyle | None = None, max_frequency: float = 14_000.0) -> None:
        self.file = file
        self.style = style
        self.max_frequency = max_frequency
        self.name = ""
        self.count = 0
        file.write(self.head)

    def begin(self, name: str) -> None:
        """Starts a recording."""
        self.name = name

    def write(self, segment: dict[str, Any]) -> None:
        """Writes a segment and flushes the file."""
        self.count += 1
        self.segment(segment)
        self.file.flush()

    def segment(self, segment: dict[str, Any]) -> None:
        """Writes one segment."""
        self.file.write(self.line(segment) + "\n")

    def line(self, segment: dict[str, Any]) -> str:
        """A segment as one line."""
        raise NotImplementedError

    def end(self, summary: dict[str, Any] | None) -> None:
        """Ends the recording; `summary` is the result of [`TimelineSummary`], or `None` after a read error."""

    def close(self) -> None:
        """Ends the file, which stays open."""
        self.file.flush()


class TextWriter(TimelineWriter):
    """The name of the recording, a line per segment, and the summary. Live captions, without `begin`, have no name."""

    suffix = ".txt"
    heading = ""

    def begin(self, name: str) -> None:
        super().begin(name)
        # Written with the first segment: a recording that cannot be read has none.
        self.heading = f"{name}\n"

    def line(self, segment: dict[str, Any]) -> str:
        heading, self.heading = self.heading, ""
        return f"{heading}[{clock(segment['start'])} --> {clock(segment['end'])}]  {_one_line(segment['caption'])}"

    def end(self, summary: dict[str, Any] | None) -> None:
        if summary is not None:
            self.file.write(f"{self.heading}summary: {_one_line(summary['caption'])}\n")


class JsonWriter(TimelineWriter):
    """A list with one object per recording: `file`, `segments`, and the fields of the summary."""

    suffix = ".json"
    separator = "[\n"

    def begin(self, name: str) -> None:
        super().begin(name)
        self.file.write(f'{self.separator}{{"file": {_json(name)}, "segments": [')
        self.separator = ",\n"
        self.inner = "\n "

    def segment(self, segment: dict[str, Any]) -> None:
        self.file.write(self.inner + _json(segment))
        self.inner = ",\n "

    def end(self, summary: dict[str, Any] | None) -> None:
        fields = {"error": "the recording could not be read to its end"} if summary is None else summary
        self.file.write("\n]" + "".join(f', "{key}": {_json(value)}' for key, value in fields.items()) + "}")

    def close(self) -> None:
        self.file.write("[]\n" if self.separator == "[\n" else "\n]\n")
        super().close()


class JsonlWriter(TimelineWriter):
    """One object per segment, with its `file`."""

    suffix = ".jsonl"

    def line(self, segment: dict[str, Any]) -> str:
        return _json({"file": self.name, **segment})


class CsvWriter(TimelineWriter):
    """One row per segment; the retrieved captions are JSON in their cell."""

    suffix = ".csv"
    head = ",".join(_CSV_COLUMNS) + "\n"

    def segment(self, segment: dict[str, Any]) -> None:
        row = {"file": self.name, **segment, "retrieved": _json(segment["retrieved"])}
        csv.writer(self.file, lineterminator="\n").writerow(row[name] for name in _CSV_COLUMNS)


class TsvWriter(TimelineWriter):
    """As whisper's: `start` and `end` in whole milliseconds, and `text`."""

    suffix = ".tsv"
    head = "start\tend\ttext\n"

    def line(self, segment: dict[str, Any]) -> str:
        start, end = round(segment["start"] * 1000), round(segment["end"] * 1000)
        return f"{start}\t{end}\t{_one_line(segment['caption'])}"


class AudacityWriter(TimelineWriter):
    """A label track of Audacity: start and end in seconds, and the label, separated by tabs."""

    suffix = ".labels.txt"

    def line(self, segment: dict[str, Any]) -> str:
        return f"{segment['start']:.6f}\t{segment['end']:.6f}\t{_one_line(segment['caption'])}"


class RavenWriter(TimelineWriter):
    """A selection table of Raven. A segment spans all frequencies, from 0 to `max_frequency`."""

    suffix = ".selections.txt"
    head = _RAVEN_COLUMNS.replace(",", "\t") + "\n"

    def line(self, segment: dict[str, Any]) -> str:
        times, frequencies = f"{segment['start']:.3f}\t{segment['end']:.3f}", f"0.0\t{self.max_frequency:.1f}"
        return f"{self.count}\tSpectrogram 1\t1\t{times}\t{frequencies}\t{_one_line(segment['caption'])}"


class SrtWriter(TimelineWriter):
    """SubRip. Without a style one cue per segment, silence included; with one, the cues of a [`CuePlacer`]."""

    suffix = ".srt"
    number = 0

    def begin(self, name: str) -> None:
        super().begin(name)
        self.placer = CuePlacer(self.style) if self.style is not None else None

    def segment(self, segment: dict[str, Any]) -> None:
        if self.style is None:
            self.cue(Cue(segment["start"], segment["end"], _one_line(segment["caption"])))
            return
        for cue in self.placer.add(segment):
            self.cue(cue)

    def end(self, summary: dict[str, Any] | None) -> None:
        for cue in [] if self.style is None else self.placer.finish():
            self.cue(cue)

    def cue(self, cue: Cue) -> None:
        """Writes one cue."""
        self.number += 1
        self.file.write(srt_block(self.number, cue))


class VttWriter(SrtWriter):
    """WebVTT; the summary is a note at the end."""

    suffix = ".vtt"
    head = "WEBVTT\n\n"

    def cue(self, cue: Cue) -> None:
        self.file.write(vtt_block(cue))

    def end(self, summary: dict[str, Any] | None) -> None:
        super().end(summary)
        if summary is not None:
            # An arrow would end the note.
            self.file.write(f"NOTE summary: {_one_line(summary['caption']).replace('-->', '->')}\n")


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
