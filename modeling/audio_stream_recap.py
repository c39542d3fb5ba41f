"""Recordings of any length, read block by block: mono at one rate, in constant memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .audio_recap import av_blocks, check_sampling_rate, is_truncated, open_source, refusal, to_mono

try:
    import av
except ImportError:
    av = None
try:
    import soundfile
except ImportError:
    soundfile = None
try:
    import soxr
except ImportError:
    soxr = None

DEFAULT_BLOCK_S = 5.0
# Frames that are read from a file at once, whatever the blocks: a decoded MP3 differs by 1e-7 with how it is read.
_READ_FRAMES = 1 << 16


class AudioStream:
    """A recording as an iterator of mono blocks at one sampling rate.

    What is yielded does not depend on the size of the blocks: joined together they are the same samples, to the bit.
    Files are read as they are needed; a URL is fetched to the disk first. The channels are averaged, the rate is
    changed by soxr at high quality, as `load_audio`, `to_mono` and `resample` do for a whole recording.

    Args:
        source: as for `load_audio` (path, URL, bytes, binary file, `datasets` Audio value), or a waveform of shape
            `(samples,)` or `(channels, samples)` at `sampling_rate`.
        sampling_rate (`int`, *optional*, defaults to 48,000): of the blocks, in Hz.
        block_s (`float`, *optional*, defaults to 5): most seconds of a block.

    Raises, while it is iterated:
        `FileNotFoundError`, `IsADirectoryError`, `PermissionError`, `ValueError`, `ImportError`: as `load_audio`. A
        file that ends before its header says so gives all it holds, and then raises `ValueError`.

    Example:
        >>> for block in AudioStream("street.flac"):
        ...     print(len(block))
    """

    def __init__(self, source: Any, sampling_rate: int = 48_000, block_s: float = DEFAULT_BLOCK_S) -> None:
        if not block_s > 0:
            raise ValueError(f"`block_s` must be a positive number of seconds, got {block_s!r}.")
        self.source = source
        self.sampling_rate = sampling_rate
        self.block_s = block_s

    def __iter__(self) -> Iterator[np.ndarray]:
        resampler, empty = None, True
        for block, rate in self._mono_blocks():
            if not block.size:
                continue
            empty = False
            if not np.isfinite(block).all():
                raise ValueError(f"{self._name()}: the recording holds NaN or infinite samples.")
            if rate != self.sampling_rate:
                if resampler is None:
                    resampler = self._resampler(rate)
                block = resampler.resample_chunk(block)
            if block.size:
                yield block
        if resampler is not None:
            block = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            if block.size:
                yield block
        if empty:
            raise ValueError(f"{self._name()}: the recording is empty (no samples).")

    def _name(self) -> str:
        if isinstance(self.source, (str, os.PathLike)):
            return os.fspath(self.source)
        return str(getattr(self.source, "name", type(self.source).__name__))

    def _resampler(self, rate: int) -> Any:
        if soxr is None:
            raise ImportError(f"Resampling from {rate} to {self.sampling_rate} Hz needs soxr: pip install soxr")
        return soxr.ResampleStream(rate, self.sampling_rate, 1, dtype="float32", quality="HQ")

    def _mono_blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """Blocks of shape `(samples,)` at the recording's own rate."""
        source = self.source
        if isinstance(source, Mapping) and "audio" in source:
            source = source["audio"]
        if isinstance(source, Mapping):
            array, rate = source.get("array", source.get("raw")), source.get("sampling_rate")
            if array is None:
                source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
                if source is None:
                    raise ValueError(
                        "An audio value needs 'array' and 'sampling_rate', or 'bytes', or 'path'; it has the keys "
                        f"{sorted(map(str, self.source))}."
                    )
            else:
                check_sampling_rate(rate)
                yield from self._cut(to_mono(array), int(rate))
                return
        if hasattr(source, "get_all_samples"):
            samples = source.get_all_samples()
            yield from self._cut(to_mono(samples.data), int(samples.sample_rate))
        elif isinstance(source, (list, np.ndarray)) or (hasattr(source, "detach") and not hasattr(source, "read")):
            yield from self._cut(to_mono(source), self.sampling_rate)
        else:
            yield from self._file_blocks(source)

    def _cut(self, waveform: np.ndarray, rate: int) -> Iterator[tuple[np.ndarray, int]]:
        step = max(1, int(self.block_s * rate))
        for start in range(0, len(waveform), step):
            yield waveform[start : start + step], rate

    def _file_blocks(self, source: Any) -> Iterator[tuple[np.ndarray, int]]:
        name, data = open_source(source)
        try:
            if not data.read(1):
                raise ValueError(f"{name}: the file is empty (0 bytes).")
            data.seek(0)
            yield from self._decoded(name, data)
        finally:
            if data is not source:
                data.close()

    def _decoded(self, name: str, data: Any) -> Iterator[tuple[np.ndarray, int]]:
        if soundfile is None:
            raise ImportError("Reading audio files needs soundfile: pip install soundfile")
        read = 0
        try:
            with soundfile.SoundFile(data) as file:
                rate, announced, log = file.samplerate, file.frames, file.extra_info
                check_sampling_rate(rate, name)
                while len(block := file.read(_READ_FRAMES, dtype="float32", always_2d=True)):
                    read += len(block)
                    yield from self._cut(block.mean(axis=1), rate)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            reason = str(error).rpartition(": ")[2].strip().rstrip(".") or "unreadable"
            if read:
                raise ValueError(f"{name}: cannot be read beyond {read / rate:.1f} s ({reason}).") from error
        else:
            if is_truncated(data, log, announced, read):
                raise ValueError(
                    f"{name}: the recording is truncated, the file ends early ({read / rate:.1f} s are there)."
                )
            return
        data.seek(0)
        if av is None:
            raise refusal(name, data, reason)
        for block, rate in av_blocks(name, data, reason):
            yield from self._cut(block.mean(axis=0), rate)


__all__ = ["DEFAULT_BLOCK_S", "AudioStream"]
