"""`recap search`: recordings and places in them, by words or by sound; and near-duplicates."""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from recap_cli.files import check_output, format_of, open_output
from recap_cli.index import add_index_folder, check_index_folder, encoder_loader
from recap_cli.numbers import positive
from recap_cli.options import add_threads, be_quiet

# As in recap_cli.formats, which needs recap_hf.
FORMATS = ("text", "json", "jsonl", "csv", "m3u", "edl")
PLAYER_FORMATS = ("m3u", "edl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap search`."""
    parser.usage = "recap search FOLDER... TEXT | FOLDER... --audio FILE | FOLDER... --duplicates [options]"
    text = "folders with an index (recap index FOLDER), and what is heard, in plain words: 'a dog barking'"
    parser.add_argument("folders", nargs="+", metavar="FOLDER... TEXT", help=text)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--audio", metavar="FILE", help="find what sounds like this recording, instead of a TEXT")
    kind.add_argument("--duplicates", action="store_true", help="list recordings of a folder that hold the same sound")
    parser.add_argument("--top", type=positive, metavar="N", help="results (default: 10)")
    text = "results of one recording at the most, which do not overlap (default: 1)"
    parser.add_argument("--places", type=positive, metavar="N", help=text)
    text = "smallest score of a result (default: none; of --duplicates 0.85)"
    parser.add_argument("--threshold", type=float, metavar="X", help=text)
    text = "m3u: a playlist with start and stop times (VLC); edl: a list of parts (mpv) (default: that of --output)"
    parser.add_argument("--format", choices=FORMATS, help=text)
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")
    add_index_folder(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if something was found, 1 if nothing was, 2 after a wrong call."""
    try:
        args = _checked(args)
    except ValueError as error:
        print(f"recap search: error: {error}", file=sys.stderr)
        return 2

    from recap_cli.formats import DUPLICATE_WRITERS, SEARCH_WRITERS

    be_quiet()
    found = 0
    rows = _duplicates(args) if args.duplicates else _results(args)
    with open_output(args.output) as file:
        writer = (DUPLICATE_WRITERS if args.duplicates else SEARCH_WRITERS)[args.format](file)
        for row in rows:
            found += 1
            writer.begin(row.pop("path"))
            writer.write(row)
        writer.close()
    if not found:
        print("recap search: nothing was found", file=sys.stderr)
    return 0 if found else 1


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, the last of the folders as the text. Raises `ValueError` for those that contradict each other."""
    folders, text, form = list(args.folders), None, format_of(args.output, args.format, FORMATS)
    if args.audio is None and not args.duplicates:
        text = folders.pop()
        if not folders or (os.path.isdir(text) and not text.strip(".")):
            raise ValueError("give the folders and then what to search for: recap search FOLDER 'a dog barking'")
        if not text.strip():
            raise ValueError("the TEXT is empty: give the words to search for")
    if args.duplicates and (form in PLAYER_FORMATS):
        raise ValueError(f"--format {form} lists places to play; give text, json, jsonl or csv with --duplicates")
    if args.duplicates and (args.top or args.places):
        raise ValueError("--duplicates lists all pairs: leave out --top and --places")
    if args.audio is not None and not os.path.exists(args.audio) and "://" not in args.audio:
        raise ValueError(f"--audio {args.audio}: no such file")
    checked = argparse.Namespace(**{**vars(args), "folders": folders, "text": text, "format": form})
    check_index_folder(checked)
    check_output(args.output, args.audio)
    return checked


def _indexes(args: argparse.Namespace) -> list[Any]:
    from recap_hf.archive import SoundIndex

    loader = encoder_loader(args)
    return [SoundIndex.load(folder, index=args.index, loader=loader) for folder in args.folders]


def _results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The best of all folders."""
    top, places = args.top or 10, args.places or 1
    each = [index.search(args.text, args.audio, top, places) for index in _indexes(args)]
    rows = sorted((row for rows in each for row in rows), key=lambda row: -row["score"])
    return [row for row in rows if args.threshold is None or row["score"] >= args.threshold][:top]


def _duplicates(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of each folder for itself."""
    from tqdm import tqdm

    threshold = {} if args.threshold is None else {"threshold": args.threshold}
    largest = 0
    for index in _indexes(args):
        before = largest
        with tqdm(unit="pair", disable=None, file=sys.stderr, leave=False) as bar:

            def update(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            for row in index.duplicates(progress=update, **threshold):
                row["group"] += before
                largest = max(largest, row["group"])
                yield row
