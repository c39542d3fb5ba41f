"""Reading audio: files, bytes, URLs and arrays become float32 waveforms, with no system package.

soundfile's wheel brings libsndfile (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, CAF, ...); soxr resamples. The package
`recap_hf` reads m4a, webm and the audio tracks of videos, too.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
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
MIN_SAMPLING_RATE = 1_000
MAX_SAMPLING_RATE = 1_000_000
# One step of 16-bit audio. A recording that never leaves it holds nothing to describe.
SILENCE_PEAK = 2.0**-15
SILENCE_CAPTION = "silence"
_URL_TIMEOUT_S = 30
_MAX_URL_IN_MEMORY = 64 * 2**20


def load_audio(source: Any) -> tuple[np.ndarray, int]:
    """Reads a recording.

    Args:
        source: a path, an `http(s)://` or `file://` URL, `bytes`, a binary file object, a `datasets` Audio value
            (`{"path", "bytes"}` undecoded, `{"array", "sampling_rate"}` decoded, or a torchcodec decoder).

    Returns:
        `tuple`: the waveform, float32 of shape `(channels, num_samples)` in [-1, 1], and its sampling rate in Hz.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`, `PermissionError`: as the system says.
        `ValueError`: for what is no audio, is empty, or has an impossible sampling rate; the message names the
            source and the reason.
        `ImportError`: for a format whose reader is not installed, with the command that installs it.
    """
    if isinstance(source, Mapping):
        return _load_mapping(source)
    if hasattr(source, "get_all_samples"):
        samples = source.get_all_samples()
        return np.asarray(samples.data, dtype=np.float32), int(samples.sample_rate)
    blocks, rates = zip(*read_blocks(source), strict=True)
    waveform = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    return np.ascontiguousarray(waveform), rates[0]


def read_blocks(source: Any, frames: int = -1) -> Iterator[tuple[np.ndarray, int]]:
    """Reads a file block by block.

    Args:
        source: a path, a URL, `bytes` or a binary file object.
        frames (`int`, *optional*): samples of each channel in a block; default: everything in one block. A format that
            PyAV reads comes in FFmpeg's blocks. Decoded MP3 samples depend on this number (by about 1e-7).

    Yields:
        `tuple`: float32 of shape `(channels, samples)`, and the sampling rate in Hz.

    Raises:
        As `load_audio`. A truncated file yields all samples it has, and then raises `ValueError`.
    """
    name, data = _open_source(source)
    empty = True
    try:
        for block, sampling_rate in _decode(name, data, frames):
            if not np.isfinite(block).all():
                raise ValueError(f"{name}: the recording holds NaN or infinite samples.")
            if block.shape[1]:
                empty = False
                yield block, sampling_rate
    finally:
        if data is not source:
            data.close()
    if empty:
        raise ValueError(f"{name}: the recording is empty (no samples).")


def _load_mapping(source: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    array = source.get("array", source.get("raw"))
    if array is not None:
        if source.get("sampling_rate") is None:
            raise ValueError("A decoded audio value needs its 'sampling_rate' in Hz beside 'array'; it has none.")
        check_sampling_rate(source["sampling_rate"])
        return np.atleast_2d(to_mono(array)), int(source["sampling_rate"])
    for name in ("bytes", "path"):
        if source.get(name) is not None:
            return load_audio(source[name])
    raise ValueError(
        "An audio value needs 'array' and 'sampling_rate', or 'bytes', or 'path'; it has the keys "
        f"{sorted(map(str, source))}."
    )


def _open_source(source: Any) -> tuple[str, Any]:
    """A name for messages and a seekable binary file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>", io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if text.startswith(("http://", "https://", "file://")):
            with urllib.request.urlopen(text, timeout=_URL_TIMEOUT_S) as response:
                # Hours of sound lie on the disk, not in memory.
                file = tempfile.SpooledTemporaryFile(max_size=_MAX_URL_IN_MEMORY)  # noqa: SIM115 (load_audio closes it)
                shutil.copyfileobj(response, file)
                announced = response.headers.get("Content-Length")
            if announced is not None and file.tell() != int(announced):
                raise ValueError(f"{text}: the download ended early ({file.tell()} of {announced} bytes).")
            file.seek(0)
            return text, file
        path = Path(text)
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder, not a recording.")
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file.")
        return str(path), open(path, "rb")
    if hasattr(source, "read"):
        return getattr(source, "name", "<stream>"), source
    raise TypeError(
        f"Audio must be a path, a URL, bytes, a binary file or a datasets Audio value, got {type(source).__name__}."
    )


def _decode(name: str, data: Any, frames: int) -> Iterator[tuple[np.ndarray, int]]:
    if soundfile is None:
        raise ImportError("Reading audio files needs soundfile: pip install soundfile")
    if not data.read(1):
        raise ValueError(f"{name}: the file is empty (0 bytes).")
    data.seek(0)
    read = 0
    try:
        with soundfile.SoundFile(data) as file:
            rate, announced, log = file.samplerate, file.frames, file.extra_info
            check_sampling_rate(rate, name)
            while len(block := file.read(frames, dtype="float32", always_2d=True)):
                read += len(block)
                yield block.T, rate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(error).rpartition(": ")[2].strip().rstrip(".") or "unreadable"
        if read:
            raise ValueError(f"{name}: cannot be read beyond {read / rate:.1f} s ({reason}).") from error
    else:
        if _is_truncated(data, log, announced, read):
            raise ValueError(
                f"{name}: the recording is truncated, the file ends early ({read / rate:.1f} s are there)."
            )
        return
    data.seek(0)
    containers = from_package(
        "audio.containers", f"{name}: not a recording that libsndfile reads ({reason}); any other"
    )
    yield from containers.read_blocks(name, data, reason)


def _is_truncated(data: Any, log: str, announced: int, read: int) -> bool:
    """Whether a file that libsndfile reads without an error ends before its own header says so."""
    # An MP3 header counts in blocks, hence the tolerance.
    if read < 0.98 * announced:
        return True
    # libsndfile's log of WAV and AIFF. A size of 2 GiB and more stands for "unknown" in streamed WAV files.
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if found and int(found[2]) < int(found[1]) < 0x7FFFF000:
        return True
    if "> file length" in log:
        return True
    # Ogg marks its last page as such, in the sixth byte.
    data.seek(0)
    if data.read(4) != b"OggS":
        return False
    data.seek(0, io.SEEK_END)
    data.seek(max(0, data.tell() - 65_536 - 300))
    tail = data.read()
    last_page = tail.rfind(b"OggS")
    return last_page == -1 or last_page + 5 >= len(tail) or not tail[last_page + 5] & 4


def check_sampling_rate(sampling_rate: Any, name: str = "") -> None:
    """Raises `ValueError` for a sampling rate that no recording has."""
    valid = isinstance(sampling_rate, (int, float, np.number)) and math.isfinite(sampling_rate)
    if not valid or not MIN_SAMPLING_RATE <= sampling_rate <= MAX_SAMPLING_RATE:
        raise ValueError(
            f"{name + ': ' if name else ''}a sampling rate of {sampling_rate} Hz is not possible; expected "
            f"{MIN_SAMPLING_RATE} to {MAX_SAMPLING_RATE} Hz."
        )


def to_mono(audio: Any) -> np.ndarray:
    """The mean of the channels as float32 of shape `(num_samples,)`.

    Args:
        audio (array or tensor): `(num_samples,)`, `(channels, num_samples)` or `(num_samples, channels)`, where the
            shorter side is the channels'. Floats as they are, integers scaled from the range of their type.
    """
    audio = audio.detach().cpu().numpy() if hasattr(audio, "detach") else np.asarray(audio)
    if audio.ndim not in (1, 2):
        raise ValueError(f"A clip must have the shape (samples,) or (channels, samples), got {audio.shape}.")
    if audio.dtype.kind == "u":
        middle = np.iinfo(audio.dtype).max // 2 + 1
        audio = (audio.astype(np.float32) - middle) / middle
    elif audio.dtype.kind == "i":
        audio = audio.astype(np.float32) / (np.iinfo(audio.dtype).max + 1.0)
    elif audio.dtype.kind != "f":
        raise TypeError(f"A clip must hold numbers, got the type {audio.dtype}.")
    if audio.ndim == 2:
        audio = audio.mean(axis=0 if audio.shape[0] <= audio.shape[1] else 1)
    return np.ascontiguousarray(audio, dtype=np.float32)


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
    """Whether a recording holds nothing louder than the smallest step of 16-bit audio."""
    return float(np.abs(waveform).max(initial=0.0)) <= SILENCE_PEAK


__all__ = ["SILENCE_CAPTION", "check_sampling_rate", "is_silent", "load_audio", "read_blocks", "resample", "to_mono"]
