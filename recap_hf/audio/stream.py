"""Recordings of any length, read block by block: mono at one sampling rate, in constant memory."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import soxr

from recap_hf.modeling.audio_recap import Mixer, check_samples, load_audio, to_mono

from .reading import read_blocks

DEFAULT_BLOCK_S = 5.0
# Frames read from a file at once, independent of `block_s`: decoded MP3 samples depend on it (by about 1e-7).
_READ_FRAMES = 1 << 16
# Samples after which channels that cancel each other do so not by chance.
MIXER_PATIENCE = 4_800
Blocks = Iterable[tuple[np.ndarray, int]]
_FILE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview)


def resample_blocks(blocks: Blocks, sampling_rate: int, name: str = "The sound") -> Iterator[np.ndarray]:
    """Converts mono blocks to one sampling rate.

    Args:
        blocks (`Iterable[tuple[np.ndarray, int]]`): float32 samples of shape `(samples,)` and their rate in Hz, the
            same for all blocks.
        sampling_rate (`int`): of the result in Hz.
        name (`str`, *optional*): of the recording, for messages.

    Raises:
        `ValueError`: for NaN, infinity, and samples far outside [-1, 1].
    """
    resampler = None
    for block, rate in blocks:
        if block.size:
            check_samples(block, f"{name}: the recording")
        if rate != sampling_rate:
            if resampler is None:
                resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32", quality="HQ")
            block = resampler.resample_chunk(block)
        if block.size:
            yield block
    if resampler is not None:
        block = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if block.size:
            yield block


class AudioStream:
    """A recording as an iterator of mono float32 blocks at one sampling rate.

    The concatenation of the blocks does not depend on `block_s`, to the bit. Files are read as needed; a URL is
    downloaded first. Channels are mixed and the rate is converted by soxr at high quality, as `load_audio`, `to_mono`
    and `resample` do for a whole recording.

    Args:
        source: as for `load_audio` (path, URL, bytes, binary file, `datasets` Audio value or row), or a waveform of
            shape `(samples,)` or `(channels, samples)` at `sampling_rate`.
        sampling_rate (`int`, *optional*, defaults to 48,000): sampling rate of the blocks in Hz.
        block_s (`float`, *optional*, defaults to 5): maximum length of a block in seconds.

    Raises, during iteration:
        `FileNotFoundError`, `IsADirectoryError`, `PermissionError`, `ValueError`, `ImportError`: as `load_audio`,
        which warns of a file that is cut off or damaged.

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
        empty = True
        for block in resample_blocks(self._mono_blocks(), self.sampling_rate, self._name()):
            empty = False
            yield block
        if empty:
            raise ValueError(f"{self._name()}: the recording is empty (no samples).")

    def _name(self) -> str:
        if isinstance(self.source, (str, os.PathLike)):
            return os.fspath(self.source)
        return str(getattr(self.source, "name", type(self.source).__name__))

    def _mono_blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """Blocks of shape `(samples,)` at the recording's own rate, with that rate."""
        source = self.source
        if isinstance(source, Mapping):
            source = source.get("audio", source)
        if isinstance(source, Mapping) and source.get("array", source.get("raw")) is None:
            # An undecoded Audio value; of a mapping without any audio `load_audio` reports what is missing.
            source = next((source[key] for key in ("bytes", "path") if source.get(key) is not None), source)
        if isinstance(source, _FILE_TYPES) or (hasattr(source, "read") and not hasattr(source, "get_all_samples")):
            mix = Mixer(MIXER_PATIENCE)
            for block, rate in read_blocks(source, _READ_FRAMES, math.inf):
                yield from self._split(mix(block), rate)
        elif isinstance(source, (Mapping, tuple)) or hasattr(source, "get_all_samples"):
            waveform, rate = load_audio(source)
            yield from self._split(to_mono(waveform), rate)
        else:
            yield from self._split(to_mono(source), self.sampling_rate)

    def _split(self, waveform: np.ndarray, rate: int) -> Iterator[tuple[np.ndarray, int]]:
        step = max(1, int(self.block_s * rate))
        for start in range(0, len(waveform), step):
            yield waveform[start : start + step], rate
