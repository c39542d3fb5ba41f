"""BLEU, ROUGE-L and CIDEr-D through `pycocoevalcap`, with what a bootstrap needs to score any resample.

A corpus score is either the mean of the clips' scores (ROUGE-L, CIDEr-D) or a function of sums over clips (BLEU, and
METEOR in `meteor.py`). Each metric therefore returns, beside its scores, one row of additive statistics a clip and the
function from their sums to the corpus score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BLEU_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
# How tables and cards name the scores, in the order of their columns.
METRIC_LABELS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "spice": "SPICE",
    "spider": "SPIDEr",
    "fense": "FENSE",
    "spider_fl": "SPIDEr-FL",
}


@dataclass(frozen=True)
class MetricScores:
    """Scores of one metric.

    Attributes:
        corpus: the corpus score.
        clips: (num_clips,) one score a clip.
        statistics: (num_clips, size) additive statistics.
        aggregate: from sums of statistics (..., size) and the number of clips to corpus scores (...).
    """

    corpus: float
    clips: np.ndarray
    statistics: np.ndarray
    aggregate: Callable[[np.ndarray, int], np.ndarray]


def mean_scores(clips: Sequence[float]) -> MetricScores:
    """`MetricScores` of a metric whose corpus score is the mean of its clips' scores."""
    values = np.asarray(clips, dtype=np.float64)
    return MetricScores(float(values.mean()), values, values[:, None], _mean)


def _mean(sums: np.ndarray, num_clips: int) -> np.ndarray:
    return sums[..., 0] / num_clips


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, MetricScores]:
    """BLEU-1 to BLEU-4 with the closest reference length (Papineni et al., 2002), as `pycocoevalcap` computes it."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, refs in zip(captions, references, strict=True):
        scorer += (caption, list(refs))
    corpus, clips = scorer.compute_score(option="closest", verbose=0)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
        rows.append([length, closest, *counts["guess"], *counts["correct"]])
    statistics = np.asarray(rows, dtype=np.float64)
    return {
        key: MetricScores(float(corpus[n]), np.asarray(clips[n]), statistics, _BleuAggregate(n + 1))
        for n, key in enumerate(BLEU_KEYS)
    }


@dataclass(frozen=True)
class _BleuAggregate:
    order: int

    def __call__(self, sums: np.ndarray, num_clips: int) -> np.ndarray:
        length, closest = sums[..., 0], sums[..., 1]
        guessed, correct = sums[..., 2 : 2 + self.order], sums[..., 6 : 6 + self.order]
        # The two constants are pycocoevalcap's: no division by zero, and 0 stays (almost) 0.
        precision = np.prod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / self.order)
        ratio = (length + 1e-15) / (closest + 1e-9)
        return precision * np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, 1e-3)), 1.0)


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
    """ROUGE-L (beta 1.2), as `pycocoevalcap` computes it."""
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return mean_scores([rouge.calc_score([c], list(refs)) for c, refs in zip(captions, references, strict=True)])


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
    """CIDEr-D, as `pycocoevalcap` computes it (clipped, Gaussian length penalty with sigma 6, times 10).

    Its inverse document frequencies come from the references given, so a clip's score depends on the other clips.

    Raises:
        ValueError: for fewer than two clips, where every document frequency is 1 and every score would read 0.
    """
    if len(captions) < 2:
        raise ValueError("CIDEr-D weighs words by how few clips have them, and needs at least two clips")
    from pycocoevalcap.cider.cider import Cider

    numbers = range(len(captions))
    _, clips = Cider().compute_score(
        {number: list(references[number]) for number in numbers}, {number: [captions[number]] for number in numbers}
    )
    return mean_scores(clips)
