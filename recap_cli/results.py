"""What commands have in common that give a result for each recording: `recap caption`, `recap tag`."""

import argparse
import contextlib
import datetime
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from recap_cli.files import NoResult, check_output, format_of, open_output, printable, standard_input
from recap_cli.journal import Journal

# As in recap_cli.formats, which needs recap_hf.
FORMATS = ("text", "json", "jsonl", "csv")
# Seconds between two lines about progress, where there is no terminal.
_PROGRESS_S = 30.0
# Recordings with their results, which were computed together.
Groups = Iterable[Sequence[tuple[str, Any]]]


def add_result_arguments(parser: argparse.ArgumentParser, formats: Sequence[str] = FORMATS) -> None:
    """The recordings, `--format` and `--output`."""
    text = "file, folder, pattern, URL; - is standard input"
    parser.add_argument("inputs", nargs="+", metavar="RECORDING", help=text)
    parser.add_argument("--format", choices=formats, help="default: that of the suffix of --output, else text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")


class Results:
    """How a command writes a result for each recording.

    Args:
        args: of a parser with `add_result_arguments`; `columns`, `resume`, `resume_anyway`, `recursive` and `quiet`
            are read where the parser has them.
        verb, done: the command, and what it does to a recording, for messages.
    """

    def __init__(self, args: argparse.Namespace, verb: str, done: str) -> None:
        self.args, self.verb, self.done = args, verb, done
        self.failed = 0
        self._progress: Any = None

    def settings(self) -> dict[str, Any]:
        """What changes results, by name, for `--resume`."""
        return {}

    def check(self) -> None:
        """Raises `ValueError` for wrong arguments, before anything is loaded."""

    def choose(self, names: list[str]) -> list[str]:
        """The recordings to work on, of those that were named. Raises `ValueError` for some that cannot be."""
        return names

    def groups(self, names: list[str]) -> Groups:
        """The results of recordings in order, in groups that were computed together. A result has `to_dict`, or is the
        exception that reading the recording raised."""
        raise NotImplementedError

    def deliver(self, name: str, row: dict[str, Any]) -> None:
        """Takes a result before it is written. A `ValueError` is the `error` beside the result."""

    def run(self) -> int:
        """Returns 0 if every recording has a result, 1 if some have none, 2 if nothing was found or the call is
        wrong."""
        from recap_hf.recordings import expand_inputs

        args = self.args
        try:
            self.check()
            form = format_of(args.output, args.format, FORMATS)
            names = self.choose(expand_inputs(args.inputs, getattr(args, "recursive", True)))
            check_output(args.output, *names)
        except ValueError as error:
            print(f"recap {self.verb}: error: {printable(str(error))}", file=sys.stderr)
            return 2
        if getattr(args, "resume", False) or getattr(args, "resume_anyway", False):
            self._resume(names, form)
        else:
            with open_output(args.output) as file:
                self._write(file, form, self._rows(names))
        if self.failed:
            text = f"{self.failed} of {len(names)} recordings could not be {self.done}."
            print(f"recap {self.verb}: {text}", file=sys.stderr)
        return 1 if self.failed else 0

    def note(self, message: str) -> None:
        """A message on standard error, beside the progress."""
        write = print if self._progress is None else self._progress.write
        write(f"recap {self.verb}: {printable(message)}", file=sys.stderr)

    def _resume(self, names: list[str], form: str) -> None:
        with Journal(Path(f"{self.args.output}.resume"), self.settings(), self.args.resume_anyway) as journal:
            if journal.changed:
                self.note(f"going on with other settings ({journal.changed})")
            left = journal.left(names)
            if len(left) < len(set(names)) and not self.args.quiet:
                self.note(f"{len(set(names)) - len(left)} of {len(set(names))} recordings are done")
            try:
                for group in self._row_groups(left):
                    journal.add([{"file": name, **row} for name, row in group])
            except BaseException:
                there = len(set(names)) - len(journal.left(names))
                self.note(f"{there} of {len(set(names))} recordings are done; the same command goes on from there")
                raise
            with open_output(self.args.output) as file:
                self._write(file, form, ((name, journal.row(name)) for name in names))

    def _write(self, file: Any, form: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        from recap_cli.formats import RESULT_WRITERS

        columns, writer, has_result = getattr(self.args, "columns", None), None, set()

        def opened() -> Any:
            kind = RESULT_WRITERS[self.verb][form]
            return writer or (kind(file, columns=columns) if columns else kind(file))

        try:
            for name, row in rows:
                writer = opened()
                writer.begin(name)
                writer.write(row)
                has_result.add(set(row) != {"error"})
        except KeyboardInterrupt:
            # The results so far are a valid file.
            opened().close()
            raise
        except BaseException:
            if writer is not None:
                # A full disk does not take the end, either.
                with contextlib.suppress(OSError):
                    writer.close()
            raise
        # Of no recording that was left out before there is a file, too.
        opened().close()
        if has_result == {False}:
            raise NoResult

    def _rows(self, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for group in self._row_groups(names):
            yield from group

    def _row_groups(self, names: list[str]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
        if not names:
            return
        with _progress(self.verb, len(names), getattr(self.args, "quiet", False)) as self._progress:
            for group in self.groups(names):
                yield [(name, self._row(name, result)) for name, result in group]
                self._progress.update(len(group))
        self._progress = None

    def _row(self, name: str, result: Any) -> dict[str, Any]:
        from recap_hf.recordings import reason_of

        row, problem = {}, result
        if not isinstance(result, Exception):
            row, problem = result.to_dict(), None
            if row.get("fits") is False:
                self.note(f"{name}: no caption of the datastore fits")
            try:
                self.deliver(name, row)
            except (ValueError, FileNotFoundError, PermissionError) as error:
                # Of this recording alone; a full disk ends the run.
                problem = error
        if problem is None:
            return row
        self.failed += 1
        reason = reason_of(name, problem)
        self.note(f"{name}: {reason}")
        return {**row, "error": reason}


def sources_of(names: Iterable[str]) -> Iterator[str | IO[bytes]]:
    """The recordings that names stand for: standard input for `-`."""
    return (standard_input() if name == "-" else name for name in names)


class _Lines:
    """Progress as a line now and then, for a log."""

    write = staticmethod(print)

    def __init__(self, verb: str, total: int, every_s: float) -> None:
        self.verb, self.total, self.every_s, self.done = verb, total, every_s, 0
        self.began = self.latest = time.monotonic()

    def update(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.latest >= self.every_s and self.done < self.total:
            self.latest, rate = now, self.done / (now - self.began)
            left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
            text = f"{self.done} of {self.total} recordings, {rate:.1f}/s, {left} left"
            print(f"recap {self.verb}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(verb: str, total: int, quiet: bool) -> Iterator[Any]:
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if quiet or total == 1 or not terminal:
        yield _Lines(verb, total, math.inf if quiet else _PROGRESS_S)
        return
    from tqdm import tqdm

    # Results go to standard output, the bar, with rate and time left, to standard error.
    with tqdm(total=total, unit="clip", file=sys.stderr, leave=False) as bar:
        yield bar
