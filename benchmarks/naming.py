"""Which sound events a caption names, by the words of each event, and precision, recall and F1 of that."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_hf.scoring.metrics import MetricScores

# Words of which any names the event; a hyphen is a hyphen, a space or nothing.
EVENT_WORDS: dict[str, str] = {
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
# An expression that matches nothing.
_NOTHING = r"(?!)"
FIGURES = ("precision", "recall", "F1", "exact")


@dataclass(frozen=True)
class NamingRules:
    """`events`: an expression on the lower-cased caption for each event; `foreign`: one for sounds that are none."""

    events: dict[str, re.Pattern[str]]
    foreign: re.Pattern[str]

    @classmethod
    def ours(cls) -> NamingRules:
        """`EVENT_WORDS`; no word is foreign."""
        return cls({event: _any_of(words.split()) for event, words in EVENT_WORDS.items()}, re.compile(_NOTHING))

    @classmethod
    def read(cls, path: str | Path) -> NamingRules:
        """Rules of a JSON file `{"events": {event: expression}, "foreign": expression}`; without the last, no word
        is foreign.

        Raises:
            ValueError: if the file is not of this form.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            events = {event: re.compile(text) for event, text in data["events"].items()}
            return cls(events, re.compile(data.get("foreign", _NOTHING)))
        except (KeyError, AttributeError, TypeError, ValueError, re.error) as error:
            raise ValueError(
                f'{path} holds no naming rules: expected {{"events": {{event: expression}}, "foreign": expression}}, '
                f"got {error!r}"
            ) from error

    def named(self, caption: str) -> set[str]:
        """Events that a caption names."""
        text = caption.lower()
        return {event for event, pattern in self.events.items() if pattern.search(text)}

    def foreign_words(self, caption: str) -> set[str]:
        """Words of a caption for sounds that are none of the events."""
        return {match.group(0) for match in self.foreign.finditer(caption.lower())}

    def counts(self, caption: str, truth: set[str]) -> tuple[int, int, int, bool]:
        """Events named rightly, named wrongly (foreign words included) and missed; and whether the set is exact."""
        named, foreign = self.named(caption), self.foreign_words(caption)
        wrong = len(named - truth) + len(foreign)
        return len(named & truth), wrong, len(truth - named), named == truth and not foreign


def in_order(caption: str, events: Sequence[str], rules: NamingRules) -> bool | None:
    """Whether a caption names two events in this order; None if it does not name both.

    "B after A" and "after A, B" say the order of A and B by that word.
    """
    text = caption.lower()
    found = [rules.events[event].search(text) for event in events]
    if not all(found):
        return None
    first, second = (match.start() for match in found)
    after = re.search(r"\bafter\b", text)
    if after is None or after.start() < min(first, second):
        return first < second
    return second < first


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    spelt = (re.escape(word).replace(r"\-", "[ -]?") for word in sorted(words, key=len, reverse=True))
    return re.compile(r"\b(?:" + "|".join(spelt) + r")\b")


def naming_scores(
    captions: Sequence[str], truths: Sequence[Sequence[str]], rules: NamingRules
) -> dict[str, MetricScores]:
    """Precision, recall and F1 of the named events, summed over clips, and the share of clips with the exact set.

    Args:
        captions: one for each clip.
        truths: the events of each clip.
        rules: which words name which event.

    Raises:
        ValueError: if there are no clips, or an event has no rule.
    """
    unknown = sorted({event for truth in truths for event in truth} - set(rules.events))
    if unknown or not captions:
        raise ValueError(f"no rules for the events {', '.join(unknown)}" if unknown else "there are no captions")
    rows = [rules.counts(caption, set(truth)) for caption, truth in zip(captions, truths, strict=True)]
    counts = np.array(rows, dtype=np.float64)

    def metric(which: int) -> MetricScores:
        def aggregate(sums: np.ndarray, clips: int) -> np.ndarray:
            return _figures(sums, clips)[..., which]

        return MetricScores(float(aggregate(counts.sum(axis=0), len(counts))), aggregate(counts, 1), counts, aggregate)

    return {name: metric(which) for which, name in enumerate(FIGURES)}


def _figures(sums: np.ndarray, clips: int) -> np.ndarray:
    """`FIGURES` `(..., 4)` of summed counts `(..., 4)`; 0 where nothing was named."""
    right, wrong, missed, exact = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.nan_to_num(right / (right + wrong))
        recall = np.nan_to_num(right / (right + missed))
        f1 = np.nan_to_num(2 * right / (2 * right + wrong + missed))
    return np.stack([precision, recall, f1, exact / clips], axis=-1)
