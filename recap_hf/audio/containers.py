"""Recordings that libsndfile does not read: m4a, webm and the audio tracks of videos, by PyAV, which brings FFmpeg."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from recap_hf.modeling.audio_recap import check_sampling_rate

try:
    import av
except ImportError:
    av = None

# Place and bytes by which MP4, Matroska, ASF and AAC files are known.
_CONTAINERS = ((4, b"ftyp"), (0, b"\x1a\x45\xdf\xa3"), (0, b"\x30\x26\xb2\x75"), (0, b"\xff\xf1"), (0, b"\xff\xf9"))


def read_blocks(name: str, data: Any, reason: str) -> Iterator[tuple[np.ndarray, int]]:
    """The first audio track of a file that PyAV reads: float32 blocks of shape `(channels, samples)` and the rate.

    Args:
        name: of the file, for messages.
        data: the file.
        reason: what libsndfile said of it.

    Raises:
        ValueError: for a file without an audio track, or that is no recording.
        ImportError: for a format that PyAV reads, where it is not installed.
    """
    if av is None:
        head = data.read(64)
        if any(head[place : place + len(mark)] == mark for place, mark in _CONTAINERS):
            raise ImportError(f'{name}: m4a, webm, wma, AAC and video files need PyAV: pip install "recap-hf[av]"')
        raise ValueError(
            f"{name}: not a recording that can be read ({reason}). WAV, FLAC, Ogg, Opus and MP3 are read as they are, "
            'm4a, webm and video with: pip install "recap-hf[av]"'
        )
    try:
        with av.open(data) as container:
            if not container.streams.audio:
                raise ValueError(f"{name}: the file has no audio track.")
            stream = container.streams.audio[0]
            sampling_rate = int(stream.codec_context.sample_rate)
            check_sampling_rate(sampling_rate, name)
            resampler = av.AudioResampler(format="fltp", layout=stream.codec_context.layout, rate=sampling_rate)
            # `None` gives what the resampler has left.
            for frame in chain(container.decode(stream), (None,)):
                for block in resampler.resample(frame):
                    yield block.to_ndarray(), sampling_rate
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{name}: not a recording that can be read ({reason}; FFmpeg: {error}).") from error


__all__ = ["read_blocks"]
