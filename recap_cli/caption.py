"""`recap caption`: recordings in, captions out."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

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
        _check_output(args.output, names)
    except ValueError as error:
        print(f"recap caption: error: {error}", file=sys.stderr)
        return 2
    entries = _captioned(args, names)
    failed = 0
    # What keeps a run from beginning is known with the first recording: only then is an older output replaced.
    first = list(islice(entries, 1))
    with _output(args.output) as file, _progress(len(names)) as progress:
        writer = _WRITERS[form](file)
        for name, result in chain(first, entries):
            if isinstance(result, Exception):
                failed += 1
                reason = reason_of(name, result)
                progress.write(f"recap caption: {name}: {reason}")
                writer.write({"file": name, "error": reason})
            else:
                writer.write({"file": name, **result.to_dict()})
            progress.update(1)
        writer.close()
    if failed:
        print(f"recap caption: {failed} of {len(names)} recordings could not be captioned.", file=sys.stderr)
    return 1 if failed else 0


def _format(args: argparse.Namespace) -> str:
    inferred = next((form for suffix, form in _SUFFIXES.items() if (args.output or "").lower().endswith(suffix)), None)
    if args.format is not None and inferred not in (None, args.format, "text"):
        raise ValueError(
            f"--output {args.output} and --format {args.format} contradict each other: change one of them"
        )
    return args.format or inferred or "text"


def _check_output(output: str | None, names: list[str]) -> None:
    if output is None:
        return
    target = Path(output).resolve()
    if any(Path(name).resolve() == target for name in names if name != "-" and "://" not in name):
        raise ValueError(f"--output {output} is one of the recordings: it would be overwritten")


def _captioned(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Each name with its CaptionResult, or the exception that reading it raised."""
    if args.engine == "ray":
        from recap_hf.ray_engine import caption_files_with_ray

        yield from caption_files_with_ray(args, names, lambda message: print(message, file=sys.stderr))
        return
    captioner = load_captioner(args)
    sources = (sys.stdin.buffer.read() if name == "-" else name for name in names)
    results = captioner.caption_stream(sources, args.batch_size)
    yield from ((name, result) for name, (_, result) in zip(names, results, strict=True))


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        yield file


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    # `disable=None` shows the bar on a terminal alone; results go to standard output, the bar to standard error.
    with tqdm(total=total, unit="clip", disable=None if total > 1 else True, file=sys.stderr, leave=False) as bar:
        bar.write = lambda message: tqdm.write(message, file=sys.stderr)
        yield bar


class _TextWriter:
    """A caption a file, and under it the captions of its prompt."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, row: dict[str, Any]) -> None:
        if "error" in row:
            return
        lines = [f"{row['file']}: {row['caption']}"]
        lines += [f"    {hit['score']:.2f}  {' '.join(hit['caption'].split())}" for hit in row["retrieved"]]
        self._print("\n".join(lines) + "\n")

    def _print(self, text: str) -> None:
        # At once: whoever reads along, or interrupts, has what is done.
        self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        """Nothing stands open."""


class _JsonlWriter(_TextWriter):
    """An object a line, failures included."""

    def write(self, row: dict[str, Any]) -> None:
        self._print(json.dumps(row, ensure_ascii=False) + "\n")


class _JsonWriter(_TextWriter):
    """One list of objects, written as they come."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self.separator = "[\n"

    def write(self, row: dict[str, Any]) -> None:
        self._print(self.separator + json.dumps(row, ensure_ascii=False))
        self.separator = ",\n"

    def close(self) -> None:
        self._print("[]\n" if self.separator == "[\n" else "\n]\n")


class _CsvWriter(_TextWriter):
    """A row a file; the retrieved captions as JSON in their cell."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        self.rows = csv.DictWriter(file, _CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        self.rows.writeheader()

    def write(self, row: dict[str, Any]) -> None:
        retrieved = {} if "error" in row else {"retrieved": json.dumps(row["retrieved"], ensure_ascii=False)}
        self.rows.writerow({**row, **retrieved})
        self.file.flush()


_WRITERS = {"text": _TextWriter, "json": _JsonWriter, "jsonl": _JsonlWriter, "csv": _CsvWriter}
