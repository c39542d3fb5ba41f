"""`recap index`: the sound index of a folder of recordings, made or brought up to date."""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from recap_cli.files import printable
from recap_cli.options import add_threads, be_quiet, set_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap index`."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of recordings, in all folders below too")
    add_index_folder(parser)
    text = "folder or Hub id of a captioner or a CLAP (default: the index's, for a new one that in the package)"
    parser.add_argument("--model", help=text)
    parser.add_argument(
        "--overwrite", action="store_true", help="encode everything again, such as with another --model"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add_threads(parser)


def add_index_folder(parser: argparse.ArgumentParser) -> None:
    """`--index`."""
    text = "folder of the index, where FOLDER cannot be written (default: FOLDER/.recap-index)"
    parser.add_argument("--index", metavar="DIR", help=text)


def check_index_folder(args: argparse.Namespace) -> None:
    """Refuses one index for several folders."""
    if args.index and len(args.folders) > 1:
        raise ValueError(f"--index is of one folder, got {len(args.folders)}: {', '.join(args.folders)}")


def encoder_loader(args: argparse.Namespace) -> Callable[[Any], Any]:
    """Loads each encoder once, as `--device` and `--threads` say."""
    from recap_hf.archive import SoundEncoder

    @functools.cache
    def load(source: Any) -> SoundEncoder:
        encoder = SoundEncoder.of(source, args.device)
        set_threads(args, encoder.clap)
        return encoder

    return load


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str, str | None], None]]:
    """A bar on a terminal; recordings that cannot be read are named everywhere."""
    from tqdm import tqdm

    with tqdm(unit="file", disable=None, file=sys.stderr, leave=False) as bar:

        def update(done: int, total: int, path: str, problem: str | None) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if problem is not None:
                bar.write(f"recap index: {printable(f'{path}: {problem}')}", file=sys.stderr)

        yield update


def run(args: argparse.Namespace) -> int:
    """Returns 0 if all recordings are in the index, 1 if some cannot be read, 2 after a wrong call."""
    try:
        check_index_folder(args)
    except ValueError as error:
        print(f"recap index: error: {error}", file=sys.stderr)
        return 2

    from recap_hf.archive import SoundIndex

    be_quiet()
    loader, failed = encoder_loader(args), 0
    options = {"index": args.index, "overwrite": args.overwrite, "loader": loader}
    for folder in args.folders:
        with _progress() as progress:
            index = SoundIndex.update(folder, args.model, progress=progress, **options)
        print(f"{printable(folder)}: " + ", ".join(f"{name} {number:,}" for name, number in index.report.items()))
        failed += index.report["unreadable"]
    return 1 if failed else 0
