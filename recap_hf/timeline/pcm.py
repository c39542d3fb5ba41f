"""Sound out of a pipe: raw PCM or WAV, read as it comes, without seeking."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from recap_hf.modeling.audio_recap import check_sampling_rate

__all__ = ["SAMPLE_FORMATS", "PcmFormat", "pcm_blocks"]

# FFmpeg's names: type, width in bytes, full scale.
SAMPLE_FORMATS: dict[str, tuple[str, int, float]] = {
    "u8": ("u1", 1, 2.0**7),
    "s16le": ("<i2", 2, 2.0**15),
    "s16be": (">i2", 2, 2.0**15),
    "s24le": ("<i4", 3, 2.0**31),
    "s32le": ("<i4", 4, 2.0**31),
    "f32le": ("<f4", 4, 1.0),
    "f64le": ("<f8", 8, 1.0),
}
_PORTION = 1 << 16
_WAV_PCM, _WAV_FLOAT, _WAV_EXTENSIBLE = 1, 3, 0xFFFE
_WAV_FORMATS = {
    (_WAV_PCM, 8): "u8",
    (_WAV_PCM, 16): "s16le",
    (_WAV_PCM, 24): "s24le",
    (_WAV_PCM, 32): "s32le",
    (_WAV_FLOAT, 32): "f32le",
    (_WAV_FLOAT, 64): "f64le",
}
# Programs that write WAV into a pipe do not know its length: they say 0, all ones or something near 2 GiB.
_UNKNOWN_LENGTH = 0x7FFFF000


@dataclass(frozen=True)
class PcmFormat:
    """What the bytes of raw PCM mean.

    Args:
        rate (`int`): sampling rate in Hz.
        channels (`int`, *optional*, defaults to 1): interleaved.
        sample_format (`str`, *optional*, defaults to `"s16le"`): one of `SAMPLE_FORMATS`.

    Raises:
        `ValueError`: for an impossible rate, no channel, or an unknown sample format.
    """

    rate: int
    channels: int = 1
    sample_format: str = "s16le"

    def __post_init__(self) -> None:
        check_sampling_rate(self.rate)
        if self.channels < 1:
            raise ValueError(f"There must be at least one channel, got {self.channels}.")
        if self.sample_format not in SAMPLE_FORMATS:
            raise ValueError(
                f"The sample format {self.sample_format!r} is not known; expected one of {', '.join(SAMPLE_FORMATS)}."
            )

    @property
    def frame_size(self) -> int:
        """Bytes of one sample of all channels."""
        return SAMPLE_FORMATS[self.sample_format][1] * self.channels

    def mono(self, data: bytes) -> np.ndarray:
        """The mean of the channels, float32, of whole frames."""
        kind, width, scale = SAMPLE_FORMATS[self.sample_format]
        if width == 3:
            # The upper three bytes of a 32-bit sample.
            padded = np.zeros((len(data) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            samples = padded.view("<i4")[:, 0]
        else:
            samples = np.frombuffer(data, kind)
        values = samples.astype(np.float32)
        if kind == "u1":
            values -= 128
        return (values.reshape(-1, self.channels).mean(axis=1) / np.float32(scale)).astype(np.float32)


def pcm_blocks(file: BinaryIO, raw: PcmFormat | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Mono blocks as they come, with their rate; the iterator ends with the file.

    Args:
        file (`BinaryIO`): need not be seekable. `read1`, where it has one, gives what is there without waiting.
        raw ([`PcmFormat`], *optional*): of a file that is not WAV. A WAV header, where there is one, is believed.

    Raises:
        `ValueError`: for a file that is not WAV where no format is given, or a WAV format that is not PCM.
    """
    read = getattr(file, "read1", file.read)
    head = _read_exactly(file, 12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        pcm, left = _wav_header(file)
        pending = b""
    elif raw is None:
        raise ValueError(
            "Standard input is not WAV: say what it is with --rate (and --channels, --sample-format for other than "
            "one channel of s16le), or let the other program write WAV. Compressed formats go through FFmpeg: "
            "ffmpeg -i INPUT -f wav - | recap live"
        )
    else:
        pcm, left, pending = raw, None, head
    while left is None or left > 0:
        data = read(_PORTION if left is None else min(_PORTION, left))
        if not data:
            break
        if left is not None:
            left -= len(data)
        pending += data
        whole = len(pending) // pcm.frame_size * pcm.frame_size
        if whole:
            yield pcm.mono(pending[:whole]), pcm.rate
            pending = pending[whole:]
    if len(pending) >= pcm.frame_size:
        # A file that is shorter than a WAV header would be.
        yield pcm.mono(pending[: len(pending) // pcm.frame_size * pcm.frame_size]), pcm.rate


def _read_exactly(file: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data


def _wav_header(file: BinaryIO) -> tuple[PcmFormat, int | None]:
    """Reads on to the samples: their format, and how many bytes there are if the header knows."""
    pcm = None
    while True:
        chunk = _read_exactly(file, 8)
        if len(chunk) < 8:
            raise ValueError("The WAV stream ends before its samples begin.")
        name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            if pcm is None:
                raise ValueError("The WAV stream has samples before it says what they are.")
            return pcm, size if 0 < size < _UNKNOWN_LENGTH else None
        body = _read_exactly(file, size + size % 2)
        if name == b"fmt ":
            pcm = _wav_format(body)


def _wav_format(body: bytes) -> PcmFormat:
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if tag == _WAV_EXTENSIBLE and len(body) >= 26:
        tag = struct.unpack("<H", body[24:26])[0]
    if (tag, bits) not in _WAV_FORMATS:
        raise ValueError(
            f"The WAV stream holds format {tag} with {bits} bits; PCM of 8 to 32 bits and floats are read as they "
            "come. Others go through FFmpeg: ffmpeg -i INPUT -f wav - | recap live"
        )
    return PcmFormat(rate, channels, _WAV_FORMATS[tag, bits])
