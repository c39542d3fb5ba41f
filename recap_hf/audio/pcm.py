"""Sound from a pipe: raw PCM or WAV, read as it arrives, without seeking."""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile

from recap_hf.modeling.audio_recap import Mixer, check_sampling_rate

from .stream import MIXER_PATIENCE

# FFmpeg's names: libsndfile's subtype and byte order, and the width of a sample in bytes.
SAMPLE_FORMATS: dict[str, tuple[str, str, int]] = {
    "u8": ("PCM_U8", "LITTLE", 1),
    "s16le": ("PCM_16", "LITTLE", 2),
    "s16be": ("PCM_16", "BIG", 2),
    "s24le": ("PCM_24", "LITTLE", 3),
    "s32le": ("PCM_32", "LITTLE", 4),
    "f32le": ("FLOAT", "LITTLE", 4),
    "f64le": ("DOUBLE", "LITTLE", 8),
}
_READ_BYTES = 1 << 16
_WAV_PCM, _WAV_FLOAT, _WAV_EXTENSIBLE = 1, 3, 0xFFFE
_WAV_FORMATS = {(_WAV_PCM, 8): "u8", (_WAV_FLOAT, 32): "f32le", (_WAV_FLOAT, 64): "f64le"}
_WAV_FORMATS |= {(_WAV_PCM, bits): f"s{bits}le" for bits in (16, 24, 32)}
# Programs that write WAV to a pipe do not know its length: they write 0, all ones, or a value near 2 GiB.
_UNKNOWN_LENGTH = 0x7FFFF000


@dataclass(frozen=True)
class PcmFormat:
    """The format of raw PCM.

    Args:
        rate (`int`): sampling rate in Hz.
        channels (`int`, *optional*, defaults to 1): number of interleaved channels.
        sample_format (`str`, *optional*, defaults to `"s16le"`): one of `SAMPLE_FORMATS`.

    Raises:
        `ValueError`: for an impossible rate, less than one channel, or an unknown sample format.
    """

    rate: int
    channels: int = 1
    sample_format: str = "s16le"

    def __post_init__(self) -> None:
        check_sampling_rate(self.rate)
        if self.channels < 1:
            raise ValueError(f"Expected at least one channel, got {self.channels}.")
        if self.sample_format not in SAMPLE_FORMATS:
            raise ValueError(f"Expected a sample format of {', '.join(SAMPLE_FORMATS)}, got {self.sample_format!r}.")

    @property
    def frame_size(self) -> int:
        """Bytes of one sample of all channels."""
        return SAMPLE_FORMATS[self.sample_format][2] * self.channels

    def samples(self, data: bytes) -> np.ndarray:
        """Whole frames as float32 of shape `(channels, samples)`."""
        subtype, endian, _ = SAMPLE_FORMATS[self.sample_format]
        layout = {"format": "RAW", "samplerate": self.rate, "channels": self.channels}
        layout |= {"subtype": subtype, "endian": endian}
        samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True, **layout)
        return samples.T


def pcm_blocks(file: BinaryIO, raw: PcmFormat | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Mono float32 blocks as they arrive, with their sampling rate; ends with the file.

    Args:
        file (`BinaryIO`): need not be seekable. `read1`, if it has one, returns what has arrived without waiting.
        raw ([`PcmFormat`], *optional*): format of a file that is not WAV. A WAV header takes precedence.

    Raises:
        `ValueError`: if the file is not WAV and no format is given, or if its WAV format is neither PCM nor float.
    """
    read = getattr(file, "read1", file.read)
    head = _read_exactly(file, 12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        pcm, left = _wav_header(file)
        pending = b""
    elif raw is None:
        flags = "name the format with --rate (and --channels, --sample-format if it is not one channel of s16le)"
        hint = f"Of a pipe, {flags}, or pipe WAV. Convert compressed formats: ffmpeg -i INPUT -f wav - | recap live"
        raise ValueError(f"The sound is not WAV. Caption a file with recap timeline. {hint}")
    else:
        pcm, left, pending = raw, None, head
    mix = Mixer(MIXER_PATIENCE)
    while left is None or left > 0:
        data = read(_READ_BYTES if left is None else min(_READ_BYTES, left)) or b""
        if left is not None:
            left -= len(data)
        pending += data
        whole = len(pending) // pcm.frame_size * pcm.frame_size
        if whole:
            yield mix(pcm.samples(pending[:whole])), pcm.rate
            pending = pending[whole:]
        if not data:
            break


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _wav_header(file: BinaryIO) -> tuple[PcmFormat, int | None]:
    """Reads up to the samples: their format, and their number of bytes if the header has it."""
    pcm = None
    while True:
        chunk = _read_exactly(file, 8)
        if len(chunk) < 8:
            raise ValueError("The WAV stream ends before its samples begin.")
        name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            if pcm is None:
                raise ValueError("The WAV stream has samples before their format (no 'fmt ' chunk).")
            return pcm, size if 0 < size < _UNKNOWN_LENGTH else None
        body = _read_exactly(file, size + size % 2)
        if name == b"fmt ":
            pcm = _wav_format(body)


def _wav_format(body: bytes) -> PcmFormat:
    if len(body) < 16:
        raise ValueError("The WAV stream ends before its samples begin.")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if tag == _WAV_EXTENSIBLE and len(body) >= 26:
        tag = struct.unpack("<H", body[24:26])[0]
    if (tag, bits) not in _WAV_FORMATS:
        hint = "Convert it: ffmpeg -i INPUT -f wav - | recap live"
        raise ValueError(f"Expected WAV with PCM of 8 to 32 bits or floats, got format {tag} with {bits} bits. {hint}")
    return PcmFormat(rate, channels, _WAV_FORMATS[tag, bits])
