"""`recap timeline`: recordings in, timelines out, each segment written as soon as it is certain."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlparse

from recap_hf.modeling.audio_recap import SILENCE_CAPTION
from recap_hf.modeling.captioning_recap import READ_ERRORS
from recap_hf.modeling.timeline_recap import TimelineSettings, TimelineSummary, caption_timeline
from recap_hf.recordings import STANDARD_INPUT, reason_of

from .formats import SUFFIXES, WRITERS, TimelineWriter
from .subtitles import CuePlacer, SubtitleFile, SubtitleStyle, merge_cues

__all__ = ["run_timeline"]


def run_timeline(
    args: argparse.Namespace, names: Sequence[str], load_captioner: Callable[[argparse.Namespace], Any]
) -> int:
    """Returns 0 if every recording was read to its end, 1 if some were not.

    Args:
        args (`argparse.Namespace`): the options of `recap timeline`.
        names (`Sequence[str]`): recordings, from `expand_inputs`.
        load_captioner (`Callable`): makes the pipeline that the options name.

    Raises:
        `ValueError`, `OSError`: for settings, subtitles or an output folder that cannot be used.
    """
    settings, style = _settings(args), _style(args)
    speech = SubtitleFile.read(args.merge_into) if args.merge_into else None
    targets = _targets(args, names)
    captioner = load_captioner(args)
    job = _Job(captioner, settings, args.batch_size, args.skip_silence)
    if speech is not None:
        return job.merge(names[0], speech, style or SubtitleStyle(), args.output)
    options = {"style": style, "max_frequency": float(captioner.processor.feature_extractor.frequency_max)}
    if targets:
        for name, paths in zip(names, targets, strict=True):
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(_open(path)) for path in paths.values()]
                writers = [WRITERS[kind](file, **options) for kind, file in zip(paths, files, strict=True)]
                job.caption(name, writers)
                for writer in writers:
                    writer.close()
    else:
        with _open(args.output) as file:
            writer = WRITERS[args.format](file, **options)
            for name in names:
                job.caption(name, [writer])
            writer.close()
    if job.failed:
        print(
            f"recap timeline: {job.failed} of {len(names)} recordings could not be captioned to the end.",
            file=sys.stderr,
        )
    return 1 if job.failed else 0


class _Job:
    """Captions recordings one after the other and counts those that failed."""

    def __init__(self, captioner: Any, settings: TimelineSettings, batch_size: int, skip_silence: bool) -> None:
        self.captioner = captioner
        self.settings = settings
        self.batch_size = batch_size
        self.skip_silence = skip_silence
        self.failed = 0

    def caption(self, name: str, writers: Sequence[TimelineWriter]) -> None:
        """One recording into all writers."""
        from tqdm import tqdm

        summary = TimelineSummary(self.settings.same_caption)
        for writer in writers:
            writer.begin(name)
        # A bar without an end: how long a recording is, many formats do not say.
        bar = tqdm(unit="s", disable=None, file=sys.stderr, leave=False, desc=Path(name).name)
        error = None
        with bar, _source(name) as source:
            try:
                for segment in self._segments(source, summary):
                    bar.update(round(segment["end"]) - bar.n)
                    for writer in writers:
                        writer.write(segment)
            except READ_ERRORS as caught:
                error = caught
        if error is not None:
            self.failed += 1
            print(f"recap timeline: {name}: {reason_of(name, error)}", file=sys.stderr)
        for writer in writers:
            writer.end(None if error is not None else summary.result())

    def merge(self, name: str, speech: SubtitleFile, style: SubtitleStyle, output: str | None) -> int:
        """The sounds of one recording between the speech of a subtitle file."""
        placer, cues = CuePlacer(style), []
        with _source(name) as source:
            for segment in self._segments(source, TimelineSummary()):
                cues += placer.add(segment)
        placed, left_out = merge_cues(cues + placer.finish(), speech.speech(), style)
        with _open(output) as file:
            file.write(speech.with_cues(placed))
        left_out += placer.left_out
        if left_out:
            print(f"recap timeline: no room between the speech for {left_out} sounds.", file=sys.stderr)
        return 0

    def _segments(self, source: Any, summary: TimelineSummary) -> Iterator[dict[str, Any]]:
        for segment in caption_timeline(
            self.captioner, source, settings=self.settings, summary=summary, batch_size=self.batch_size
        ):
            if not (self.skip_silence and segment["caption"] == SILENCE_CAPTION):
                yield segment


def _settings(args: argparse.Namespace) -> TimelineSettings:
    fields = {
        "window_s": args.window,
        "hop_s": args.hop,
        "novelty": args.novelty,
        "silence_db": args.silence_db,
        "min_silence_s": args.min_silence,
        "merge_gap_s": args.merge_gap,
        "max_segment_s": args.max_segment,
    }
    return TimelineSettings(**{name: value for name, value in fields.items() if value is not None})


def _style(args: argparse.Namespace) -> SubtitleStyle | None:
    if not (args.accessible or args.merge_into):
        return None
    fields = {
        "characters_per_second": args.reading_speed,
        "min_duration": args.min_duration,
        "max_duration": args.max_duration,
    }
    return SubtitleStyle(**{name: value for name, value in fields.items() if value is not None})


def _targets(args: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Path]]:
    """The files of each recording by format, in the output folder; empty without one."""
    if not args.output_dir:
        return []
    kinds = list(WRITERS) if args.format == "all" else [args.format]
    stems = [_stem(name) for name in names]
    double = next((stem for stem in stems if stems.count(stem) > 1), None)
    if double is not None:
        raise ValueError(
            f"Two recordings would be written to {double}{SUFFIXES[kinds[0]]} in {args.output_dir}: caption them in "
            "two calls, or use --format jsonl with --output."
        )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return [{kind: folder / f"{stem}{SUFFIXES[kind]}" for kind in kinds} for stem in stems]


def _stem(name: str) -> str:
    if name == STANDARD_INPUT:
        return "stdin"
    if "://" in name:
        return PurePosixPath(urlparse(name).path).stem or "recording"
    return Path(name).stem


@contextlib.contextmanager
def _source(name: str) -> Iterator[Any]:
    """What `AudioStream` reads: standard input lies on the disk first, for most formats are not read in one go."""
    if name != STANDARD_INPUT:
        yield name
        return
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.seek(0)
        yield file


@contextlib.contextmanager
def _open(path: str | Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        yield file
