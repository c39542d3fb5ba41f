"""`recap caption`: recordings in, captions out."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from recap_cli.files import (
    check_output,
    encodable,
    json_text,
    open_output,
    printable,
    spreadsheet_cell,
    standard_input,
)
from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, add_engine_arguments, check_caption_options, load_captioner

FORMATS = ("text", "json", "jsonl", "csv")
_CSV_COLUMNS = ("file", "caption", "score", "retrieved", "error", "similarity")
_SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".txt": "text"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap caption`."""
    parser.add_argument(
        "inputs", nargs="+", metavar="RECORDING", help="file, folder, pattern, URL; - is standard input"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: that of the suffix of --output, else text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="recordings at once (default: 8)")
    parser.add_argument("--timeline", action="store_true", help=argparse.SUPPRESS)
    add_captioner_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--part-size", type=positive, default=64, metavar="N", help="recordings in a part (default: 64)"
    )
    parser.add_argument("--work-dir", metavar="DIR", help="of finished parts (default: beside --output)")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was captioned, 1 if some could not be, 2 if nothing was found to caption."""
    from recap_hf.recordings import expand_inputs, reason_of

    try:
        if args.timeline:
            raise ValueError("--timeline is a command of its own: recap timeline RECORDING")
        check_caption_options(args)
        names, form = expand_inputs(args.inputs), _format(args)
        check_output(args.output, names)
    except ValueError as error:
        print(f"recap caption: error: {printable(str(error))}", file=sys.stderr)
        return 2
    failed = 0
    with open_output(args.output) as file, _progress(len(names)) as progress:
        writer = None
        try:
            for name, result in _captioned(args, names):
                writer = writer or _WRITERS[form](file)
                if isinstance(result, Exception):
                    failed += 1
                    reason = reason_of(name, result)
                    progress.write(f"recap caption: {printable(f'{name}: {reason}')}")
                    writer.write({"file": name, "error": reason})
                else:
                    writer.write({"file": name, **result.to_dict()})
                progress.update(1)
        except KeyboardInterrupt:
            # The results so far are a valid file.
            (writer or _WRITERS[form](file)).close()
            raise
        if writer is not None:
            writer.close()
    if failed:
        print(f"recap caption: {failed} of {len(names)} recordings could not be captioned.", file=sys.stderr)
    return 1 if failed else 0


def _format(args: argparse.Namespace) -> str:
    suffix = Path(args.output or "").suffix.lower()
    inferred = _SUFFIXES.get(suffix)
    if args.format is None and suffix and inferred is None:
        hint = (
            "recap timeline writes subtitles" if suffix in (".srt", ".vtt") else f"give --format {'|'.join(FORMATS)}"
        )
        raise ValueError(f"--output {args.output}: no format has the suffix {suffix}: {hint}")
    if args.format is not None and inferred not in (None, args.format, "text"):
        raise ValueError(
            f"--output {args.output} and --format {args.format} contradict each other: change one of them"
        )
    return args.format or inferred or "text"


def _captioned(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Each name with its `CaptionResult`, or the exception that reading it raised."""
    if args.engine == "ray":
        from recap_hf.ray_engine import caption_files_with_ray

        yield from caption_files_with_ray(args, names, lambda message: print(message, file=sys.stderr))
        return
    captioner = load_captioner(args)
    sources = (standard_input().read() if name == "-" else name for name in names)
    results = captioner.caption_stream(sources, args.batch_size)
    yield from ((name, result) for name, (_, result) in zip(names, results, strict=True))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    # `disable=None` shows the bar on a terminal alone; results go to standard output, the bar to standard error.
    with tqdm(total=total, unit="clip", disable=None if total > 1 else True, file=sys.stderr, leave=False) as bar:
        bar.write = lambda message: tqdm.write(message, file=sys.stderr)
        yield bar


class _TextWriter:
    """A caption for each recording, and below it the captions of its prompt."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, row: dict[str, Any]) -> None:
        if "error" in row:
            return
        lines = [f"{row['file']}: {row['caption']}"]
        lines += [f"    {hit['score']:.2f}  {' '.join(hit['caption'].split())}" for hit in row["retrieved"]]
        self._print("".join(f"{printable(line)}\n" for line in lines))

    def _print(self, text: str) -> None:
        # Flushed: a reader, or an interruption, has what is done.
        self.file.write(encodable(text, self.file))
        self.file.flush()

    def close(self) -> None:
        """Nothing is left to write."""


class _JsonlWriter(_TextWriter):
    """An object in each line, errors included."""

    def write(self, row: dict[str, Any]) -> None:
        self._print(json_text(row, self.file) + "\n")


class _JsonWriter(_TextWriter):
    """One list of objects."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self.separator = "[\n"

    def write(self, row: dict[str, Any]) -> None:
        self._print(self.separator + json_text(row, self.file))
        self.separator = ",\n"

    def close(self) -> None:
        self._print("[]\n" if self.separator == "[\n" else "\n]\n")


class _CsvWriter(_TextWriter):
    """A row for each recording, with the retrieved captions as JSON in a cell."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self._row(dict(zip(_CSV_COLUMNS, _CSV_COLUMNS, strict=True)))

    def write(self, row: dict[str, Any]) -> None:
        cells = {name: row.get(name, "") for name in _CSV_COLUMNS}
        for name in ("file", "caption", "error"):
            cells[name] = spreadsheet_cell(printable(cells[name]))
        if "retrieved" in row:
            cells["retrieved"] = json_text(row["retrieved"], self.file)
        self._row(cells)

    def _row(self, cells: dict[str, Any]) -> None:
        line = io.StringIO()
        csv.DictWriter(line, _CSV_COLUMNS, lineterminator="\n").writerow(cells)
        self._print(line.getvalue())


_WRITERS = {"text": _TextWriter, "json": _JsonWriter, "jsonl": _JsonlWriter, "csv": _CsvWriter}
