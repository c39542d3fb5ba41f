"""Bootstrap intervals over clips: of one system's scores, and of paired differences between two systems."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .metrics import MetricScores, mean_scores

_CHUNK = 500  # resamples drawn at a time: 500 x 5,000 clips of counts are 20 MB
# Differences below this are rounding: BLEU alone replaces a precision of 0 by about 1e-8.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Difference:
    """One metric of two systems: both scores, second minus first, and the interval of that difference."""

    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0, by more than rounding."""
        return self.low > _ROUNDING or self.high < -_ROUNDING

    @property
    def verdict(self) -> str:
        """What the interval says about the claim that the second is better: supported, refuted or open."""
        return ("supported" if self.low > 0 else "refuted") if self.excludes_zero else "open"

    def to_dict(self) -> dict[str, Any]:
        """The numbers and `excludes_zero`, ready for JSON."""
        return {**asdict(self), "excludes_zero": self.excludes_zero}


def bootstrap_intervals(
    scores: Mapping[str, MetricScores], resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of each corpus score of one system, over its clips.

    Raises:
        ValueError: if the metrics differ in their number of clips or an argument is out of range.
    """
    samples = _samples(scores, resamples, confidence, seed)
    return {key: _interval(values, confidence) for key, values in samples.items()}


def paired_bootstrap(
    first: Mapping, second: Mapping, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """Percentile intervals of `second` minus `first`, when clips are drawn with replacement and both score one draw.

    Corpus scores are recomputed for every draw: BLEU and METEOR from their summed statistics, the others as means.
    CIDEr-D keeps the document frequencies of the whole list.

    Args:
        first, second: scores of the systems by metric, clips in the same order; metrics of one system are left out.
        resamples: number of draws, at least 100.
        confidence: of the intervals, between 0 and 1.
        seed: of the draws.

    Raises:
        ValueError: if the numbers of clips differ or an argument is out of range.
    """
    shared = [key for key in first if key in second]
    systems = [{key: scores[key] for key in shared} for scores in (first, second)]
    _num_clips([score for scores in systems for score in scores.values()])
    # One seed and one number of clips: both systems get the same draws.
    before, after = (_samples(scores, resamples, confidence, seed) for scores in systems)
    differences = {}
    for key in shared:
        one, two = first[key].corpus, second[key].corpus
        differences[key] = Difference(one, two, two - one, *_interval(after[key] - before[key], confidence))
    return differences


def mean_difference(first: np.ndarray, second: np.ndarray, resamples: int = 10_000) -> Difference:
    """Mean of `second` minus that of `first`, (num_clips,) each, with its paired interval over the clips."""
    return paired_bootstrap({"": mean_scores(first)}, {"": mean_scores(second)}, resamples)[""]


def gain_difference(gains: np.ndarray, larger: np.ndarray, resamples: int = 10_000) -> Difference:
    """Mean gain of the clips marked in `larger` minus that of the other clips; each group is drawn by itself.

    Args:
        gains: (num_clips,) difference of two systems on each clip.
        larger: (num_clips,) True for the clips whose gain is claimed to be larger.
        resamples: number of draws.

    Raises:
        ValueError: if a group has no clip.
    """
    groups = [gains[~larger], gains[larger]]
    if not all(map(len, groups)):
        raise ValueError("all clips are in one group, so there is nothing to compare")
    one, two = (float(group.mean()) for group in groups)
    drawn = [
        np.concatenate([counts @ group / len(group) for counts in _counts(len(group), resamples, seed)])
        for seed, group in enumerate(groups)
    ]
    return Difference(one, two, two - one, *_interval(drawn[1] - drawn[0], 0.95))


def _num_clips(scores: Collection[MetricScores]) -> int:
    sizes = {len(score.clips) for score in scores}
    if len(sizes) != 1:
        raise ValueError(f"expected scores of one list of clips, but they have {sorted(sizes) or 'no'} clips")
    return sizes.pop()


def _samples(scores: Mapping, resamples: int, confidence: float, seed: int) -> dict[str, np.ndarray]:
    """(resamples,) corpus scores of each metric."""
    if resamples < 100:
        raise ValueError(f"{resamples} resamples give no interval; expected at least 100")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95")
    num_clips = _num_clips(scores.values())
    samples: dict[str, list[np.ndarray]] = {key: [] for key in scores}
    for counts in _counts(num_clips, resamples, seed):
        for key, score in scores.items():
            samples[key].append(score.aggregate(counts @ score.statistics, num_clips))
    return {key: np.concatenate(values) for key, values in samples.items()}


def _counts(num_clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each clip is drawn, up to (500, num_clips) at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        drawn = generator.integers(num_clips, size=(min(_CHUNK, resamples - start), num_clips))
        offsets = np.arange(len(drawn))[:, None] * num_clips
        yield np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _interval(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
