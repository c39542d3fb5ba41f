"""Captions, timelines and search results as files: text, JSON, JSONL, CSV, SRT, VTT, Audacity labels, playlists.

Writers take one row after the other and keep none, so that memory does not grow with the recording.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from recap_cli.files import encodable, json_text, printable, spreadsheet_cell
from recap_hf.audio.subtitles import Cue, CuePlacer, clock, srt_block, vtt_block
from recap_hf.modeling.audio_recap import SILENCE_CAPTION


def _one_line(caption: str) -> str:
    """A caption without line breaks and tabs, which would end a cell or a cue."""
    return " ".join(caption.split())


class Writer:
    """Writes to an open text file: `begin` for a recording, `write` for each row of it, `end`; `close` after the last.

    A row is a segment of a timeline, or the caption of a recording (`{"error": reason}` if there is none). A subclass
    defines `line`, or `row` if a row is not one line.

    Args:
        file (`IO[str]`): opened with `newline=""`.
        accessible (`bool`, *optional*, defaults to `False`): SRT and VTT have the cues of a `CuePlacer`.
    """

    # Of the files in an output folder: `<recording><suffix>`.
    suffix = ""
    # First text of the file.
    head = ""

    def __init__(self, file: IO[str], accessible: bool = False) -> None:
        self.file = file
        self.accessible = accessible
        self.name = ""
        self.count = 0
        self.print(self.head)

    def begin(self, name: str) -> None:
        """Starts a recording."""
        self.name = name

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row and flushes the file: a reader, or an interruption, has what is done."""
        self.count += 1
        self.row(row)
        self.file.flush()

    def row(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        self.print(self.line(row) + "\n")

    def print(self, text: str) -> None:
        """Writes a text, with escapes for the characters that the encoding of the file lacks."""
        self.file.write(encodable(text, self.file))

    def json(self, value: Any) -> str:
        """A value as JSON in one line."""
        return json_text(value, self.file)

    def end(self, summary: dict[str, Any] | None) -> None:
        """Ends the recording; `summary` is the result of `TimelineSummary`, or `None` after a read error."""

    def close(self) -> None:
        """Ends the file, which stays open."""
        self.file.flush()


class CaptionTextWriter(Writer):
    """A caption for each recording, and below it the captions of its prompt; or the given columns, with tabs between
    them."""

    def __init__(self, file: IO[str], accessible: bool = False, columns: Sequence[str] = ()) -> None:
        self.columns = columns
        super().__init__(file, accessible)

    def row(self, row: dict[str, Any]) -> None:
        if "caption" not in row and "error" not in self.columns:
            return
        if self.columns:
            cells = ({"file": self.name, **row}.get(name, "") for name in self.columns)
            texts = (_one_line(cell) if isinstance(cell, str) else self.json(cell) for cell in cells)
            self.print("\t".join(map(printable, texts)) + "\n")
        else:
            lines = [f"{self.name}: {row['caption']}" + ("  (untrained)" if row.get("untrained") else "")]
            lines += [f"    {hit['score']:.2f}  {_one_line(hit['caption'])}" for hit in row["retrieved"]]
            self.print("".join(f"{printable(line)}\n" for line in lines))


class ListWriter(Writer):
    """One list with an object for each recording."""

    def row(self, row: dict[str, Any]) -> None:
        self.print(("[\n" if self.count == 1 else ",\n") + self.json({"file": self.name, **row}))

    def close(self) -> None:
        self.print("\n]\n" if self.count else "[]\n")
        super().close()


class TagTextWriter(Writer):
    """A recording, and below it its tags with their probabilities and times in seconds."""

    def row(self, row: dict[str, Any]) -> None:
        if "error" not in row:
            lines = [self.name]
            for tag in row["tags"]:
                times = ", ".join(f"{start:.2f}-{end:.2f}" for start, end in tag["times"])
                category = " ".join(tag[name] for name in ("category", "catid") if name in tag)
                name = tag["name"] + (f"  [{category}]" if category else "")
                lines.append(f"    {tag['probability']:.2f}  {name}" + (f"  ({times} s)" if times else ""))
            self.print("".join(f"{printable(line)}\n" for line in lines))


class TextWriter(Writer):
    """The name of the recording, a line per segment, and the summary. Live captions, without `begin`, have no name."""

    suffix = ".txt"
    heading = ""

    def begin(self, name: str) -> None:
        super().begin(name)
        # Written with the first segment: a recording that cannot be read has none.
        self.heading = f"{name}\n"

    def line(self, row: dict[str, Any]) -> str:
        heading, self.heading = self.heading, ""
        return f"{heading}[{clock(row['start'])} --> {clock(row['end'])}]  {_one_line(row['caption'])}"

    def end(self, summary: dict[str, Any] | None) -> None:
        if summary is not None:
            self.print(f"{self.heading}summary: {_one_line(summary['caption'])}\n")


class JsonWriter(Writer):
    """A list with one object per recording: `file`, `segments`, and the fields of the summary."""

    suffix = ".json"
    separator = "[\n"

    def begin(self, name: str) -> None:
        super().begin(name)
        self.print(f'{self.separator}{{"file": {self.json(name)}, "segments": [')
        self.separator = ",\n"
        self.inner = "\n "

    def row(self, row: dict[str, Any]) -> None:
        self.print(self.inner + self.json(row))
        self.inner = ",\n "

    def end(self, summary: dict[str, Any] | None) -> None:
        fields = {"error": "the recording could not be read to its end"} if summary is None else summary
        self.print("\n]" + "".join(f', "{key}": {self.json(value)}' for key, value in fields.items()) + "}")

    def close(self) -> None:
        self.print("[]\n" if self.separator == "[\n" else "\n]\n")
        super().close()


class JsonlWriter(Writer):
    """An object in each line, with its `file`."""

    suffix = ".jsonl"

    def line(self, row: dict[str, Any]) -> str:
        return self.json({"file": self.name, **row})


class CsvWriter(Writer):
    """A line for each row; what is not a text or a number is JSON in its cell."""

    suffix = ".csv"
    columns = ("file", "start", "end", "caption", "score", "retrieved")

    def __init__(self, file: IO[str], accessible: bool = False, columns: Sequence[str] = ()) -> None:
        self.columns = columns or self.columns
        self.head = ",".join(self.columns) + "\n"
        super().__init__(file, accessible)

    def line(self, row: dict[str, Any]) -> str:
        cells = {"file": self.name, **row}
        for name in {"file", "other", "caption", "tag", "error"} & set(cells):
            text = cells[name] if name == "caption" else printable(cells[name])
            cells[name] = spreadsheet_cell(text)
        for name in {"retrieved", "times"} & set(cells):
            cells[name] = self.json(cells[name])
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(cells.get(name, "") for name in self.columns)
        return line.getvalue()


class CaptionCsvWriter(CsvWriter):
    """The same for captions of whole recordings."""

    columns = ("file", "caption", "score", "retrieved", "error", "similarity")


class TagCsvWriter(CsvWriter):
    """A line for each tag; for a recording without tags, or that cannot be read, a line without a tag."""

    columns = ("file", "tag", "probability", "times", "error", "category", "catid")

    def row(self, row: dict[str, Any]) -> None:
        rest = {name: value for name, value in row.items() if name != "tags"}
        for tag in row.get("tags") or [{}]:
            super().row(rest | {"tag" if name == "name" else name: value for name, value in tag.items()})


class LabelStudioWriter(Writer):
    """Tasks with predictions, as Label Studio imports them: a region for each segment with its caption, and the
    summary as the text of the recording."""

    suffix = ".tasks.json"
    separator = "[\n"

    def begin(self, name: str) -> None:
        super().begin(name)
        self.results: list[dict[str, Any]] = []

    def row(self, row: dict[str, Any]) -> None:
        label = "Silence" if row["caption"] == SILENCE_CAPTION else "Sound"
        times = {"start": row["start"], "end": row["end"], "channel": 0}
        region = {"id": f"segment{len(self.results) // 2}", "to_name": "audio"}
        self.results.append(region | {"from_name": "label", "type": "labels", "value": times | {"labels": [label]}})
        text = times | {"text": [_one_line(row["caption"])]}
        self.results.append(region | {"from_name": "caption", "type": "textarea", "value": text})

    def end(self, summary: dict[str, Any] | None) -> None:
        if summary is not None:
            text = {"text": [_one_line(summary["caption"])]}
            own = {"id": "summary", "to_name": "audio", "from_name": "summary", "type": "textarea", "value": text}
            self.results.append(own)
        # Label Studio's address of a file below the root of its local files.
        local = quote(Path(self.name).absolute().as_posix().lstrip("/"))
        audio = self.name if "://" in self.name else f"/data/local-files/?d={local}"
        task = {"data": {"audio": audio}, "predictions": [{"model_version": "recap", "result": self.results}]}
        self.print(self.separator + self.json(task))
        self.separator = ",\n"

    def close(self) -> None:
        self.print("[]\n" if self.separator == "[\n" else "\n]\n")
        super().close()


class AudacityWriter(Writer):
    """A label track of Audacity: start and end in seconds, and the label, separated by tabs."""

    suffix = ".labels.txt"

    def line(self, row: dict[str, Any]) -> str:
        return f"{row['start']:.6f}\t{row['end']:.6f}\t{_one_line(row['caption'])}"


class SrtWriter(Writer):
    """SubRip: one cue per segment, silence included; or `accessible` cues."""

    suffix = ".srt"
    number = 0

    def begin(self, name: str) -> None:
        super().begin(name)
        self.placer = CuePlacer() if self.accessible else None

    def row(self, row: dict[str, Any]) -> None:
        plain = Cue(row["start"], row["end"], _one_line(row["caption"]))
        for cue in self.placer.add(row) if self.placer else [plain]:
            self.cue(cue)

    def end(self, summary: dict[str, Any] | None) -> None:
        for cue in self.placer.finish() if self.placer else []:
            self.cue(cue)

    def cue(self, cue: Cue) -> None:
        """Writes one cue."""
        self.number += 1
        self.print(srt_block(self.number, cue))


class VttWriter(SrtWriter):
    """WebVTT; the summary is a note at the end."""

    suffix = ".vtt"
    head = "WEBVTT\n\n"

    def cue(self, cue: Cue) -> None:
        self.print(vtt_block(cue))

    def end(self, summary: dict[str, Any] | None) -> None:
        super().end(summary)
        if summary is not None:
            # An arrow would end the note.
            self.print(f"NOTE summary: {_one_line(summary['caption']).replace('-->', '->')}\n")


class SearchTextWriter(Writer):
    """A line for each place: score, recording, and times in seconds."""

    def line(self, row: dict[str, Any]) -> str:
        return printable(f"{row['score']:.3f}  {self.name}  ({row['start']:.2f}-{row['end']:.2f} s)")


class SearchCsvWriter(CsvWriter):
    """A line for each place."""

    columns = ("file", "start", "end", "score")


class PlaylistWriter(Writer):
    """M3U with the comments by which VLC starts and stops inside a recording."""

    suffix = ".m3u8"
    head = "#EXTM3U\n"

    def line(self, row: dict[str, Any]) -> str:
        start, end = row["start"], row["end"]
        title = printable(f"{row['score']:.3f} {Path(self.name).name}")
        options = [f"#EXTVLCOPT:start-time={start:.2f}", f"#EXTVLCOPT:stop-time={end:.2f}"]
        # As a URL, a name may hold anything.
        return "\n".join(
            [f"#EXTINF:{max(1, round(end - start))},{title}", *options, Path(self.name).absolute().as_uri()]
        )


class EdlWriter(Writer):
    """An edit decision list of mpv: its parts are played one after the other."""

    suffix = ".edl"
    head = "# mpv EDL v0\n"

    def line(self, row: dict[str, Any]) -> str:
        # The number of bytes stands before a name, which then may hold commas.
        path = str(Path(self.name).absolute())
        length = len(os.fsencode(path))
        return f"%{length}%{path},{row['start']:.3f},{row['end'] - row['start']:.3f}"


class DuplicateTextWriter(Writer):
    """A line for each pair: similarity, the recordings, and how much later the second begins."""

    def line(self, row: dict[str, Any]) -> str:
        return printable(f"{row['similarity']:.3f}  {self.name}  =  {row['other']}  ({row['offset']:+.2f} s)")


class DuplicateCsvWriter(CsvWriter):
    """A line for each pair."""

    columns = ("file", "other", "similarity", "offset", "group")


# By command: the formats of a result for each recording.
RESULT_WRITERS: dict[str, dict[str, type[Writer]]] = {
    "caption": {"text": CaptionTextWriter, "json": ListWriter, "jsonl": JsonlWriter, "csv": CaptionCsvWriter},
    "tag": {"text": TagTextWriter, "json": ListWriter, "jsonl": JsonlWriter, "csv": TagCsvWriter},
}
SEARCH_WRITERS: dict[str, type[Writer]] = {
    "text": SearchTextWriter,
    "json": ListWriter,
    "jsonl": JsonlWriter,
    "csv": SearchCsvWriter,
    "m3u": PlaylistWriter,
    "edl": EdlWriter,
}
DUPLICATE_WRITERS = SEARCH_WRITERS | {"text": DuplicateTextWriter, "csv": DuplicateCsvWriter}
TIMELINE_WRITERS: dict[str, type[Writer]] = {
    "text": TextWriter,
    "json": JsonWriter,
    "jsonl": JsonlWriter,
    "csv": CsvWriter,
    "srt": SrtWriter,
    "vtt": VttWriter,
    "audacity": AudacityWriter,
    "label-studio": LabelStudioWriter,
}
