"""How well a caption fits a recording by the classes of sounds: those that it names, and those that a tagger or labels
give the recording."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

# A caption fits by the harmonic mean of precision and recall, to this power: half right is an eighth of right. Taggers
# give what they are sure of seldom more than 0.5: the root of their scores counts.
_SHARPNESS = 3


class CaptionClasses:
    """Classes of sounds, and the words by which captions name them.

    Args:
        names: of the classes.
        words: of each class, a regular expression (case-insensitive, found anywhere in a caption).
        parents: of each class, the names of less specific classes that it is one of (`Animal` for `Dog`).

    Raises:
        ValueError: for a class that is there twice, an unknown parent, or an expression that does not compile.
    """

    def __init__(self, names: Sequence[str], words: Sequence[str], parents: Sequence[Sequence[str]]) -> None:
        self.names = list(names)
        self._number = {name: number for number, name in enumerate(names)}
        if len(self._number) != len(self.names):
            twice = next(name for name in names if self.names.count(name) > 1)
            raise ValueError(f"the class {twice!r} is there twice")
        try:
            self._words = [re.compile(text, re.IGNORECASE) if text else None for text in words]
        except re.error as error:
            raise ValueError(f"the expression {error.pattern!r} does not compile: {error}") from error
        self._implied = [self._ancestors(number, parents) for number in range(len(self.names))]

    @classmethod
    def from_csv(cls, path: str | Path) -> "CaptionClasses":
        """Classes of a CSV file with the columns `name`, `words` and, where wanted, `parents` (separated by `;`).

        Raises:
            ValueError: naming the file and what is wrong with it.
        """
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
        if not rows or not {"name", "words"} <= set(rows[0]):
            found = ", ".join(rows[0]) if rows else "none"
            raise ValueError(f"{path}: expected the columns name and words, found {found}")
        parents = [[part.strip() for part in (row.get("parents") or "").split(";") if part.strip()] for row in rows]
        try:
            return cls([row["name"] for row in rows], [row["words"] for row in rows], parents)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _ancestors(self, number: int, parents: Sequence[Sequence[str]]) -> list[int]:
        found: list[int] = []
        waiting = [number]
        while waiting:
            for name in parents[waiting.pop()]:
                if name not in self._number:
                    raise ValueError(f"the parent {name!r} of {self.names[number]!r} is none of the classes")
                if self._number[name] not in found:
                    found.append(self._number[name])
                    waiting.append(self._number[name])
        return found

    def scores(self, clips: Iterable[Mapping[str, float]]) -> np.ndarray:
        """Scores of clips as `(clips, classes)` float32; a class has at least the score of each class that implies it.

        Raises:
            ValueError: for a name that is none of the classes.
        """
        clips = list(clips)
        array = np.zeros((len(clips), len(self.names)), dtype=np.float32)
        for row, given in zip(array, clips, strict=True):
            for name, score in given.items():
                if name not in self._number:
                    raise ValueError(f"a clip has the class {name!r}, which is not among the caption classes")
                number = self._number[name]
                for implied in (number, *self._implied[number]):
                    row[implied] = max(row[implied], score)
        return array

    def named(self, captions: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """What captions name, and what that implies: two arrays `(captions, classes)` bool.

        Of a class and one that implies it, a caption names the specific one.
        """
        captions = list(captions)
        named = np.zeros((len(captions), len(self.names)), dtype=bool)
        implied = np.zeros_like(named)
        for row, text in enumerate(captions):
            named[row] = [words is not None and words.search(text) is not None for words in self._words]
            for number in np.flatnonzero(named[row]):
                implied[row, self._implied[number]] = True
        return named & ~implied, named | implied


def agreement(scores: np.ndarray, named: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """How well each caption fits each clip: `(clips, captions)` float32 from 0 to 1.

    Precision is the mean score of the classes that a caption names, recall the share of the clip's scores that it
    covers. A caption that names no class fits nothing.

    Args:
        scores: `(clips, classes)`, from `CaptionClasses.scores`.
        named, covered: `(captions, classes)`, from `CaptionClasses.named`.
    """
    scores = np.sqrt(scores)
    named, covered = (array.astype(np.float32, copy=False) for array in (named, covered))
    precision = scores @ named.T / np.maximum(named.sum(axis=1), 1)
    recall = scores @ covered.T / np.maximum(scores.sum(axis=1, keepdims=True), 1e-6)
    harmonic = 2 * precision * recall / np.maximum(precision + recall, 1e-6)
    return np.minimum(harmonic, 1.0) ** _SHARPNESS
