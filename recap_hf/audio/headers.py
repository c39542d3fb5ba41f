"""Headers that do not say how long a recording is: WAV of a recorder that crashed, MP3 without a Xing header.

libsndfile takes the first for empty and guesses the length of the second from its first frames.
"""

import shutil
import tempfile
from typing import BinaryIO

# Bytes of a frame at 8 kbit/s and 24 kHz.
_SHORTEST_FRAME = 24
_UNKNOWN_SIZE = b"\xff\xff\xff\xff"
_HEAD_BYTES = 1 << 16
_MAX_TAGS, _MAX_RESYNCS = 16, 1_000
# MPEG versions as a frame's header has them; for each of them kbit/s and rates in Hz by index.
_MPEG1, _MPEG2, _MPEG25 = 3, 2, 0
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {_MPEG1: (44_100, 48_000, 32_000), _MPEG2: (22_050, 24_000, 16_000), _MPEG25: (11_025, 12_000, 8_000)}
# The index of 128 kbit/s (MPEG 1) or 64: its frames have room for a Xing header.
_ROOMY = {_MPEG1: 9, _MPEG2: 8, _MPEG25: 8}


def with_length(data: BinaryIO) -> BinaryIO:
    """The recording at its start, or a copy whose header states its length where its own does not.

    Args:
        data (`BinaryIO`): a seekable file.
    """
    data.seek(0)
    head = data.read(_HEAD_BYTES)
    data.seek(0, 2)
    size = data.tell()
    copy = _wav_with_length(head, size, data) or _mp3_with_length(head, size, data) or data
    copy.seek(0)
    return copy


def _copy(start: bytes, data: BinaryIO, offset: int) -> BinaryIO:
    """`start`, and what follows in `data` from `offset` on."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the reader)
    copy.write(start)
    data.seek(offset)
    shutil.copyfileobj(data, copy)
    return copy


def _wav_with_length(head: bytes, size: int, data: BinaryIO) -> BinaryIO | None:
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    place = 12
    while head[place : place + 4] not in (b"data", b""):
        place += 8 + (_number(head, place + 4) + 1) // 2 * 2
    if head[place : place + 4] != b"data":
        return None
    samples = place + 8
    # Samples follow a size of 0, and not a last chunk of a recording that is empty.
    empty = samples >= size or samples + 8 + _number(head, samples + 4) in (size, size - 1)
    if _number(head, place + 4) or empty:
        return None
    return _copy(head[:4] + _UNKNOWN_SIZE + head[8 : place + 4] + _UNKNOWN_SIZE, data, samples)


def _number(head: bytes, place: int) -> int:
    return int.from_bytes(head[place : place + 4], "little")


def _mp3_with_length(head: bytes, size: int, data: BinaryIO) -> BinaryIO | None:
    start = 0
    for _ in range(_MAX_TAGS):
        if head[:3] != b"ID3" or len(head) < 10:
            break
        # A tag's size has seven bits in a byte.
        start += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        data.seek(start)
        head = data.read(_HEAD_BYTES)
    first = _frame(head)
    if first is None or _frame(head[first[1] : first[1] + 4]) is None:
        return None
    _, length, version, mono = first
    side = (17 if mono else 32) if version == _MPEG1 else (9 if mono else 17)
    if head[4 + side : 8 + side] in (b"Xing", b"Info") or head[36:40] == b"VBRI":
        return None
    frames = _count_frames(data, start, size)
    # The same header with a bit rate that makes the frame long enough, without checksum and padding.
    header = bytes((head[0], head[1] | 1, _ROOMY[version] << 4 | head[2] & 0x0C, head[3]))
    length = _frame(header)[1]
    tag = header + bytes(side) + b"Xing" + (3).to_bytes(4, "big") + frames.to_bytes(4, "big")
    tag += (size - start + length).to_bytes(4, "big")
    return _copy(tag.ljust(length, b"\0"), data, start)


def _frame(head: bytes) -> tuple[int, int, int, bool] | None:
    """Samples, bytes, version and whether it is mono of a Layer III frame, by its first four bytes."""
    word = int.from_bytes(head[:4], "big")
    version, layer, kbps, rate = word >> 19 & 3, word >> 17 & 3, word >> 12 & 15, word >> 10 & 3
    if len(head) < 4 or word >> 21 != 0x7FF or layer != 1 or version == 1 or kbps in (0, 15) or rate == 3:
        return None
    samples = 1152 if version == _MPEG1 else 576
    bits = 1000 * (_KBPS_1 if version == _MPEG1 else _KBPS_2)[kbps]
    return samples, samples // 8 * bits // _RATES[version][rate] + (word >> 9 & 1), version, word >> 6 & 3 == 3


def _count_frames(data: BinaryIO, place: int, size: int) -> int:
    """Frames from `place` to the end; one that is cut counts, so that its lack is noticed. Where there is much garbage
    between frames, as many as there can be."""
    frames = resyncs = 0
    while place < size:
        data.seek(place)
        head = data.read(4)
        found = _frame(head)
        if found is None:
            # Tags at the end hold no frame. Elsewhere the decoder looks for the next frame, too.
            if head[:3] in (b"TAG", b"APE", b"LYR"):
                break
            resyncs += 1
            if resyncs > _MAX_RESYNCS:
                return frames + (size - place) // _SHORTEST_FRAME
            garbage = head[1:] + data.read(_HEAD_BYTES)
            skipped = garbage.find(b"\xff")
            place += len(garbage) + 1 if skipped < 0 else skipped + 1
        else:
            frames, place = frames + 1, place + found[1]
    return frames
