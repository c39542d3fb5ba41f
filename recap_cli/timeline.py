"""`recap timeline`: what happens when, in recordings of any length."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, check_caption_options, load_captioner

FORMATS = ("text", "json", "jsonl", "csv", "tsv", "srt", "vtt", "audacity", "raven", "all")
# These have no field for the name of a recording.
ONE_RECORDING_FORMATS = ("tsv", "srt", "vtt", "audacity", "raven")
_SUBTITLES = ("srt", "vtt")
# Flags with a number: the field of `SubtitleStyle` or `TimelineSettings`, the unit, and the help.
_STYLE = {
    "--reading-speed": ("characters_per_second", "CHARACTERS", "per second (default: 17)"),
    "--min-duration": ("min_duration", "S", "minimum duration of a cue (default: 1)"),
    "--max-duration": ("max_duration", "S", "maximum duration of a cue (default: 7)"),
}
_SEGMENTS = {
    "--window": ("window_s", "S", "length of the embedded windows (default: 1)"),
    "--hop": ("hop_s", "S", "distance between two windows (default: 0.5)"),
    "--novelty": ("novelty", "X", "1 - cosine at a boundary; lower gives more segments (default: 0.25)"),
    "--silence-db": ("silence_db", "DB", "RMS level of silence in dBFS (default: -60)"),
    "--min-silence": ("min_silence_s", "S", "minimum length of silence (default: 0.5)"),
    "--merge-gap": ("merge_gap_s", "S", "merge equal sounds across a shorter silence (default: 2)"),
    "--max-segment": ("max_segment_s", "S", "maximum length of a captioned piece (default: 30)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap timeline`."""
    parser.add_argument(
        "inputs", nargs="+", metavar="RECORDING", help="file, folder, pattern, URL; - is standard input"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")
    parser.add_argument("--output-dir", metavar="DIR", help="write a file per recording and format there")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="segments at once (default: 8)")
    parser.add_argument("--skip-silence", action="store_true", help="leave out segments of silence")
    group = parser.add_argument_group("subtitles")
    group.add_argument("--accessible", action="store_true", help="readable SRT and VTT: [dog barking], no silence")
    group.add_argument("--merge-into", metavar="FILE", help="SRT or VTT of speech: add sounds to its pauses")
    for title, flags in ((None, _STYLE), ("segments", _SEGMENTS)):
        group = parser.add_argument_group(title) if title else group
        for flag, (name, unit, text) in flags.items():
            group.add_argument(flag, dest=name, type=float, metavar=unit, help=text)
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was read to its end, 1 if some were not, 2 after a wrong call."""
    from recap_hf.audio.timeline_files import run_timeline
    from recap_hf.recordings import expand_inputs

    try:
        check_caption_options(args)
        names = expand_inputs(args.inputs)
        check_usage(args, len(names))
    except ValueError as error:
        print(f"recap timeline: error: {error}", file=sys.stderr)
        return 2
    return run_timeline(args, names, load_captioner)


def check_usage(args: argparse.Namespace, num_recordings: int) -> None:
    """Raises `ValueError` for flags that contradict each other or the number of recordings."""
    if args.output and args.output_dir:
        raise ValueError("--output and --output-dir exclude each other: give one of them")
    if args.format == "all" and not args.output_dir:
        raise ValueError("--format all needs --output-dir")
    if num_recordings > 1 and not args.output_dir and args.format in ONE_RECORDING_FORMATS:
        raise ValueError(f"--format {args.format} holds one recording, got {num_recordings}: give an --output-dir")
    if args.merge_into:
        suffix = Path(args.merge_into).suffix.lower().lstrip(".")
        if num_recordings > 1 or args.output_dir:
            raise ValueError("--merge-into takes one recording and writes to --output or standard output")
        if suffix not in _SUBTITLES or args.format not in ("text", suffix):
            raise ValueError("--merge-into takes a .srt or .vtt file and writes the same format")
    elif args.accessible and args.format not in (*_SUBTITLES, "all"):
        raise ValueError("--accessible needs --format srt or vtt")
    elif not args.accessible:
        for flag, (name, _, _) in _STYLE.items():
            if getattr(args, name) is not None:
                raise ValueError(f"{flag} needs --accessible or --merge-into")
