"""What counts as naming an event in a caption, and the figures that follow from it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from recipes.recap_tiny.lexicon import HEARD, SPECIAL, other_sounds

__all__ = ["NamingRules", "Outcome", "bootstrap", "figures", "order_said", "outcome"]

# Words of which any names the event; a space in a word is a space or a hyphen.
_WORDS: dict[str, str] = {
    "dog_bark": "dog dogs puppy bark barks barked barking",
    "rain": "rain rains raining rainfall raindrop raindrops drizzle downpour",
    "sea_waves": "wave waves surf ocean sea",
    "baby_cry": "baby babies infant infants newborn",
    "clock_tick": "clock clocks tick ticks ticking",
    "person_sneeze": "sneeze sneezes sneezed sneezing",
    "helicopter": "helicopter helicopters chopper",
    "chainsaw": "chainsaw chainsaws",
    "rooster": "rooster roosters cock cockerel",
    "fire_crackling": "fire fires campfire bonfire fireplace flame flames",
    "saxophone": "sax saxophone saxophones",
    "violin": "violin violins fiddle",
    "snare_drum": "snare snares",
    "hi_hat": "hi-hat hi-hats hihat",
    "flute": "flute flutes",
    "double_bass": "double-bass upright-bass contrabass",
    "clarinet": "clarinet clarinets",
    "cello": "cello cellos",
    "bass_drum": "bass-drum bass-drums kick-drum kick-drums",
    "acoustic_guitar": "guitar guitars",
    "man_speaking": "speech speaking speaks talking talks",
}


def _pattern(words: list[str]) -> re.Pattern[str]:
    spelt = (re.escape(word).replace(r"\-", "[ -]?") for word in sorted(words, key=len, reverse=True))
    return re.compile(r"\b(?:" + "|".join(spelt) + r")\b")


@dataclass(frozen=True)
class NamingRules:
    """`events`: event -> expression on the lower-cased caption; `foreign`: expression of sounds that are no event."""

    events: dict[str, re.Pattern[str]]
    foreign: re.Pattern[str]

    @classmethod
    @lru_cache(maxsize=1)
    def ours(cls) -> NamingRules:
        """The rules of this project: words of the events, and every phrase of the vocabulary's other sounds."""
        phrases = [phrase for forms in other_sounds().values() for phrase in forms]
        return cls({event: _pattern(words.split()) for event, words in _WORDS.items()}, _pattern(phrases))

    @classmethod
    def read(cls, path: str | Path) -> NamingRules:
        """Rules of a JSON file {"events": {event: expression}, "foreign": expression}.

        Raises:
            ValueError: the file is no such JSON, or lacks an event.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rules = cls(
                {event: re.compile(text) for event, text in data["events"].items()}, re.compile(data["foreign"])
            )
        except (KeyError, AttributeError, json.JSONDecodeError, re.error) as error:
            raise ValueError(
                f'{path} is no file of naming rules: expected {{"events": {{event: expression}}, "foreign": '
                f"expression}}, got {error!r}"
            ) from error
        missing = set(HEARD) - set(rules.events)
        if missing:
            raise ValueError(f"{path} has no expression for {', '.join(sorted(missing))}")
        return rules

    def named(self, caption: str) -> set[str]:
        """Events that a caption names."""
        text = caption.lower()
        return {event for event, pattern in self.events.items() if pattern.search(text)}

    def foreign_words(self, caption: str) -> set[str]:
        """Sounds that a caption names and that are no event."""
        return {match.group(0) for match in self.foreign.finditer(caption.lower())}


@dataclass(frozen=True)
class Outcome:
    """Of one clip: events named rightly, falsely (foreign sounds included), missed; named in all; set exact."""

    right: int
    false: int
    missed: int
    named: int
    exact: bool


def outcome(caption: str, truth: set[str], rules: NamingRules) -> Outcome:
    """Compare a caption with the events of its clip."""
    named = rules.named(caption)
    foreign = rules.foreign_words(caption)
    return Outcome(
        right=len(named & truth),
        false=len(named - truth) + len(foreign),
        missed=len(truth - named),
        named=len(named) + len(foreign),
        exact=named == truth and not foreign,
    )


def _table(outcomes: list[Outcome]) -> np.ndarray:
    return np.array([[o.right, o.false, o.missed, o.named, o.exact] for o in outcomes], dtype=np.float64)


def _figures_of(sums: np.ndarray, count: int) -> np.ndarray:
    """precision, recall, F1, exact, events per caption of summed columns (..., 5)."""
    right, false, missed, named, exact = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.nan_to_num(right / (right + false))
        recall = np.nan_to_num(right / (right + missed))
        f1 = np.nan_to_num(2 * right / (2 * right + false + missed))
    return np.stack([precision, recall, f1, exact / count, named / count], axis=-1)


FIGURES = ("precision", "recall", "f1", "exact_set", "events_per_caption")


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1, share of exact sets, events per caption."""
    values = _figures_of(_table(outcomes).sum(axis=0), len(outcomes))
    return dict(zip(FIGURES, values.tolist(), strict=True))


def bootstrap(
    outcomes: list[Outcome], reference: list[Outcome] | None = None, samples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals over clips; with `reference`, of the paired difference `outcomes` - `reference`."""
    rng = np.random.default_rng(seed)
    count = len(outcomes)
    picks = rng.integers(count, size=(samples, count))
    values = _figures_of(_table(outcomes)[picks].sum(axis=1), count)
    if reference is not None:
        values = values - _figures_of(_table(reference)[picks].sum(axis=1), count)
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(FIGURES, low, high, strict=True)}


def order_said(caption: str, first: str, second: str, rules: NamingRules) -> bool | None:
    """Whether a caption that names both events says that `first` came first; None where it names no order."""
    text = caption.lower()
    found = [rules.events[event].search(text) for event in (first, second)]
    if not all(found):
        return None
    starts = [match.start() for match in found]
    between = text[min(starts) : max(starts)]
    if " after " in between:
        return starts[0] > starts[1]
    if "then" in between or "followed by" in between:
        return starts[0] < starts[1]
    return None


def names_special(caption: str) -> bool:
    """Whether a caption says silence, noise, a tone or that it does not recognise the sound."""
    return any(phrase in caption for forms in SPECIAL.values() for phrase in forms)
