"""METEOR 1.5 through the jar of `pycocoevalcap`, and its formula on summed statistics for bootstraps."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import numpy as np

from .java import JavaRuntime
from .metrics import MetricScores

# Language en, task "rank": alpha, beta, gamma, delta and the weights of exact, stem, synonym, paraphrase.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_NUM_STATISTICS = 23


class MeteorJar:
    """A METEOR 1.5 process (Denkowski and Lavie, 2014), options as in `pycocoevalcap` (`-l en -norm`).

    It takes seconds to start, since it reads its paraphrases, so one process scores all captions. `pycocoevalcap`'s
    own wrapper is not used: it runs the `java` of the PATH, and waits forever on its lock when the jar dies.

    Args:
        java: the Java to run.
    """

    def __init__(self, java: JavaRuntime) -> None:
        self.java = java
        self._process: subprocess.Popen | None = None

    def score(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
        """METEOR of tokenized captions. Raises `RuntimeError` if the jar fails."""
        answers = []
        try:
            for caption, refs in zip(captions, references, strict=True):
                texts = [text.replace("|||", " ").strip() for text in (*refs, caption)]
                self._tell(" ||| ".join(["SCORE", *texts]))
                answers.append(self._process.stdout.readline().decode().strip())
                if len(answers[-1].split()) != _NUM_STATISTICS:
                    raise ValueError(f"it answered {answers[-1]!r} to {caption[:200]!r}")
            self._tell(" ||| ".join(["EVAL", *answers]))
            scores = [float(self._process.stdout.readline()) for _ in range(len(answers) + 1)]
        except (ValueError, OSError) as error:
            self.close()
            raise RuntimeError(
                f"the METEOR jar failed (Java {self.java.version}, {self.java.path}): {error}"
            ) from error
        statistics = np.array([[float(value) for value in answer.split()] for answer in answers])
        # The jar counts no chunk for a caption that matches its reference as a whole.
        whole = (statistics[:, 21:23] == statistics[:, 0:2]).all(axis=1) & (statistics[:, 20] == 1)
        statistics[whole, 20] = 0
        return MetricScores(scores[-1], np.array(scores[:-1]), statistics, meteor_from_statistics)

    def close(self) -> None:
        """Ends the process. The next call of `score` starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        from pycocoevalcap.meteor import meteor as module

        self._process = subprocess.Popen(
            self.java.command("-Xmx2G", "-jar", module.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"),
            cwd=os.path.dirname(os.path.abspath(module.__file__)),
            env=self.java.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Never read while it runs: a pipe that fills up would stop the jar.
            stderr=subprocess.DEVNULL,
        )

    def _tell(self, line: str) -> None:
        if self._process is None:
            self._start()
        self._process.stdin.write(line.encode("utf-8", errors="replace") + b"\n")
        self._process.stdin.flush()


def meteor_from_statistics(sums: np.ndarray, num_clips: int) -> np.ndarray:
    """METEOR (...) of summed statistics of the jar (..., 23).

    The 23 are: words and function words of caption and reference (4); for each of the four matchers the matched
    content and function words of both (16); chunks; matched words of both. Formula: Denkowski and Lavie, 2014.
    """
    words, function_words = sums[..., 0:2], sums[..., 2:4]
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # matcher, content or function, caption or reference
    delta = np.array([_DELTA, 1 - _DELTA])
    matched = np.einsum("...mkc,m,k->...c", matches, _WEIGHTS, delta)
    length = _DELTA * (words - function_words) + (1 - _DELTA) * function_words
    precision, recall = np.moveaxis(_divide(matched, length), -1, 0)
    f_mean = _divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _divide(sums[..., 20], sums[..., 21:23].mean(-1))
    return f_mean * (1 - _GAMMA * fragmentation**_BETA)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator != 0)
