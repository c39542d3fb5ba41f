"""`recap timeline`: what happens when, in recordings of any length."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, check_caption_options, load_captioner

FORMATS = ("text", "json", "jsonl", "csv", "tsv", "srt", "vtt", "audacity", "raven", "all")
# These have no place for the name of a recording.
ONE_RECORDING_FORMATS = ("tsv", "srt", "vtt", "audacity", "raven")
_SUBTITLES = ("srt", "vtt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap timeline`."""
    parser.add_argument(
        "inputs", nargs="+", metavar="RECORDING", help="file, folder, pattern, URL; - is standard input"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="segments at once (default: 8)")
    parser.add_argument(
        "--output-dir", metavar="DIR", help="a file for each recording and format there; --format all writes every one"
    )
    parser.add_argument("--skip-silence", action="store_true", help="leave segments of silence out")
    group = parser.add_argument_group("subtitles")
    group.add_argument(
        "--accessible",
        action="store_true",
        help="SRT and VTT for people who cannot hear: [dog barking], long enough to be read, no silence",
    )
    group.add_argument(
        "--merge-into",
        metavar="FILE",
        help="an SRT or VTT file of speech: its cues stay, the sounds' stand in the pauses between them",
    )
    group.add_argument(
        "--reading-speed", type=float, metavar="CHARACTERS", help="per second, with --accessible (default: 17)"
    )
    group.add_argument("--min-duration", type=float, metavar="S", help="shortest cue, with --accessible (default: 1)")
    group.add_argument("--max-duration", type=float, metavar="S", help="longest cue, with --accessible (default: 7)")
    group = parser.add_argument_group("segments")
    group.add_argument("--window", type=float, metavar="S", help="windows that are compared (default: 1)")
    group.add_argument("--hop", type=float, metavar="S", help="from one window to the next (default: 0.5)")
    group.add_argument(
        "--novelty", type=float, metavar="X", help="1 - cosine that makes a boundary; lower: more (default: 0.25)"
    )
    group.add_argument("--silence-db", type=float, metavar="DB", help="level of silence (default: -60 dBFS RMS)")
    group.add_argument("--min-silence", type=float, metavar="S", help="shortest silence (default: 0.5)")
    group.add_argument("--merge-gap", type=float, metavar="S", help="silence that parts no equal sounds (default: 2)")
    group.add_argument("--max-segment", type=positive, metavar="S", help="captioned in one piece (default: 30)")
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was read to its end, 1 if some were not, 2 if the call was wrong."""
    from recap_hf.recordings import expand_inputs
    from recap_hf.timeline.command import run_timeline

    try:
        check_caption_options(args)
        names = expand_inputs(args.inputs)
        wrong = usage_error(args, len(names))
    except ValueError as error:
        wrong = str(error)
    if wrong is not None:
        print(f"recap timeline: error: {wrong}", file=sys.stderr)
        return 2
    return run_timeline(args, names, load_captioner)


def usage_error(args: argparse.Namespace, num_recordings: int) -> str | None:
    """What is wrong with the combination of options, or `None`."""
    if args.output and args.output_dir:
        return "--output and --output-dir exclude each other."
    if args.format == "all" and not args.output_dir:
        return "--format all needs --output-dir."
    if num_recordings > 1 and not args.output_dir and args.format in ONE_RECORDING_FORMATS:
        return f"--format {args.format} holds one recording a file; for {num_recordings} name an --output-dir."
    if args.merge_into:
        suffix = Path(args.merge_into).suffix.lower().lstrip(".")
        if num_recordings > 1 or args.output_dir:
            return "--merge-into takes one recording and writes to --output or standard output."
        if suffix not in _SUBTITLES or args.format not in ("text", suffix):
            return "--merge-into takes a .srt or .vtt file and writes the same format."
    return _style_error(args)


def _style_error(args: argparse.Namespace) -> str | None:
    styled = args.accessible or args.merge_into
    for flag in ("reading_speed", "min_duration", "max_duration"):
        if getattr(args, flag) is not None and not styled:
            return f"--{flag.replace('_', '-')} needs --accessible or --merge-into."
    if args.accessible and not args.merge_into and args.format not in (*_SUBTITLES, "all"):
        return "--accessible needs --format srt or vtt."
    return None
