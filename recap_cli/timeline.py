"""`recap timeline`: what happens when, in recordings of any length."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from recap_cli.files import check_output, open_output, printable, standard_input
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
    from recap_cli.formats import TIMELINE_WRITERS
    from recap_hf.audio.subtitles import SubtitleFile, SubtitleStyle
    from recap_hf.audio.timeline import TimelineSettings
    from recap_hf.recordings import expand_inputs

    try:
        check_caption_options(args)
        names = expand_inputs(args.inputs)
        check_usage(args, len(names))
    except ValueError as error:
        print(f"recap timeline: error: {error}", file=sys.stderr)
        return 2
    settings, style = _given(TimelineSettings, args), _given(SubtitleStyle, args)
    speech = SubtitleFile.read(args.merge_into) if args.merge_into else None
    targets = _targets(args, names) if args.output_dir else [{args.format: args.output}]
    for paths in targets:
        for path in paths.values():
            check_output(path, *names, args.merge_into)
    captioner = load_captioner(args)
    job = _Job(args, captioner, settings)
    if speech is not None:
        text = job.merge(names[0], speech, style)
        with open_output(args.output) as file:
            file.write(text)
        return 0
    options = {
        "style": style if args.accessible else None,
        "max_frequency": float(captioner.processor.feature_extractor.frequency_max),
    }
    # One file for all recordings, or files for each of them.
    for group, paths in zip([[name] for name in names] if args.output_dir else [names], targets, strict=True):
        with contextlib.ExitStack() as stack:
            writers = [
                TIMELINE_WRITERS[kind](stack.enter_context(open_output(path)), **options)
                for kind, path in paths.items()
            ]
            for name in group:
                job.caption(name, writers)
            for writer in writers:
                writer.close()
    if job.failed:
        message = f"{job.failed} of {len(names)} recordings could not be captioned to the end."
        print(f"recap timeline: {message}", file=sys.stderr)
    return 1 if job.failed else 0


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


class _Job:
    """Captions recordings one after the other and counts those that failed."""

    def __init__(self, args: argparse.Namespace, captioner: Any, settings: Any) -> None:
        self.args = args
        self.captioner = captioner
        self.settings = settings
        self.failed = 0

    def caption(self, name: str, writers: Sequence[Any]) -> None:
        """Writes one recording with all writers."""
        from tqdm import tqdm

        from recap_hf.audio.timeline import TimelineSummary
        from recap_hf.modeling.captioning_recap import READ_ERRORS
        from recap_hf.recordings import reason_of

        summary = TimelineSummary(self.settings.same_caption)
        for writer in writers:
            writer.begin(name)
        # Without a total: many formats do not say how long a recording is.
        bar = tqdm(unit="s", disable=None, file=sys.stderr, leave=False, desc=printable(Path(name).name))
        result = None
        with bar, _source(name) as source:
            segments = self._segments(source, summary)
            # Errors of reading only: one of writing, such as a full disk or a closed pipe, ends the run.
            while True:
                try:
                    segment = next(segments)
                except StopIteration:
                    result = summary.result()
                    break
                except READ_ERRORS as error:
                    self.failed += 1
                    bar.write(f"recap timeline: {printable(f'{name}: {reason_of(name, error)}')}", file=sys.stderr)
                    break
                bar.update(round(segment["end"]) - bar.n)
                for writer in writers:
                    writer.write(segment)
        for writer in writers:
            writer.end(result)

    def merge(self, name: str, speech: Any, style: Any) -> str:
        """The text of a subtitle file of speech, with cues for the sounds of a recording between the speech."""
        from recap_hf.audio.subtitles import CuePlacer, merge_cues

        placer, cues = CuePlacer(style), []
        with _source(name) as source:
            for segment in self._segments(source):
                cues += placer.add(segment)
        placed, left_out = merge_cues(cues + placer.finish(), speech.speech(), style)
        left_out += placer.left_out
        if left_out:
            print(f"recap timeline: no room between the speech for {left_out} sounds.", file=sys.stderr)
        return speech.with_cues(placed)

    def _segments(self, source: Any, summary: Any = None) -> Iterator[dict[str, Any]]:
        from recap_hf.audio.timeline import caption_timeline
        from recap_hf.modeling.audio_recap import SILENCE_CAPTION

        options = {"settings": self.settings, "summary": summary, "batch_size": self.args.batch_size}
        for segment in caption_timeline(self.captioner, source, **options):
            if not (self.args.skip_silence and segment["caption"] == SILENCE_CAPTION):
                yield segment


def _given(kind: type, args: argparse.Namespace) -> Any:
    """An instance of a dataclass with the fields that the arguments set."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if value is not None})


def _targets(args: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Path]]:
    """The files of each recording by format, in the output folder."""
    from recap_cli.formats import TIMELINE_WRITERS

    kinds = TIMELINE_WRITERS if args.format == "all" else [args.format]
    suffixes = {kind: TIMELINE_WRITERS[kind].suffix for kind in kinds}
    stems = [_stem(name) for name in names]
    double = next((stem for stem in stems if stems.count(stem) > 1), None)
    if double is not None:
        raise ValueError(
            f"Two recordings would be written to {double}{next(iter(suffixes.values()))} in {args.output_dir}: run "
            "recap timeline once for each, or use --format jsonl with --output."
        )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return [{kind: folder / f"{stem}{suffix}" for kind, suffix in suffixes.items()} for stem in stems]


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
