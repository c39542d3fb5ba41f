"""The paper's claims, each with a figure, an interval and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SUPPORTED, REFUTED, OPEN = "supported", "refuted", "open"


@dataclass(frozen=True)
class Claim:
    """One claim on one pair of rows.

    Attributes:
        claim: what is claimed.
        setting: training set, test set and the two rows.
        metric: of the figure.
        difference: mean over the clips (and seeds).
        low, high: 95 % bootstrap interval of the difference over the clips.
        verdict: `supported` or `refuted` where the interval lies on one side of 0, else `open`.
    """

    claim: str
    setting: str
    metric: str
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval says about the claim."""
        if self.low > 0:
            return SUPPORTED
        return REFUTED if self.high < 0 else OPEN


@dataclass(frozen=True)
class ClipScores:
    """Scores of one row on its clips, averaged over the seeds: `values` (num_clips,) by `clip_ids`."""

    clip_ids: tuple[str, ...]
    values: np.ndarray


def difference_claim(
    claim: str, setting: str, metric: str, first: ClipScores, second: ClipScores, resamples: int, seed: int = 0
) -> Claim:
    """The claim that `second` is better than `first`, on the same clips, by paired bootstrap.

    Raises:
        ValueError: if the rows are about different clips.
    """
    if first.clip_ids != second.clip_ids:
        raise ValueError(f"{setting}: the two rows are about different clips")
    return _claim(claim, setting, metric, [second.values - first.values], resamples, seed)


def gain_claim(
    claim: str,
    setting: str,
    metric: str,
    first: ClipScores,
    second: ClipScores,
    larger: Sequence[bool],
    resamples: int,
    seed: int = 0,
) -> Claim:
    """The claim that `second` gains more over `first` on the clips marked in `larger` than on the others.

    Each group of clips is drawn anew by itself.

    Raises:
        ValueError: if the rows are about different clips, or a group has none.
    """
    if first.clip_ids != second.clip_ids:
        raise ValueError(f"{setting}: the two rows are about different clips")
    mask = np.asarray(larger, dtype=bool)
    if mask.all() or not mask.any():
        raise ValueError(f"{setting}: all clips are in one group, so there is nothing to compare")
    gain = second.values - first.values
    return _claim(claim, setting, metric, [gain[mask], -gain[~mask]], resamples, seed)


def _claim(claim: str, setting: str, metric: str, groups: list[np.ndarray], resamples: int, seed: int) -> Claim:
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1) for values in groups]
    low, high = np.quantile(np.sum(means, axis=0), [0.025, 0.975])
    return Claim(claim, setting, metric, float(sum(values.mean() for values in groups)), float(low), float(high))
