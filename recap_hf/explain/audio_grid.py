"""Where the encoder states of a recording lie in it: seconds, and frequency bands."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from recap_hf.modeling.configuration_recap import EMBEDDING, encoder_class

# Sampled moments per cell in `to_clip`: 64 are 5 ms apart in CLAP's cells of 0.31 s.
_SAMPLES_PER_CELL = 64


@dataclass(frozen=True)
class AudioGrid:
    """The grid of a recording's encoder states, and the way from it to the time of the recording.

    The encoder divides each window into bands and time cells: 2 x 32 for CLAP's windows of 10 s, so that a cell spans
    half of the mel bins and 0.31 s. A short recording is repeated in its window (`repeatpad`), a long one is divided
    into windows of which the last two may overlap. So several cells may encode the same moment of the recording;
    [`AudioGrid.to_clip`] merges them. A captioner on embeddings has one state a window, a grid of 1 x 1.

    Args:
        num_bands, num_cells (`int`): F and T of one window; its state `band * T + cell` belongs to them.
        window_s (`float`): length of a window in seconds.
        duration_s (`float`): length of the recording in seconds.
        window_starts_s (`tuple[float, ...]`): start of each of the W windows in the recording.
        padding (`str`): how the feature extractor fills a window: "repeatpad", "repeat" or "pad".
        band_edges_hz (`tuple[float, ...]`): F + 1 frequencies, lowest first.
    """

    num_bands: int
    num_cells: int
    window_s: float
    duration_s: float
    window_starts_s: tuple[float, ...]
    padding: str
    band_edges_hz: tuple[float, ...]

    @classmethod
    def of(cls, config: Any, feature_extractor: Any, num_samples: int) -> "AudioGrid":
        """The grid of a recording.

        Args:
            config ([`RecapConfig`]): names the encoder and its sizes.
            feature_extractor ([`RecapFeatureExtractor`]): cuts and fills the windows.
            num_samples (`int`): length of the recording at the extractor's sampling rate.
        """
        num_bands, num_cells = encoder_class(config.clap).grid(config.clap)
        if config.encoder_states == EMBEDDING:
            num_bands = num_cells = 1
        rate = feature_extractor.sampling_rate
        return cls(
            num_bands=num_bands,
            num_cells=num_cells,
            window_s=feature_extractor.nb_max_samples / rate,
            duration_s=num_samples / rate,
            window_starts_s=tuple(start / rate for start in feature_extractor.window_starts(num_samples)),
            padding=feature_extractor.padding,
            band_edges_hz=_band_edges(feature_extractor, num_bands),
        )

    @property
    def cell_s(self) -> float:
        """Length of a cell in seconds."""
        return self.window_s / self.num_cells

    @property
    def shape(self) -> tuple[int, int, int]:
        """(W, F, T): windows, bands, time cells. Flattened, it is the order of the encoder's states."""
        return len(self.window_starts_s), self.num_bands, self.num_cells

    def time_edges(self) -> np.ndarray:
        """Edges of the bins of [`AudioGrid.to_clip`] in seconds: one cell apart, the last at the recording's end."""
        bins = max(1, int(np.ceil(self.duration_s / self.cell_s - 1e-6)))
        return np.append(np.arange(bins) * self.cell_s, self.duration_s)

    def to_clip(self, cells: np.ndarray) -> tuple[np.ndarray, float]:
        """Weights of cells as weights of the recording's moments.

        A moment that several cells encode gets their mean, so that uniform weights stay uniform for any duration.

        Args:
            cells (`np.ndarray` of shape `(W, F, T)`): non-negative.

        Returns:
            `tuple`: `(F, bins)` with the sum 1 (all zero if `cells` are), and the share of `cells` on the padding
            behind the recording.
        """
        bins = len(self.time_edges()) - 1
        moments = (np.arange(self.num_cells * _SAMPLES_PER_CELL) + 0.5) * (self.cell_s / _SAMPLES_PER_CELL)
        source = np.repeat(np.arange(self.num_cells), _SAMPLES_PER_CELL)
        folded, coverage, kept = np.zeros((self.num_bands, bins)), np.zeros(bins), 0.0
        for window, start in zip(np.asarray(cells, dtype=np.float64), self.window_starts_s, strict=True):
            times, inside = self._moments_in_clip(moments, start)
            target = np.minimum((times[inside] / self.cell_s).astype(int), bins - 1)
            values = window[:, source[inside]] / _SAMPLES_PER_CELL
            kept += float(values.sum())
            np.add.at(coverage, target, 1.0)
            np.add.at(folded, (slice(None), target), values)
        folded /= np.maximum(coverage, 1e-12)
        # The last bin may be shorter than the others.
        folded *= np.diff(self.time_edges()) / self.cell_s
        if folded.sum() > 0:
            folded /= folded.sum()
        total = float(cells.sum())
        return folded, 1.0 - kept / total if total > 0 else 0.0

    def _moments_in_clip(self, moments: np.ndarray, start: float) -> tuple[np.ndarray, np.ndarray]:
        """Times in the recording of moments in a window, and which of them are in the recording, not in padding."""
        if self.duration_s >= self.window_s:
            return moments + start, moments + start < self.duration_s
        copies = {"pad": 1, "repeatpad": int(self.window_s / self.duration_s + 1e-9)}.get(self.padding)
        inside = np.ones(len(moments), bool) if copies is None else moments < copies * self.duration_s
        return moments % self.duration_s, inside


class MelAxis:
    """The mel scale of a feature extractor: Slaney's (LAION's checkpoints without fusion) or HTK's.

    Args:
        feature_extractor ([`RecapFeatureExtractor`])
    """

    def __init__(self, feature_extractor: Any) -> None:
        self.slaney = feature_extractor.truncation == "rand_trunc"
        self.bins = feature_extractor.feature_size
        self.low = self.mel(feature_extractor.frequency_min)
        # Mels between the centres of two bins.
        self.step = (self.mel(feature_extractor.frequency_max) - self.low) / (self.bins + 1)

    def mel(self, hz: float) -> float:
        """A frequency in mel."""
        if not self.slaney:
            return 2595.0 * math.log10(1.0 + hz / 700.0)
        return 3.0 * hz / 200.0 if hz < 1000.0 else 15.0 + 27.0 * math.log(hz / 1000.0) / math.log(6.4)

    def place(self, hz: float) -> float:
        """Where a frequency is on an axis on which bin `i` spans `i` to `i + 1`."""
        return (self.mel(hz) - self.low) / self.step - 0.5

    def hz(self, place: float) -> float:
        """The frequency at a place, see `place`."""
        mel = self.low + self.step * (place + 0.5)
        if not self.slaney:
            return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
        return 200.0 * mel / 3.0 if mel < 15.0 else 1000.0 * math.exp(math.log(6.4) * (mel - 15.0) / 27.0)


def _band_edges(feature_extractor: Any, num_bands: int) -> tuple[float, ...]:
    """Edges of the bands in Hz; inner ones halfway, in mel, between the centres of the bins on either side."""
    axis = MelAxis(feature_extractor)
    inner = [axis.hz(axis.bins * band / num_bands) for band in range(1, num_bands)]
    return (float(feature_extractor.frequency_min), *inner, float(feature_extractor.frequency_max))
