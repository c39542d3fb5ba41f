"""What commands have in common that give a result for each recording: `recap caption`, `recap tag`."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from recap_cli.files import check_output, format_of, open_output, printable, standard_input

# As in recap_cli.formats, which needs recap_hf.
FORMATS = ("text", "json", "jsonl", "csv")


def add_result_arguments(parser: argparse.ArgumentParser, formats: Sequence[str] = FORMATS) -> None:
    """The recordings, `--format` and `--output`."""
    text = "file, folder, pattern, URL; - is standard input"
    parser.add_argument("inputs", nargs="+", metavar="RECORDING", help=text)
    parser.add_argument("--format", choices=formats, help="default: that of the suffix of --output, else text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")


def write_results(
    args: argparse.Namespace,
    verb: str,
    done: str,
    check: Callable[[argparse.Namespace], Any],
    results: Callable[[list[str]], Iterable[tuple[str, Any]]],
) -> int:
    """Writes a result for each recording.

    Args:
        args: of a parser with `add_result_arguments`.
        verb, done: the command, and what it does to a recording, for messages.
        check: refuses wrong arguments before anything is loaded.
        results: takes the names of the recordings; each name with its result, which has `to_dict`, or the exception
            that reading it raised.

    Returns:
        0 if every recording has a result, 1 if some have none, 2 if nothing was found or the call is wrong.
    """
    from recap_cli.formats import RESULT_WRITERS
    from recap_hf.recordings import expand_inputs, reason_of

    try:
        check(args)
        names, form = expand_inputs(args.inputs), format_of(args.output, args.format, FORMATS)
        check_output(args.output, *names)
    except ValueError as error:
        print(f"recap {verb}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    writers, failed = RESULT_WRITERS[verb], 0
    with open_output(args.output) as file, _progress(len(names)) as progress:
        writer = None
        try:
            for name, result in results(names):
                writer = writer or writers[form](file)
                writer.begin(name)
                if isinstance(result, Exception):
                    failed += 1
                    reason = reason_of(name, result)
                    progress.write(f"recap {verb}: {printable(f'{name}: {reason}')}")
                    writer.write({"error": reason})
                else:
                    writer.write(result.to_dict())
                    if getattr(result, "fits", None) is False:
                        progress.write(f"recap {verb}: {printable(name)}: no caption of the datastore fits")
                progress.update(1)
        except KeyboardInterrupt:
            # The results so far are a valid file.
            (writer or writers[form](file)).close()
            raise
        if writer is not None:
            writer.close()
    if failed:
        print(f"recap {verb}: {failed} of {len(names)} recordings could not be {done}.", file=sys.stderr)
    return 1 if failed else 0


def sources_of(names: Iterable[str]) -> Iterator[str | bytes]:
    """The recordings that names stand for: standard input for `-`."""
    return (standard_input().read() if name == "-" else name for name in names)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    # `disable=None` shows the bar on a terminal alone; results go to standard output, the bar to standard error.
    with tqdm(total=total, unit="clip", disable=None if total > 1 else True, file=sys.stderr, leave=False) as bar:
        bar.write = lambda message: tqdm.write(message, file=sys.stderr)
        yield bar
