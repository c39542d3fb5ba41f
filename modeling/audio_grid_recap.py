"""Where the vectors that the cross-attention reads lie in a recording: seconds, and bands of frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

# Moments within a cell that are followed back to the recording: 64 are 5 ms apart in CLAP's cells of 0.31 s.
_SAMPLES_PER_CELL = 64


@dataclass(frozen=True)
class AudioGrid:
    """The cells of a recording's encoder states, and the way from them to the recording's own time.

    The audio tower sees windows of 10 s and ends in a grid of bands and time cells for each: 2 x 32 for CLAP's HTSAT,
    so that a cell spans half of the mel bins and 0.31 s. A short recording stands several times in its window
    (`repeatpad`), a long one in several windows of which the last two may overlap: every moment of the recording is
    then seen by several cells, and [`AudioGrid.to_clip`] brings these together.

    Args:
        num_bands, num_cells (`int`): F and T, the grid of one window; position `band * T + cell` of its states.
        window_s (`float`): length of a window in seconds.
        duration_s (`float`): length of the recording in seconds.
        window_starts_s (`tuple[float, ...]`): where each of the W windows begins in the recording.
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
    def of(cls, config: Any, feature_extractor: Any, num_samples: int) -> AudioGrid:
        """The grid of a recording.

        Args:
            config ([`RecapConfig`]): tells the audio tower's sizes.
            feature_extractor ([`RecapFeatureExtractor`]): cuts and fills the windows.
            num_samples (`int`): length of the recording at the extractor's sampling rate.
        """
        audio = config.clap.audio_config
        freq_ratio = audio.spec_size // audio.num_mel_bins
        stride = audio.patch_stride[0] if isinstance(audio.patch_stride, (list, tuple)) else audio.patch_stride
        # The tower lays four stretches of time above each other as a square picture and halves it between stages.
        side = audio.spec_size // stride // 2 ** (len(audio.depths) - 1)
        rate = feature_extractor.sampling_rate
        return cls(
            num_bands=side // freq_ratio,
            num_cells=side * freq_ratio,
            window_s=feature_extractor.nb_max_samples / rate,
            duration_s=num_samples / rate,
            window_starts_s=tuple(start / rate for start in feature_extractor.window_starts(num_samples)),
            padding=feature_extractor.padding,
            band_edges_hz=_band_edges(feature_extractor, side // freq_ratio),
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
        """Edges in seconds of the bins of [`AudioGrid.to_clip`]: as long as a cell, the last one cut at the end."""
        bins = max(1, int(np.ceil(self.duration_s / self.cell_s - 1e-6)))
        return np.append(np.arange(bins) * self.cell_s, self.duration_s)

    def to_clip(self, cells: np.ndarray) -> tuple[np.ndarray, float]:
        """Weights of cells as weights of the recording's own moments.

        A moment that several cells have seen gets their mean, so that even weights stay even whatever the length.

        Args:
            cells (`np.ndarray` of shape `(W, F, T)`): non-negative.

        Returns:
            `tuple`: `(F, bins)` with the sum 1 (all zero where `cells` are), and the share of `cells` that lay on the
            silence behind the recording in its window.
        """
        total = float(cells.sum())
        folded, coverage, kept = self._fold(np.asarray(cells, dtype=np.float64))
        folded /= np.maximum(coverage, 1e-12)
        # The last bin is shorter than the others: its weight is what its stretch of time deserves.
        folded *= np.diff(self.time_edges()) / self.cell_s
        if folded.sum() > 0:
            folded /= folded.sum()
        return folded, 1.0 - kept / total if total > 0 else 0.0

    def _fold(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        bins = len(self.time_edges()) - 1
        moments = (np.arange(self.num_cells * _SAMPLES_PER_CELL) + 0.5) * (self.cell_s / _SAMPLES_PER_CELL)
        source = np.repeat(np.arange(self.num_cells), _SAMPLES_PER_CELL)
        folded, coverage, kept = np.zeros((self.num_bands, bins)), np.zeros(bins), 0.0
        for window, start in zip(cells, self.window_starts_s, strict=True):
            times, heard = self._moments_in_clip(moments, start)
            target = np.minimum((times[heard] / self.cell_s).astype(int), bins - 1)
            values = window[:, source[heard]] / _SAMPLES_PER_CELL
            kept += float(values.sum())
            np.add.at(coverage, target, 1.0)
            for band in range(self.num_bands):
                np.add.at(folded[band], target, values[band])
        return folded, coverage, kept

    def _moments_in_clip(self, moments: np.ndarray, start: float) -> tuple[np.ndarray, np.ndarray]:
        """Times in the recording of moments in a window, and which of these are the recording and not padding."""
        if self.duration_s >= self.window_s:
            return moments + start, moments + start < self.duration_s
        copies = {"pad": 1, "repeatpad": int(self.window_s / self.duration_s + 1e-9)}.get(self.padding)
        heard = np.ones(len(moments), bool) if copies is None else moments < copies * self.duration_s
        return moments % self.duration_s, heard


def _band_edges(feature_extractor: Any, num_bands: int) -> tuple[float, ...]:
    """Frequencies between the bands: halfway, in mel, between the centres of the bins on either side."""
    scale = "slaney" if feature_extractor.truncation == "rand_trunc" else "htk"
    low = hertz_to_mel(float(feature_extractor.frequency_min), mel_scale=scale)
    high = hertz_to_mel(float(feature_extractor.frequency_max), mel_scale=scale)
    bins = feature_extractor.feature_size
    step = (high - low) / (bins + 1)
    inner = [low + step * (bins * band / num_bands + 0.5) for band in range(1, num_bands)]
    return tuple(float(mel_to_hertz(mel, mel_scale=scale)) for mel in (low, *inner, high))


__all__ = ["AudioGrid"]
