"""Reading audio: files, bytes, URLs and arrays become float32 waveforms, with no system package.

soundfile's wheel brings libsndfile (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, CAF, ...); soxr resamples. The package
`recap_hf` reads m4a, webm, the audio tracks of videos, URLs and pipes, too, and says what is cut off or damaged.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .index_recap import from_package

try:
    import soundfile
except ImportError:
    soundfile = None
try:
    import soxr
except ImportError:
    soxr = None
# Below telephone quality and above the fastest ultrasonic recorders, a header is broken rather than unusual.
MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 1_000, 1_000_000
# Two steps of 16-bit audio, which dithered silence reaches. A recording that never leaves them holds nothing.
SILENCE_PEAK = 2.0**-14
SILENCE_CAPTION = "silence"
# 30 dB above full scale: such floats are integers in disguise, or broken.
MAX_PEAK = 32.0


def load_audio(source: Any) -> tuple[np.ndarray, int]:
    """Reads a recording.

    Args:
        source: a path, an `http(s)://` or `file://` URL, `bytes`, a binary file object, a `datasets` Audio value
            (`{"path", "bytes"}` undecoded, `{"array", "sampling_rate"}` decoded, or a torchcodec decoder), or a pair
            of an array and its sampling rate.

    Returns:
        `tuple`: the waveform, float32 of shape `(channels, num_samples)` in [-1, 1], and its sampling rate in Hz.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`, `PermissionError`: as the system says.
        `ValueError`: for what is no audio, is empty, has an impossible sampling rate or impossible samples; the
            message names the source and the reason. A file that is cut off or damaged gives the samples before that,
            and a `UserWarning`.
        `ImportError`: for a format whose reader is not installed, with the command that installs it.
    """
    if is_clip_and_rate(source):
        source = dict(zip(("array", "sampling_rate"), source[:: 1 if np.ndim(source[0]) else -1], strict=True))
    if isinstance(source, Mapping):
        return _load_mapping(source)
    if hasattr(source, "get_all_samples"):
        samples = source.get_all_samples()
        return np.asarray(samples.data, dtype=np.float32), int(samples.sample_rate)
    try:
        read_blocks = from_package("audio.reading", "").read_blocks
    except ImportError:
        read_blocks = _read_plainly
    blocks, rates = zip(*read_blocks(source), strict=True)
    return np.ascontiguousarray(np.concatenate(blocks, axis=1)), rates[0]


def _read_plainly(source: Any) -> Iterator[tuple[np.ndarray, int]]:
    """What libsndfile reads of a path, bytes or a file, where the package is not installed."""
    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
    if soundfile is None or "://" in name:
        raise ImportError(f"{name}: reading files needs soundfile, and URLs need recap-hf: pip install recap-hf")
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    with contextlib.nullcontext(data) if hasattr(data, "read") else open(data, "rb") as data:
        try:
            block, rate = soundfile.read(data, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise ImportError(f"{name}: libsndfile does not read it ({error}): pip install recap-hf") from error
        if len(data.read(1 << 16)) == 1 << 16:
            # The length of an MP3 without a Xing header is a guess of libsndfile.
            warnings.warn(f"{name}: {len(block) / rate:.1f} s are read, and more is there.", stacklevel=2)
    check_sampling_rate(rate, name)
    check_samples(block, f"{name}: the recording")
    yield block.T, rate


def is_clip_and_rate(source: Any) -> bool:
    """Whether it is an array and its sampling rate, in either order, as soundfile and Gradio give them."""
    pair = isinstance(source, tuple) and len(source) == 2 and all(hasattr(one, "__float__") for one in source)
    return pair and (np.ndim(source[0]) > 0) != (np.ndim(source[1]) > 0)


def _load_mapping(source: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    array = source.get("array", source.get("raw"))
    if array is not None:
        if source.get("sampling_rate") is None:
            raise ValueError("A decoded audio value needs its 'sampling_rate' in Hz beside 'array'; it has none.")
        check_sampling_rate(source["sampling_rate"])
        return to_mono(array)[None], int(source["sampling_rate"])
    for name in ("bytes", "path"):
        if source.get(name) is not None:
            return load_audio(source[name])
    raise ValueError(
        "An audio value needs 'array' and 'sampling_rate', or 'bytes', or 'path'; it has the keys "
        f"{sorted(map(str, source))}."
    )


def check_sampling_rate(sampling_rate: Any, name: str = "") -> None:
    """Raises `ValueError` for a sampling rate that no recording has."""
    rate = float(sampling_rate) if hasattr(sampling_rate, "__float__") else 0.0
    if not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
        raise ValueError(
            f"{name + ': ' if name else ''}a sampling rate of {sampling_rate!r} Hz is not possible; expected a number "
            f"from {MIN_SAMPLING_RATE} to {MAX_SAMPLING_RATE} Hz."
        )


def check_samples(samples: np.ndarray, name: str) -> None:
    """Raises `ValueError` for float samples that no recording has: none, NaN, infinity, or 30 dB above full scale."""
    if not samples.size:
        raise ValueError(f"{name} is empty: it has no samples.")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise ValueError(f"{name} holds NaN or infinite samples.")
    if peak > MAX_PEAK:
        raise ValueError(
            f"{name} has samples up to {peak:.6g}; expected floats from -1 to 1. Divide those of 16 bits by 32768."
        )


def to_mono(audio: Any, name: str = "The clip") -> np.ndarray:
    """One channel as float32 of shape `(num_samples,)`: see `Mixer`.

    Args:
        audio (array, tensor or list): `(num_samples,)`, `(channels, num_samples)` or `(num_samples, channels)`, where
            the shorter side is the channels'. Floats as they are, integers scaled: see `_full_scale`.
        name (`str`, *optional*): for messages.

    Raises:
        `ValueError`: for another shape, no samples, NaN, infinity, and floats far outside [-1, 1].
    """
    if hasattr(audio, "detach"):
        # NumPy has no bfloat16.
        audio = (audio.float() if audio.is_floating_point() else audio).detach().cpu().numpy()
    audio = np.asarray(audio)
    if audio.ndim not in (1, 2):
        raise ValueError(f"{name} must have the shape (samples,) or (channels, samples), got {audio.shape}.")
    if audio.dtype.kind == "u":
        middle = np.iinfo(audio.dtype).max // 2 + 1
        audio = (audio.astype(np.float32) - middle) / middle
    elif audio.dtype.kind == "i":
        audio = (audio / _full_scale(audio)).astype(np.float32)
    elif audio.dtype.kind != "f":
        raise TypeError(f"{name} must hold numbers, got the type {audio.dtype}.")
    audio = np.asarray(audio, dtype=np.float32)
    check_samples(audio, name)
    channels = audio if audio.shape[0] <= audio.shape[-1] else audio.T
    return np.ascontiguousarray(Mixer()(channels) if audio.ndim == 2 else audio)


def _full_scale(audio: np.ndarray) -> float:
    """The value that stands for 1.0 in signed integers: of their type, or, as lists, sums and tables hold 16 or 24
    bits in 32 or 64, of the fewest bits that hold them (one more, for a sum of two channels)."""
    bits, peak = 8 * audio.itemsize, float(np.abs(audio.astype(np.float64)).max(initial=0.0))
    # 16 or 24 bits at the upper end of 32 leave the lowest byte 0.
    if bits == 64 or (bits == 32 and (peak <= 2**15 or (audio & 0xFF).any())):
        bits = next(fewer for fewer in (16, 24, 32, 64) if peak <= 2**fewer)
    return 2.0 ** (bits - 1)


class Mixer:
    """Mixes blocks of a recording to one channel, `(channels, samples)` -> `(samples,)`: the mean of the channels, or
    the loudest one where they cancel each other (a microphone with its poles exchanged). Of the first `patience`
    samples it takes the mean: few samples may cancel each other by chance."""

    def __init__(self, patience: int = 0) -> None:
        self.patience, self.power, self.mean_power = patience, 0.0, 0.0

    def __call__(self, channels: np.ndarray) -> np.ndarray:
        mean = channels.mean(axis=0)
        self.patience -= len(mean)
        self.power = self.power + np.einsum("cn,cn->c", channels, channels)
        self.mean_power += float(np.dot(mean, mean))
        # Independent channels leave 1/n of their mean power: 10 dB less is no accident.
        if self.patience <= 0 and self.mean_power < 0.1 * self.power.mean() / len(channels):
            return channels[self.power.argmax()]
        return mean


def resample(waveform: np.ndarray, sampling_rate: float, target_rate: int) -> np.ndarray:
    """Resamples `(num_samples,)` from `sampling_rate` to `target_rate` Hz with soxr's high quality."""
    if sampling_rate == target_rate:
        return waveform
    if soxr is None:
        raise ImportError(f"Resampling from {sampling_rate} to {target_rate} Hz needs soxr: pip install soxr")
    resampled = soxr.resample(waveform, sampling_rate, target_rate, quality="HQ")
    # A clip of a sample or two at a higher rate may round to none.
    return resampled if resampled.size else waveform[:1]


def is_silent(waveform: np.ndarray) -> bool:
    """Whether a recording holds nothing louder than dithered silence of 16 bits."""
    return float(np.abs(waveform).max(initial=0.0)) <= SILENCE_PEAK


__all__ = ["SILENCE_CAPTION", "Mixer", "check_samples", "is_silent", "load_audio", "resample", "to_mono"]
