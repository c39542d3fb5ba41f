"""Timelines written to files, each segment as soon as it is final: the work of `recap timeline`."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from recap_cli.files import check_output, open_output, printable, standard_input
from recap_hf.modeling.audio_recap import SILENCE_CAPTION
from recap_hf.modeling.captioning_recap import READ_ERRORS, Captioner
from recap_hf.recordings import STANDARD_INPUT, reason_of

from .formats import WRITERS, TimelineWriter
from .subtitles import CuePlacer, SubtitleFile, SubtitleStyle, merge_cues
from .timeline import TimelineSettings, TimelineSummary, caption_timeline


def run_timeline(
    args: argparse.Namespace, names: Sequence[str], load_captioner: Callable[[argparse.Namespace], Captioner]
) -> int:
    """Returns 0 if every recording was read to its end, else 1.

    Args:
        args (`argparse.Namespace`): the arguments of `recap timeline`; those of [`TimelineSettings`] and
            [`SubtitleStyle`] have the names of their fields.
        names (`Sequence[str]`): recordings, from `expand_inputs`.
        load_captioner (`Callable`): loads the captioner that the arguments name.

    Raises:
        `ValueError`, `OSError`: for settings, subtitles or an output folder that cannot be used.
    """
    settings, style = _given(TimelineSettings, args), _given(SubtitleStyle, args)
    speech = SubtitleFile.read(args.merge_into) if args.merge_into else None
    targets = _targets(args, names) if args.output_dir else [{args.format: args.output}]
    for paths in targets:
        for path in paths.values():
            check_output(path, [*names, *filter(None, [args.merge_into])])
    captioner = load_captioner(args)
    job = _Job(captioner, settings, args.batch_size, args.skip_silence)
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
                WRITERS[kind](stack.enter_context(open_output(path)), **options) for kind, path in paths.items()
            ]
            for name in group:
                job.caption(name, writers)
            for writer in writers:
                writer.close()
    if job.failed:
        print(
            f"recap timeline: {job.failed} of {len(names)} recordings could not be captioned to the end.",
            file=sys.stderr,
        )
    return 1 if job.failed else 0


class _Job:
    """Captions recordings one after the other and counts those that failed."""

    def __init__(self, captioner: Captioner, settings: TimelineSettings, batch_size: int, skip_silence: bool) -> None:
        self.captioner = captioner
        self.settings = settings
        self.batch_size = batch_size
        self.skip_silence = skip_silence
        self.failed = 0

    def caption(self, name: str, writers: Sequence[TimelineWriter]) -> None:
        """Writes one recording with all writers."""
        from tqdm import tqdm

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

    def merge(self, name: str, speech: SubtitleFile, style: SubtitleStyle) -> str:
        """The text of a subtitle file of speech, with cues for the sounds of a recording between the speech."""
        placer, cues = CuePlacer(style), []
        with _source(name) as source:
            for segment in self._segments(source, TimelineSummary()):
                cues += placer.add(segment)
        placed, left_out = merge_cues(cues + placer.finish(), speech.speech(), style)
        left_out += placer.left_out
        if left_out:
            print(f"recap timeline: no room between the speech for {left_out} sounds.", file=sys.stderr)
        return speech.with_cues(placed)

    def _segments(self, source: Any, summary: TimelineSummary) -> Iterator[dict[str, Any]]:
        options = {"settings": self.settings, "summary": summary, "batch_size": self.batch_size}
        for segment in caption_timeline(self.captioner, source, **options):
            if not (self.skip_silence and segment["caption"] == SILENCE_CAPTION):
                yield segment


def _given(kind: type, args: argparse.Namespace) -> Any:
    """An instance of a dataclass with the fields that the arguments set."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if value is not None})


def _targets(args: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Path]]:
    """The files of each recording by format, in the output folder."""
    suffixes = {kind: WRITERS[kind].suffix for kind in (WRITERS if args.format == "all" else [args.format])}
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
    if name == STANDARD_INPUT:
        return "stdin"
    if "://" in name:
        return PurePosixPath(urlparse(name).path).stem or "recording"
    return Path(name).stem


@contextlib.contextmanager
def _source(name: str) -> Iterator[Any]:
    """What `AudioStream` reads. Standard input is copied to disk: most formats need a seekable file."""
    if name != STANDARD_INPUT:
        yield name
        return
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(standard_input(), file)
        file.seek(0)
        yield file
