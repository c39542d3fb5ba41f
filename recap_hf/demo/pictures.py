"""What a recording looks like, as data for the page: the outline of its waveform, its spectrogram, time marks."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_COLUMNS = 640
_FFT = 2048
# More would leave the lowest bands without a bin of the transform.
_MEL_BANDS = 96
_RANGE_DB = 80.0
_FREQUENCY_MARKS = (250, 1_000, 4_000, 10_000)  # Hz
_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1_800, 3_600)  # s
_PLAYER_RATE = 32_000  # Hz: enough for what one wants to hear, and a small page


@dataclass
class Picture:
    """Drawn parts of a recording.

    Attributes:
        outline: SVG path of the waveform in a box of 640 x 100, the middle at 50.
        spectrogram: PNG as a data URI, low frequencies at the bottom.
        frequency_marks: `(label, per cent from the top)`.
        time_marks: `(label, per cent from the left)`.
    """

    outline: str
    spectrogram: str
    frequency_marks: list[tuple[str, float]]
    time_marks: list[tuple[str, float]]


def draw(waveform: np.ndarray, sampling_rate: int, low_hz: float, high_hz: float) -> Picture:
    """Draws a recording.

    Args:
        waveform: float32 of shape `(num_samples,)`.
        sampling_rate: in Hz.
        low_hz, high_hz: what the spectrogram shows, on a mel scale.
    """
    marks = []
    low, high = _mel(low_hz), _mel(high_hz)
    for frequency in _FREQUENCY_MARKS:
        if low_hz < frequency < high_hz:
            label = f"{frequency} Hz" if frequency < 1_000 else f"{frequency / 1_000:g} kHz"
            marks.append((label, 100 * (1 - (_mel(frequency) - low) / (high - low))))
    high_hz = min(high_hz, sampling_rate / 2)
    levels = mel_levels(waveform, sampling_rate, low_hz, high_hz)
    return Picture(outline(waveform), png(levels[::-1]), marks, time_marks(len(waveform) / sampling_rate))


def outline(waveform: np.ndarray) -> str:
    """The SVG path around a waveform: loudest samples up, lowest back; scaled to the loudest."""
    columns = min(_COLUMNS, len(waveform))
    parts = np.array_split(waveform, columns)
    peak = max(float(np.abs(waveform).max()), 1e-9)
    tops = [50 - 48 * float(part.max()) / peak for part in parts]
    bottoms = [50 - 48 * float(part.min()) / peak for part in parts]
    x = [_COLUMNS * (column + 0.5) / columns for column in range(columns)]
    # A line of half a unit stays visible where nothing sounds.
    there = [f"{a:.1f},{min(top, 49.5):.1f}" for a, top in zip(x, tops, strict=True)]
    back = [f"{a:.1f},{max(bottom, 50.5):.1f}" for a, bottom in zip(x, bottoms, strict=True)]
    return f"M{' L'.join(there + back[::-1])} Z"


def mel_levels(waveform: np.ndarray, sampling_rate: int, low_hz: float, high_hz: float) -> np.ndarray:
    """The level in each mel band, float32 of shape `(96, columns)` in [0, 1]: 80 dB below the loudest is 0."""
    import torch

    hop = max(_FFT // 8, -(-len(waveform) // _COLUMNS))
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)),
        n_fft=_FFT,
        hop_length=hop,
        window=torch.hann_window(_FFT),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    filters = torch.from_numpy(_filters(sampling_rate, low_hz, high_hz))
    power = (filters.T @ spectrum.abs().square()).clamp(min=1e-10)
    levels = 10 * power.log10()
    return ((levels - levels.max()) / _RANGE_DB + 1).clamp(0, 1).numpy()


@cache
def _filters(sampling_rate: int, low_hz: float, high_hz: float) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=_FFT // 2 + 1,
        num_mel_filters=_MEL_BANDS,
        min_frequency=low_hz,
        max_frequency=high_hz,
        sampling_rate=sampling_rate,
        mel_scale="htk",
        triangularize_in_mel_space=True,
    )
    return bank.astype(np.float32)


def _mel(hertz: Any) -> Any:
    """The HTK mel scale."""
    return 2_595.0 * np.log10(1.0 + hertz / 700.0)


def png(levels: np.ndarray) -> str:
    """An image of levels in [0, 1], dark to bright, as a data URI."""
    from matplotlib import colormaps
    from PIL import Image

    pixels = colormaps["magma"](levels, bytes=True)[..., :3]
    return _data_uri(Image.fromarray(np.ascontiguousarray(pixels)))


def _data_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return png_source(buffer.getvalue())


def png_source(data: bytes) -> str:
    """A PNG as a data URI; none of no data."""
    return "data:image/png;base64," + base64.b64encode(data).decode() if data else ""


def spotlight(audio_map: np.ndarray, time_edges_s: np.ndarray, band_edges_hz: np.ndarray, clip: Any) -> str | None:
    """A dark cover for the spectrogram, open where a word was heard, as a PNG data URI.

    Args:
        audio_map: weights of shape `(bands, bins)`, low bands first.
        time_edges_s, band_edges_hz: edges of bins and bands.
        clip ([`Recording`]): whose spectrogram is covered.

    Returns:
        `None` where nothing in the sound speaks for the word.
    """
    from PIL import Image

    if audio_map.max(initial=0) <= 0:
        return None
    rows, columns = 48, 320
    seconds = (np.arange(columns) + 0.5) / columns * clip.seconds
    low, high = _mel(clip.low_hz), _mel(clip.high_hz)
    mels = low + (np.arange(rows) + 0.5) / rows * (high - low)
    bins = np.clip(np.searchsorted(time_edges_s, seconds) - 1, 0, audio_map.shape[1] - 1)
    bands = np.clip(np.searchsorted(_mel(np.asarray(band_edges_hz)), mels) - 1, 0, audio_map.shape[0] - 1)
    weights = audio_map[bands[::-1]][:, bins] / audio_map.max()
    pixels = np.zeros((rows, columns, 4), dtype=np.uint8)
    pixels[..., 3] = (215 * (1 - weights)).astype(np.uint8)
    return _data_uri(Image.fromarray(pixels))


def time_marks(seconds: float) -> list[tuple[str, float]]:
    """At most eight marks of a time axis: `(label, per cent from the left)`."""
    step = next((step for step in _TIME_STEPS if seconds / step <= 7), _TIME_STEPS[-1])
    marks = []
    for number in range(int(seconds / step + 1e-9) + 1):
        marks.append((clock(number * step, decimals=step < 1), 100 * number * step / seconds))
    return marks


def clock(seconds: float, decimals: bool = False) -> str:
    """Seconds as minutes and seconds, `1:05`, or with a tenth, `1:05.3`."""
    tenths = round(seconds * 10) if decimals else round(seconds) * 10
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if decimals else "")
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def length_in_words(seconds: float) -> str:
    """A recording's length: `13.0 seconds`, from a minute on `1:05 minutes`."""
    return f"{seconds:.1f} seconds" if seconds < 59.95 else f"{clock(seconds)} minutes"


def player_source(waveform: np.ndarray, sampling_rate: int) -> str:
    """The recording as a data URI that every browser plays (MP3)."""
    import soundfile

    from recap_hf.modeling.audio_recap import resample

    samples = resample(waveform, sampling_rate, _PLAYER_RATE).clip(-1, 1)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, _PLAYER_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
