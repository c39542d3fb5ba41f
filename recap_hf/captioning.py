"""From names on a command line to captions: which files are meant, and captions of all that can be read."""

from __future__ import annotations

import glob
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# fmt: off
AUDIO_SUFFIXES = frozenset((
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf",
    ".w64", ".rf64", ".m4a", ".aac", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wma", ".amr", ".3gp",
))
# fmt: on
STANDARD_INPUT = "-"
# Batches that are heard together, and the seconds of sound from which on they are enough (64 windows).
_BATCHES_TOGETHER, _SECONDS_TOGETHER = 4, 640.0
# What a broken recording can raise; anything else is a fault of ours and must be seen.
READ_ERRORS = (OSError, ValueError, ImportError, RuntimeError, TypeError)


def expand_inputs(names: Sequence[str]) -> list[str]:
    """The recordings that the names on a command line stand for.

    Args:
        names (`Sequence[str]`): files, folders (all entries with an audio suffix in them and below, sorted), glob
            patterns, URLs, and `-` for standard input.

    Raises:
        `ValueError`: if a folder has no recordings or a pattern matches nothing.
    """
    files: list[str] = []
    for name in names:
        path = Path(name)
        if name == STANDARD_INPUT or "://" in name or path.is_file():
            files.append(name)
        elif path.is_dir() and path.suffix.lower() not in AUDIO_SUFFIXES:
            # A folder named like a recording is listed too, so that its name is reported rather than passed over.
            found = sorted(str(entry) for entry in path.rglob("*") if entry.suffix.lower() in AUDIO_SUFFIXES)
            if not found:
                raise ValueError(f"{name}: no recordings in this folder (looked for {_suffixes()}).")
            files += found
        elif glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise ValueError(f"{name}: no file matches this pattern.")
            files += found
        else:
            files.append(name)
    return files


def _suffixes() -> str:
    return ", ".join(sorted(AUDIO_SUFFIXES))


@dataclass
class Captioned:
    """What became of one recording: a result of the pipeline, or the reason why there is none."""

    name: str
    result: dict[str, Any] | None = None
    error: str | None = None


def caption_files(captioner: Any, names: Iterable[str], batch_size: int = 8) -> Iterator[Captioned]:
    """Captions recordings in batches and yields them in order; one that cannot be read stops no other.

    Args:
        captioner ([`AudioCaptioningPipeline`]): the pipeline, with its parameters.
        names (`Iterable[str]`): paths, URLs, or `-` for standard input.
        batch_size (`int`, *optional*, defaults to 8): recordings per pass of the decoder. Several batches are heard
            together, where they are short, and those with prompts of like lengths decoded together.
    """
    waiting: list[Captioned] = []
    waveforms: list[Any] = []
    for entry, waveform in _read_ahead(captioner, names, 2 * recordings_together(batch_size)):
        waiting.append(entry)
        if waveform is not None:
            waveforms.append(waveform["waveform"])
        if _is_enough(captioner, waveforms, batch_size):
            yield from _caption_batch(captioner, waiting, waveforms, batch_size)
            waiting, waveforms = [], []
    yield from _caption_batch(captioner, waiting, waveforms, batch_size)


def recordings_together(batch_size: int) -> int:
    """How many readable recordings are heard together at the most: cut between so many, a run of short ones gives the
    same to the last digit."""
    return _BATCHES_TOGETHER * batch_size


def _is_enough(captioner: Any, waveforms: list[Any], batch_size: int) -> bool:
    """Whether so many recordings fill a pass of the encoder, in whole batches for the decoder."""
    if len(waveforms) < batch_size or len(waveforms) % batch_size:
        return False
    seconds = sum(map(len, waveforms)) / captioner.processor.feature_extractor.sampling_rate
    return len(waveforms) >= recordings_together(batch_size) or seconds >= _SECONDS_TOGETHER


def _read_ahead(captioner: Any, names: Iterable[str], ahead: int) -> Iterator[tuple[Captioned, dict[str, Any] | None]]:
    """Recordings in order, read and resampled by threads while the model works on those before them."""

    def read(name: str) -> tuple[Captioned, dict[str, Any] | None]:
        entry = Captioned(name)
        try:
            source = sys.stdin.buffer.read() if name == STANDARD_INPUT else name
            return entry, captioner.preprocess(source)
        except READ_ERRORS as error:
            entry.error = reason_of(name, error)
            return entry, None

    # One core is the model's; libsndfile and soxr let go of Python's lock.
    with ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 1) - 1))) as pool:
        pending: deque[Future[tuple[Captioned, dict[str, Any] | None]]] = deque()
        try:
            for name in names:
                pending.append(pool.submit(read, name))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # Who stops early does not wait for what nobody will ask for.
            for future in pending:
                future.cancel()


def _caption_batch(
    captioner: Any, entries: list[Captioned], waveforms: list[Any], batch_size: int
) -> Iterator[Captioned]:
    readable = [entry for entry in entries if entry.error is None]
    if readable:
        options = {**captioner._forward_params, "decoding_batch_size": batch_size}
        results = captioner.forward({"waveform": waveforms}, **options)["result"]
        for entry, result in zip(readable, results, strict=True):
            entry.result = result
    yield from entries


def reason_of(name: str, error: Exception) -> str:
    """Why a recording could not be read, in one line without its name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror[0].lower()}{error.strerror[1:]}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{name}: ")
