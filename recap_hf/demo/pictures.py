"""A recording as data for the page: waveform, spectrogram, axes, player, maps of words, clock times."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from recap_hf.explain.audio_grid import MelAxis
from recap_hf.explain.picture import clip_spectrogram
from recap_hf.modeling.audio_recap import resample

_COLUMNS = 640
_RANGE_DB = 80.0
_FREQUENCY_MARKS = (250, 1_000, 4_000, 10_000)  # Hz
_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1_800, 3_600)  # s
_PLAYER_RATE = 32_000  # Hz


@dataclass
class Picture:
    """The drawn parts of a recording.

    Attributes:
        outline: SVG path of the waveform in a box of 640 x 100, zero at 50.
        spectrogram: PNG as a data URI, low frequencies at the bottom.
        frequency_marks: `(label, per cent from the top)`.
        time_marks: `(label, per cent from the left)`.
    """

    outline: str
    spectrogram: str
    frequency_marks: list[tuple[str, float]]
    time_marks: list[tuple[str, float]]


def draw(waveform: np.ndarray, feature_extractor: Any) -> Picture:
    """Draws a waveform `(num_samples,)` at the feature extractor's rate, as the model's spectrogram shows it."""
    from matplotlib import colormaps

    axis = MelAxis(feature_extractor)
    marks = [
        (f"{hz} Hz" if hz < 1_000 else f"{hz / 1_000:g} kHz", 100 * (1 - axis.place(hz) / axis.bins))
        for hz in _FREQUENCY_MARKS
        if feature_extractor.frequency_min < hz < feature_extractor.frequency_max
    ]
    pixels = colormaps["magma"](levels(waveform, feature_extractor)[::-1], bytes=True)[..., :3]
    seconds = len(waveform) / feature_extractor.sampling_rate
    return Picture(outline(waveform), _png(pixels), marks, time_marks(seconds))


def outline(waveform: np.ndarray) -> str:
    """The SVG path around a waveform, scaled to the loudest sample."""
    columns = min(_COLUMNS, len(waveform))
    parts = np.array_split(waveform, columns)
    peak = max(float(np.abs(waveform).max()), 1e-9)
    x = _COLUMNS * (np.arange(columns) + 0.5) / columns
    # Half a unit from the middle: a line stays visible in silence.
    tops = np.minimum(49.5, [50 - 48 * float(part.max()) / peak for part in parts])
    bottoms = np.maximum(50.5, [50 - 48 * float(part.min()) / peak for part in parts])
    there, back = ([f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)] for y in (tops, bottoms))
    return f"M{' L'.join(there + back[::-1])} Z"


def levels(waveform: np.ndarray, feature_extractor: Any) -> np.ndarray:
    """The model's spectrogram `(mels, columns)` in [0, 1]: 0 is 80 dB below the loudest value."""
    decibels = clip_spectrogram(waveform, feature_extractor.sampling_rate, feature_extractor)
    columns = np.array_split(decibels, min(_COLUMNS, len(decibels)))
    loudest = np.stack([column.max(axis=0) for column in columns], axis=1)
    return ((loudest - loudest.max()) / _RANGE_DB + 1).clip(0, 1)


def word_map(audio_map: np.ndarray, time_edges_s: np.ndarray, band_edges_hz: np.ndarray, clip: Any) -> str:
    """A dark cover for the spectrogram of a [`Recording`], transparent where a word depends on the sound, as PNG.

    Args:
        audio_map: weights of shape `(bands, bins)`, low bands first; one is above 0.
        time_edges_s, band_edges_hz: edges of bins and bands.
    """
    rows, columns = 48, 320
    seconds = (np.arange(columns) + 0.5) / columns * clip.seconds
    axis = MelAxis(clip.feature_extractor)
    edges = [axis.place(hz) for hz in band_edges_hz]
    places = (np.arange(rows) + 0.5) / rows * axis.bins
    bins = np.clip(np.searchsorted(time_edges_s, seconds) - 1, 0, audio_map.shape[1] - 1)
    bands = np.clip(np.searchsorted(edges, places) - 1, 0, audio_map.shape[0] - 1)
    weights = audio_map[bands[::-1]][:, bins] / audio_map.max()
    pixels = np.zeros((rows, columns, 4), dtype=np.uint8)
    pixels[..., 3] = (215 * (1 - weights)).astype(np.uint8)
    return _png(pixels)


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def player_source(waveform: np.ndarray, sampling_rate: int) -> str:
    """A waveform as MP3, which every browser plays, in a data URI."""
    import soundfile

    buffer = io.BytesIO()
    samples = resample(waveform, sampling_rate, _PLAYER_RATE).clip(-1, 1)
    soundfile.write(buffer, samples, _PLAYER_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return data_uri("audio/mpeg", buffer.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """A file as a URI for HTML; empty for no data."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}" if data else ""


def time_marks(seconds: float) -> list[tuple[str, float]]:
    """At most eight marks of a time axis: `(label, per cent from the left)`."""
    step = next((step for step in _TIME_STEPS if seconds / step <= 7), _TIME_STEPS[-1])
    times = [number * step for number in range(int(seconds / step + 1e-9) + 1)]
    return [(clock(time, decimals=step < 1), 100 * time / seconds) for time in times]


def clock(seconds: float, decimals: bool = False) -> str:
    """Seconds as minutes and seconds, `1:05`, or with a tenth, `1:05.3`."""
    tenths = round(seconds * 10) if decimals else round(seconds) * 10
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if decimals else "")
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def length_in_words(seconds: float) -> str:
    """A length: `13.0 seconds`, from a minute on `1:05 minutes`."""
    return f"{seconds:.1f} seconds" if seconds < 59.95 else f"{clock(seconds)} minutes"
