"""Reading recordings of every kind: paths, URLs, pipes, bytes and files, block by block, also cut or damaged ones."""

import io
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse
from urllib.request import url2pathname, urlopen

import numpy as np
import soundfile

from recap_hf.modeling.audio_recap import check_samples, check_sampling_rate

from .containers import BLOCK_SAMPLES, read_container, warn_cut
from .headers import with_length

# 1 GiB of float32, or as long at 48 kHz: a small file may hold days of silence.
MAX_SAMPLES = 1 << 28
_URL_TIMEOUT_S, _MAX_DOWNLOAD_S = 30, 600
_MAX_DOWNLOAD = 4 * 2**30


def read_blocks(
    source: Any, frames: int = BLOCK_SAMPLES, max_samples: float = MAX_SAMPLES
) -> Iterator[tuple[np.ndarray, int]]:
    """Reads a file block by block.

    Args:
        source: a path, a URL, `bytes` or a binary file object.
        frames (`int`, *optional*, defaults to 4,194,304): samples of each channel in a block, fewer where there are
            many channels. Decoded MP3 samples depend on this number (by about 1e-7).
        max_samples (`float`, *optional*, defaults to 268,435,456): samples of all channels, or of one at 48 kHz, that
            are read: who keeps no more than a block needs no limit.

    Yields:
        `tuple`: float32 of shape `(channels, samples)`, and the sampling rate in Hz.

    Raises:
        As `load_audio`, and `ValueError` for a recording of more than `max_samples`.
    """
    name, data = _open_source(source)
    empty, read = True, 0.0
    try:
        for block, sampling_rate in _decode(name, data, frames):
            check_samples(block, f"{name}: the recording")
            empty, read = False, read + block.shape[1] * max(len(block), 48_000 / sampling_rate)
            if read > max_samples:
                longest = f"{max_samples / max(len(block) * sampling_rate, 48_000) / 60:.3g} minutes"
                raise ValueError(f"{name}: longer than {longest}: caption it with recap timeline, or a part of it.")
            yield block, sampling_rate
    finally:
        if data is not source:
            data.close()
    if empty:
        raise ValueError(f"{name}: the recording is empty (no samples).")


def _open_source(source: Any) -> tuple[str, Any]:
    """A name for messages and a seekable binary file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>", io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if name.startswith(("http://", "https://")):
            return name, _download(name)
        path = Path(url2pathname(urlparse(name).path) if name.startswith("file://") else name)
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder, not a recording.")
        if not path.exists():
            other = "; audio is read from http, https and file URLs" if "://" in name else ""
            raise FileNotFoundError(f"{name}: no such file{other}.")
        file = open(path, "rb")  # noqa: SIM115 (read_blocks closes it)
        # A pipe or a device cannot be sought in.
        return name, file if path.is_file() else _spool(name, file)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "<stream>"))
        return name, source if _can_be_sought_in(source) else _spool(name, source)
    kinds = "a path, a URL, bytes, a binary file or a datasets Audio value"
    raise TypeError(f"Audio must be {kinds}, got {type(source).__name__}.")


def _can_be_sought_in(stream: Any) -> bool:
    try:
        # Devices say that they can.
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return False
    except (AttributeError, OSError):
        # No file of the system, such as bytes in memory.
        pass
    return getattr(stream, "seekable", lambda: True)()


def _download(url: str) -> Any:
    try:
        with urlopen(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), timeout=_URL_TIMEOUT_S) as response:
            file, announced = _spool(url, response), response.headers.get("Content-Length")
    except HTTPException as error:
        raise ValueError(f"{url}: cannot be downloaded ({error}).") from error
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if announced is not None and size != int(announced):
        raise ValueError(f"{url}: the download ended early ({size} of {announced} bytes).")
    return file


def _spool(name: str, stream: Any) -> Any:
    """A copy on the disk of what cannot be sought in; a `ValueError` if it is too long or takes too long."""
    file, latest = tempfile.TemporaryFile(), time.monotonic() + _MAX_DOWNLOAD_S  # noqa: SIM115 (read_blocks closes it)
    read = getattr(stream, "read1", stream.read)
    while block := read(1 << 20):
        file.write(block)
        if file.tell() > _MAX_DOWNLOAD or time.monotonic() > latest:
            most = f"at most {_MAX_DOWNLOAD >> 30} GiB and {_MAX_DOWNLOAD_S} s are read from a URL, a pipe or a device"
            raise ValueError(f"{name}: {file.tell() >> 20} MiB came and no end; {most}. Save it as a file first.")
    file.seek(0)
    return file


def _decode(name: str, data: Any, frames: int) -> Iterator[tuple[np.ndarray, int]]:
    if not data.read(1):
        raise ValueError(f"{name}: the file is empty (0 bytes).")
    data.seek(0)
    data = with_length(data)
    read, damage = 0, ""
    try:
        with soundfile.SoundFile(_path_of(data) or data) as file:
            rate, channels, announced = file.samplerate, file.channels, file.frames
            check_sampling_rate(rate, name)
            while not damage and read < announced:
                # Bounded, for a header may announce anything. Of what cannot be decoded NaN is left.
                length = min(frames, max(1, BLOCK_SAMPLES // channels), announced - read)
                block = np.full((length, channels), np.nan, dtype=np.float32)
                try:
                    block = file.read(out=block)
                except soundfile.LibsndfileError as error:
                    damage = _reason(error)
                    block = block[: int(np.isnan(block).any(axis=1).argmax())]
                if not len(block):
                    break
                read += len(block)
                yield block.T, rate
            if not damage and _is_truncated(data, file.extra_info, announced, read):
                damage = "the file ends early"
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        damage = _reason(error)
    if read and damage:
        warn_cut(name, read / rate, damage)
    elif damage:
        yield from read_container(name, data, damage, frames, _lacks_last_page(data))


def _path_of(data: Any) -> str | None:
    """The path that an open file can be read by. libsndfile asks a Python file for a few kilobytes at a time, and each
    time waits for Python's lock, which a model in another thread holds."""
    if not isinstance(data, io.BufferedReader) or not isinstance(data.name, str):
        return None
    try:
        data.name.encode()
        return data.name if os.path.samestat(os.stat(data.name), os.fstat(data.fileno())) else None
    except (OSError, ValueError):
        # Renamed since, or a name that is no text, which soundfile does not take.
        return None


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2].strip().rstrip(".") or "unreadable"


def _is_truncated(data: Any, log: str, announced: int, read: int) -> bool:
    """Whether a file that libsndfile reads without an error ends before its own header says so."""
    # An MP3 header counts in blocks, hence the tolerance.
    if read < 0.98 * announced:
        return True
    # libsndfile's log. A size of 2 GiB and more stands for "unknown" in streamed files.
    found = re.search(r"^ *(?:data|riff|SSND|BODY|Data Size) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if found and int(found[2]) < int(found[1]) < 0x7FFFF000:
        return True
    if any(text in log for text in ("> file length", "truncated file", "does not match value from 'ds64'")):
        return True
    return _lacks_last_page(data)


def _lacks_last_page(data: Any) -> bool:
    """Whether it is Ogg and ends before or inside the page that is marked as the last one, in its sixth byte."""
    data.seek(0)
    head = data.read(4)
    data.seek(0, io.SEEK_END)
    # A page has at most 65,307 bytes.
    data.seek(max(0, data.tell() - 65_307))
    tail = data.read()
    data.seek(0)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    # Its head of 27 bytes ends with the number of segments; their lengths follow, and then they.
    whole = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return head == b"OggS" and not (whole and page[5] & 4)
