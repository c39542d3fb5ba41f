"""`recap timeline`: what happens when, in recordings of any length."""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from recap_cli.files import NoResult, check_output, format_of, open_output, printable, standard_input
from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, check_caption_options, load_captioner
from recap_cli.results import add_result_arguments

FORMATS = ("text", "json", "jsonl", "csv", "srt", "vtt", "audacity", "label-studio")
# These have no field for the name of a recording.
ONE_RECORDING_FORMATS = ("srt", "vtt", "audacity")
# Flags with a number: the field of `TimelineSettings`, the unit, and the help.
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
    add_result_arguments(parser, FORMATS)
    parser.add_argument("--output-dir", metavar="DIR", help="write a file per recording there")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="segments at once (default: 8)")
    parser.add_argument("--skip-silence", action="store_true", help="leave out segments of silence")
    parser.add_argument("--accessible", action="store_true", help="readable SRT and VTT: [dog barking], no silence")
    group = parser.add_argument_group("segments")
    for flag, (name, unit, text) in _SEGMENTS.items():
        group.add_argument(flag, dest=name, type=float, metavar=unit, help=text)
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was read to its end, 1 if some were not, 2 after a wrong call."""
    from recap_cli.formats import TIMELINE_WRITERS
    from recap_hf.audio.timeline import TimelineSettings
    from recap_hf.recordings import expand_inputs

    try:
        check_caption_options(args)
        names = expand_inputs(args.inputs)
        check_output(args.output, *names)
        args = argparse.Namespace(**{**vars(args), "format": format_of(args.output, args.format, FORMATS)})
        check_usage(args, len(names))
    except ValueError as error:
        print(f"recap timeline: error: {error}", file=sys.stderr)
        return 2
    given = {name: getattr(args, name) for name, _, _ in _SEGMENTS.values() if getattr(args, name) is not None}
    settings = TimelineSettings(**given)
    # One file for all recordings, or a file for each of them.
    targets = _targets(args, names) if args.output_dir else {args.output: names}
    for path in targets:
        check_output(path, *names)
    captioner, failed = load_captioner(args), 0
    for path, group in targets.items():
        with open_output(path) as file:
            writer = TIMELINE_WRITERS[args.format](file, args.accessible)
            outcomes = [_caption(args, captioner, settings, name, writer) for name in group]
            writer.close()
            failed += sum(not complete for complete, _ in outcomes)
            if not any(complete or num_segments for complete, num_segments in outcomes):
                raise NoResult
    if failed:
        message = f"{failed} of {len(names)} recordings could not be captioned to the end."
        print(f"recap timeline: {message}", file=sys.stderr)
    return 1 if failed else 0


def check_usage(args: argparse.Namespace, num_recordings: int) -> None:
    """Raises `ValueError` for flags that contradict each other or the number of recordings."""
    if args.output and args.output_dir:
        raise ValueError("--output and --output-dir exclude each other: give one of them")
    if num_recordings > 1 and not args.output_dir and args.format in ONE_RECORDING_FORMATS:
        raise ValueError(f"--format {args.format} holds one recording, got {num_recordings}: give an --output-dir")
    if args.accessible and args.format not in ("srt", "vtt"):
        raise ValueError("--accessible needs --format srt or vtt")


def _caption(args: argparse.Namespace, captioner: Any, settings: Any, name: str, writer: Any) -> tuple[bool, int]:
    """Writes one recording; returns whether it was read to its end, and the number of its segments."""
    from tqdm import tqdm

    from recap_hf.audio.timeline import TimelineSummary, caption_timeline
    from recap_hf.modeling.audio_recap import SILENCE_CAPTION
    from recap_hf.modeling.captioning_recap import READ_ERRORS
    from recap_hf.recordings import reason_of

    summary = TimelineSummary(settings.same_caption)
    writer.begin(name)
    # Without a total: many formats do not say how long a recording is.
    bar = tqdm(unit="s", disable=None, file=sys.stderr, leave=False, desc=printable(Path(name).name))
    result, num_segments = None, 0
    with bar, _source(name) as source:
        segments = caption_timeline(captioner, source, settings=settings, summary=summary, batch_size=args.batch_size)
        # Errors of reading only: one of writing, such as a full disk or a closed pipe, ends the run.
        while True:
            try:
                segment = next(segments)
            except StopIteration:
                result = summary.result()
                break
            except READ_ERRORS as error:
                bar.write(f"recap timeline: {printable(f'{name}: {reason_of(name, error)}')}", file=sys.stderr)
                break
            num_segments += 1
            bar.update(round(segment["end"]) - bar.n)
            if not (args.skip_silence and segment["caption"] == SILENCE_CAPTION):
                writer.write(segment)
    writer.end(result)
    return result is not None, num_segments


def _targets(args: argparse.Namespace, names: Sequence[str]) -> dict[Path, list[str]]:
    """The file of each recording in the output folder, with its recording."""
    from recap_cli.formats import TIMELINE_WRITERS

    folder, suffix = Path(args.output_dir), TIMELINE_WRITERS[args.format].suffix
    targets: dict[Path, list[str]] = {}
    for name in names:
        path = folder / f"{_stem(name)}{suffix}"
        if path in targets:
            hint = "run recap timeline once for each, or use --format jsonl with --output."
            raise ValueError(f"Two recordings would be written to {path.name} in {folder}: {hint}")
        targets[path] = [name]
    folder.mkdir(parents=True, exist_ok=True)
    return targets


def _stem(name: str) -> str:
    if name == "-":
        return "stdin"
    path = PurePosixPath(urlparse(name).path) if "://" in name else Path(name)
    return path.stem or "recording"


@contextlib.contextmanager
def _source(name: str) -> Iterator[Any]:
    """What `AudioStream` reads. Standard input is copied to disk: most formats need a seekable file."""
    if name != "-":
        yield name
        return
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(standard_input(), file)
        file.seek(0)
        yield file
