"""BLEU, METEOR, ROUGE-L and CIDEr-D through `pycocoevalcap`, with what a bootstrap needs to score any resample.

A corpus score is either the mean of the clips' scores (ROUGE-L, CIDEr-D) or a function of sums over clips (BLEU,
METEOR). Each metric therefore returns, beside its scores, one row of additive statistics a clip and the function
from their sums to the corpus score.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .java import JavaRuntime

BLEU_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")


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


# METEOR 1.5, language en, task "rank": alpha, beta, gamma, delta and the weights of exact, stem, synonym, paraphrase.
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA, _METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]], java: JavaRuntime) -> MetricScores:
    """METEOR 1.5 (Denkowski and Lavie, 2014) through the jar of `pycocoevalcap`, options as there (`-l en -norm`).

    Raises:
        RuntimeError: if the jar fails.
    """
    lines = []
    for caption, refs in zip(captions, references, strict=True):
        texts = [text.replace("|||", " ").strip() for text in (*refs, caption)]
        lines.append(" ||| ".join(["SCORE", *texts]))
    statistics, clips, corpus = _run_meteor(lines, java)
    # The jar takes a caption that matches its reference as a whole for unfragmented: no chunk counts.
    whole = (statistics[:, 21:23] == statistics[:, 0:2]).all(axis=1) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0
    return MetricScores(corpus, clips, statistics, meteor_from_statistics)


def _run_meteor(lines: list[str], java: JavaRuntime) -> tuple[np.ndarray, np.ndarray, float]:
    from pycocoevalcap.meteor import meteor as module

    command = java.command("-Xmx2G", "-jar", module.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
    process = subprocess.Popen(
        command,
        cwd=os.path.dirname(os.path.abspath(module.__file__)),
        env=java.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Never read while it runs: a pipe that fills up would stop the jar.
        stderr=subprocess.DEVNULL,
    )
    try:
        stats = [_ask(process, line) for line in lines]
        _tell(process, " ||| ".join(["EVAL", *stats]))
        scores = [float(process.stdout.readline()) for _ in range(len(lines) + 1)]
        rows = np.array([[float(value) for value in line.split()] for line in stats])
    except (ValueError, BrokenPipeError) as error:
        raise RuntimeError(f"the METEOR jar failed (Java {java.version}, {java.path}): {error}") from error
    finally:
        process.kill()
        process.communicate()
    return rows, np.array(scores[:-1]), scores[-1]


def _tell(process: subprocess.Popen, line: str) -> None:
    process.stdin.write(line.encode("utf-8", errors="replace") + b"\n")
    process.stdin.flush()


def _ask(process: subprocess.Popen, line: str) -> str:
    _tell(process, line)
    answer = process.stdout.readline().decode().strip()
    if len(answer.split()) != 23:
        raise ValueError(f"it answered {answer!r} to {line[:200]!r}")
    return answer


def meteor_from_statistics(sums: np.ndarray, num_clips: int) -> np.ndarray:
    """METEOR of (summed) statistics of the jar, shape (..., 23).

    The 23 are: words and function words of caption and reference (4); for each of the four matchers the matched
    content and function words of both (16); chunks; matched words of both. Formula: Denkowski and Lavie, 2014.
    """
    words, function_words = sums[..., 0:2], sums[..., 2:4]
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # matcher, content or function, caption or reference
    delta = np.array([_METEOR_DELTA, 1 - _METEOR_DELTA])
    matched = np.einsum("...mkc,m,k->...c", matches, _METEOR_WEIGHTS, delta)
    length = _METEOR_DELTA * (words - function_words) + (1 - _METEOR_DELTA) * function_words
    precision, recall = np.moveaxis(_divide(matched, length), -1, 0)
    f_mean = _divide(precision * recall, _METEOR_ALPHA * precision + (1 - _METEOR_ALPHA) * recall)
    fragmentation = _divide(sums[..., 20], sums[..., 21:23].mean(-1))
    return f_mean * (1 - _METEOR_GAMMA * fragmentation**_METEOR_BETA)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator != 0)
