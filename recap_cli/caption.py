"""`recap caption`: recordings in, captions out."""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, add_engine_arguments, check_caption_options, load_captioner
from recap_cli.results import add_result_arguments, sources_of, write_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_result_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="recordings at once (default: 8)")
    parser.add_argument("--timeline", action="store_true", help=argparse.SUPPRESS)
    add_captioner_arguments(parser)
    add_engine_arguments(parser)
    text = "recordings in a part (default: 64)"
    parser.add_argument("--part-size", type=positive, default=64, metavar="N", help=text)
    parser.add_argument("--work-dir", metavar="DIR", help="of finished parts (default: beside --output)")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was captioned, 1 if some could not be, 2 if nothing was found to caption."""
    return write_results(args, "caption", "captioned", _check, functools.partial(_captioned, args))


def _check(args: argparse.Namespace) -> None:
    if args.timeline:
        raise ValueError("--timeline is a command of its own: recap timeline RECORDING")
    check_caption_options(args)


def _captioned(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Each name with its `CaptionResult`, or the exception that reading it raised."""
    if args.engine == "ray":
        yield from _captioned_by_ray(args, names)
        return
    captioner = load_captioner(args)
    results = captioner.caption_stream(sources_of(names), args.batch_size)
    yield from ((name, result) for name, (_, result) in zip(names, results, strict=True))


def _captioned_by_ray(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, Any]]:
    from recap_hf.modeling.options_recap import CaptionOptions
    from recap_hf.ray_engine import RayOptions, caption_files_with_ray

    if "-" in names:
        raise ValueError("--engine ray cannot read standard input in its processes: give files, or leave it out")
    if not (args.work_dir or args.output):
        raise ValueError("--engine ray needs --output FILE, or --work-dir DIR for the finished parts")
    work = Path(args.work_dir or f"{args.output}.parts").resolve()
    named = {name: getattr(args, name) for name in ("model", "datastore", "dtype") if getattr(args, name) is not None}
    settings = {**named, **CaptionOptions.from_args(args).to_dict()}
    options = RayOptions(args.num_workers, args.ray_address, args.batch_size, args.part_size)
    note = functools.partial(print, file=sys.stderr)
    yield from caption_files_with_ray(functools.partial(load_captioner, args), names, work, settings, options, note)
