"""`recap caption`: recordings in, captions out."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recap_cli.files import check_output, open_output, printable, standard_input
from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, add_engine_arguments, check_caption_options, load_captioner

# As in recap_cli.formats, which needs recap_hf.
FORMATS = ("text", "json", "jsonl", "csv")
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
    from recap_cli.formats import CAPTION_WRITERS
    from recap_hf.recordings import expand_inputs, reason_of

    try:
        if args.timeline:
            raise ValueError("--timeline is a command of its own: recap timeline RECORDING")
        check_caption_options(args)
        names, form = expand_inputs(args.inputs), _format(args)
        check_output(args.output, *names)
    except ValueError as error:
        print(f"recap caption: error: {printable(str(error))}", file=sys.stderr)
        return 2
    failed = 0
    with open_output(args.output) as file, _progress(len(names)) as progress:
        writer = None
        try:
            for name, result in _captioned(args, names):
                writer = writer or CAPTION_WRITERS[form](file)
                writer.begin(name)
                if isinstance(result, Exception):
                    failed += 1
                    reason = reason_of(name, result)
                    progress.write(f"recap caption: {printable(f'{name}: {reason}')}")
                    writer.write({"error": reason})
                else:
                    writer.write(result.to_dict())
                progress.update(1)
        except KeyboardInterrupt:
            # The results so far are a valid file.
            (writer or CAPTION_WRITERS[form](file)).close()
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
        yield from _captioned_by_ray(args, names)
        return
    captioner = load_captioner(args)
    sources = (standard_input().read() if name == "-" else name for name in names)
    results = captioner.caption_stream(sources, args.batch_size)
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


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    # `disable=None` shows the bar on a terminal alone; results go to standard output, the bar to standard error.
    with tqdm(total=total, unit="clip", disable=None if total > 1 else True, file=sys.stderr, leave=False) as bar:
        bar.write = lambda message: tqdm.write(message, file=sys.stderr)
        yield bar
