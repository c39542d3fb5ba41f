"""Recordings that libsndfile does not read: m4a, webm and the audio tracks of videos, by PyAV, which brings FFmpeg."""

import hashlib
import warnings
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
# FFmpeg reads the given bytes and opens nothing else. Playlists, SDP and lists of files are no recordings.
_NOTHING_ELSE = {
    "protocol_whitelist": "none",
    "format_whitelist": "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,mov,mp3,mp4,mpc,"
    "mpc8,mpeg,mpegts,ogg,rm,tta,voc,w64,wav,webm,wv,xwma",
}
# Their headers state how long the recording is (MP3: `with_length`); of the others FFmpeg guesses it.
_WITH_DURATION = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf", "avi", "caf", "flac", "wav", "mp3")
_MAX_DAMAGED = 1_000
# Of all channels.
BLOCK_SAMPLES = 1 << 22
_ERRORS = (OSError, RuntimeError, MemoryError, EOFError, *(() if av is None else (av.FFmpegError,)))


def read_container(name: str, data: Any, reason: str, frames: int, is_cut: bool = False) -> Iterator[tuple[Any, int]]:
    """The first audio track of a file that PyAV reads: float32 blocks of shape `(channels, samples)` and the rate.

    Args:
        name: of the file, for messages.
        data: the file.
        reason: what libsndfile said of it.
        frames: samples of each channel in a block, at least.
        is_cut: whether the file is known to end early.

    Raises:
        ValueError: for a file without an audio track, or that is no recording. A file that is cut or damaged gives
            what can be read, and a warning.
        ImportError: for a format that PyAV reads, where it is not installed.
    """
    if av is None:
        head = data.read(64)
        if any(head[place : place + len(mark)] == mark for place, mark in _CONTAINERS):
            raise ImportError(f'{name}: m4a, webm, wma, AAC and video files need PyAV: pip install "recap-hf[av]"')
        hint = "WAV, FLAC, Ogg, Opus and MP3 are read as they are, m4a, webm and video with: pip install"
        raise ValueError(f'{name}: not a recording that can be read ({reason}). {hint} "recap-hf[av]"')
    read, rate, damage = 0, 0, "the file ends early" if is_cut else ""
    try:
        with av.open(data, options=_NOTHING_ELSE, metadata_errors="replace") as container:
            stream = _audio_stream(name, container)
            rate = int(stream.codec_context.sample_rate)
            check_sampling_rate(rate, name)
            track = _Track(stream)
            for block in track.blocks(container, frames):
                read += block.shape[1]
                yield block, rate
            seconds, damage = _seconds(container, stream), track.damage or damage
            if not damage and read < (0.98 * seconds - 0.1) * rate:
                damage = f"its header announces {seconds:.1f} s"
    except _ERRORS as error:
        damage = _reason(error)
    if damage and not read:
        raise ValueError(f"{name}: not a recording that can be read ({reason}; FFmpeg: {damage}).")
    if damage:
        warn_cut(name, read / rate, damage)


def payload_hash(path: Any) -> str:
    """SHA-256 of the encoded packets of all tracks of a file, whatever its metadata are.

    Raises:
        ValueError: for a file that FFmpeg cannot read to its end. ImportError: without PyAV.
    """
    if av is None:
        raise ImportError('PyAV is needed: pip install "recap-hf[av]"')
    digests: dict[int, Any] = {}
    try:
        with open(path, "rb") as data, av.open(data, options=_NOTHING_ELSE, metadata_errors="replace") as container:
            for packet in container.demux():
                digests.setdefault(packet.stream_index, hashlib.sha256()).update(bytes(packet))
    except _ERRORS as error:
        raise ValueError(f"{path}: damaged ({_reason(error)})") from error
    return " ".join(f"{number}:{digest.hexdigest()}" for number, digest in sorted(digests.items()))


def warn_cut(name: str, seconds: float, reason: str) -> None:
    """Warns that the end or a part of a recording is missing."""
    warnings.warn(f"{name}: cut off or damaged ({reason}): {seconds:.1f} s could be read.", stacklevel=2)


def _audio_stream(name: str, container: Any) -> Any:
    streams = container.streams.audio
    if not streams:
        raise ValueError(f"{name}: the file has no audio track.")
    stream = next((one for one in streams if one.codec_context is not None), None)
    if stream is None:
        raise ValueError(f"{name}: the codec of the audio track is not known.")
    return stream


def _seconds(container: Any, stream: Any) -> float:
    """Length of the track by the header, or 0 where it does not say."""
    if container.format.name not in _WITH_DURATION:
        return 0.0
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # Of the longest track.
    alone = len(container.streams) == 1
    return (container.duration or 0) / av.time_base if alone else 0.0


def _reason(error: Exception) -> str:
    # The text of an error of FFmpeg names the file, too.
    return str(getattr(error, "strerror", None) or error)


class _Track:
    """The blocks of an audio stream. `damage` says what could not be decoded."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.format = (stream.codec_context.layout.nb_channels, stream.codec_context.sample_rate)
        self.damage = ""

    def blocks(self, container: Any, frames: int) -> Iterator[np.ndarray]:
        codec = self.stream.codec_context
        # Packed samples: of planar ones PyAV 18 reads beyond the memory of 8 channels.
        resampler = av.AudioResampler(format="flt", layout=codec.layout, rate=codec.sample_rate)
        frames, waiting = min(frames, BLOCK_SAMPLES // max(1, self.format[0])), []
        # `None` gives what the resampler has left.
        for frame in chain(self._frames(container), (None,)):
            for part in resampler.resample(frame):
                waiting.append(part.to_ndarray().reshape(-1, part.layout.nb_channels).T)
            if sum(part.shape[1] for part in waiting) >= frames:
                yield np.concatenate(waiting, axis=1)
                waiting = []
        if waiting:
            yield np.concatenate(waiting, axis=1)

    def _frames(self, container: Any) -> Iterator[Any]:
        damaged = 0
        packets = container.demux(self.stream)
        while damaged < _MAX_DAMAGED:
            try:
                packet = next(packets, None)
            except _ERRORS as error:
                self.damage = _reason(error)
                return
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:
                # As FFmpeg does: the packets behind a damaged one are decoded.
                self.damage, damaged = _reason(error), damaged + 1
                continue
            for frame in decoded:
                if (frame.layout.nb_channels, frame.sample_rate) != self.format:
                    self.damage = "the number of channels or the sampling rate changes"
                    return
                yield frame
