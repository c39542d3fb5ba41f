"""The sound classes of the recipe: how people name them in a caption, and how a caption of our own words them.

`classes/*.csv` has a row for each of YAMNet's 521 AudioSet classes (`index` and `name` as in its class map), and from
index 521 on for classes that YAMNet lacks. Columns:

- `kind`: voice, person, animal, instrument, music, machine, event, continuous, signal, quality, scene or silence.
- `attributes`: what a caption can say of it: far, loud, soft, count (it happens once, twice), steady (it goes on).
- `parents`: indices of less specific classes that the class implies (a dog is an animal).
- `words`: an expression that finds the words by which a caption names the class, in lower case.
- `phrases`: what captions say, separated by ";". The notation is that of `Phrase`.

`labels.csv` maps the labels of the two labelled sets to classes, the head first, with phrases of their own where
those of the head class do not name the label.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

__all__ = [
    "HUMAN_KINDS",
    "YAMNET_CLASSES",
    "Label",
    "Phrase",
    "SoundClass",
    "caption_classes",
    "classes",
    "find",
    "implied",
    "labels",
    "names_person",
]

YAMNET_CLASSES = 521
HUMAN_KINDS = frozenset({"voice", "person"})
_FOLDER = Path(__file__).parent
_PERSON = re.compile(
    r"\b(?:someone|somebody|persons?|people|man|men|woman|women|child|children|kids?|boys?|girls?|crowd|audience|"
    r"driver|cyclist|drummer|guitarist|referee|dj|monks?|fans)\b",
    re.IGNORECASE,
)
_VERB = re.compile(r"\[([^\]]+)\]")


@dataclass(frozen=True)
class Phrase:
    """One wording of a class: a clause, or a noun phrase where it has no verb.

    In the notation of the tables, `[barks]` is a verb in the present tense, singular or plural as its subject is;
    `{dog}` is a subject whose number is free, its verb given in the singular; `(a|b)` are alternatives.

    Attributes:
        subject: The words before the first verb, or the whole noun phrase.
        verbs: Pairs of a verb phrase ("barks", "is flushed") and the words that follow it.
        free_number: Whether `subject` is a bare noun that takes an article or a plural.
    """

    subject: str
    verbs: tuple[tuple[str, str], ...] = ()
    free_number: bool = False

    @classmethod
    def parse(cls, text: str) -> Phrase:
        """A phrase from its notation, without alternatives."""
        pieces = _VERB.split(text)
        subject = pieces[0].strip()
        verbs = tuple((verb, rest.strip()) for verb, rest in zip(pieces[1::2], pieces[2::2], strict=True))
        free = subject.startswith("{")
        return cls(subject.strip("{}"), verbs, free)

    @property
    def is_simple(self) -> bool:
        """Whether it is a clause with one verb, to which adverbs can be added."""
        rest = self.verbs[0][1] if self.verbs else ""
        return len(self.verbs) == 1 and not re.search(r"\b(?:and|as|while|with)\b", rest)

    @property
    def is_progressive(self) -> bool:
        """Whether its verb is written in the progressive ("is barking")."""
        return bool(self.verbs) and re.match(r"(?:is|are) (?!being)\w+ing\b", self.verbs[0][0]) is not None

    @property
    def takes_distance(self) -> bool:
        """Whether "in the distance" can be added: a noun phrase or simple clause that tells no place already."""
        if not self.verbs:
            return True
        words = " ".join(self.verbs[0]).strip()
        return self.is_simple and not re.search(r"\b(?:overhead|past|by|away|off|up|in|apart|over|room)$", words)

    @property
    def takes_adverb(self) -> bool:
        """Whether "loudly" can be added: one verb, not in the progressive, and no other adverb."""
        if not self.is_simple:
            return False
        words = " ".join(self.verbs[0])
        return not re.search(
            r"^is \w+ing\b|ly\b|\b(?:aloud|hard|fast|once|together|loud)\b|\b(?:low|clear) voice", words
        )

    @property
    def can_be_steady(self) -> bool:
        """Whether "continuously" can be added: its verb tells what goes on, not what happens."""
        momentary = (
            r"is|plays|pass|goes|takes|lands?|starts|stops|opens|closes|shuts|departs|arrives|builds|speeds|pulls|"
            r"moves|drives|fl(?:y|ies)|turns?|approach|zips|drops|falls?\b.* with|whooshes|zings|breaks"
        )
        return self.takes_adverb and not re.match(momentary, " ".join(self.verbs[0]))

    @property
    def can_be_counted(self) -> bool:
        """Whether "twice" can be added: a simple clause about a single event."""
        if not self.takes_adverb or self.verbs[0] == ("plays", ""):
            return False
        verb, rest = self.verbs[0]
        first = verb.split(" ")[0]
        is_plural = first == "are" or ((first.endswith("ss") or not first.endswith("s")) and first != "is")
        return not is_plural and not (first in ("plays", "keeps", "holds", "has") and rest)


@dataclass(frozen=True)
class SoundClass:
    """A row of `classes/*.csv`; see the module's text."""

    index: int
    name: str
    kind: str
    attributes: frozenset[str]
    parents: tuple[int, ...]
    words: re.Pattern[str]
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True)
class Label:
    """A row of `labels.csv`: `classes` are indices, the head first; `phrases` name the label."""

    name: str
    classes: tuple[int, ...]
    phrases: tuple[Phrase, ...]


def _alternatives(text: str) -> Iterator[str]:
    found = re.search(r"\(([^()]*\|[^()]*)\)", text)
    if found is None:
        yield re.sub(r" +", " ", text).strip()
        return
    for choice in found.group(1).split("|"):
        yield from _alternatives(text[: found.start()] + choice + text[found.end() :])


def _parse_phrases(text: str) -> tuple[Phrase, ...]:
    return tuple(Phrase.parse(form) for part in text.split(";") if part.strip() for form in _alternatives(part))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@lru_cache(maxsize=1)
def classes() -> tuple[SoundClass, ...]:
    """All classes; the position of each is its `index`, YAMNet's 521 first."""
    rows = [row for path in sorted((_FOLDER / "classes").glob("*.csv")) for row in _read(path)]
    rows.sort(key=lambda row: int(row["index"]))
    if [int(row["index"]) for row in rows] != list(range(len(rows))):
        raise ValueError("classes/*.csv must have each index from 0 on once")
    return tuple(
        SoundClass(
            index=int(row["index"]),
            name=row["name"],
            kind=row["kind"],
            attributes=frozenset(row["attributes"].split()),
            parents=tuple(int(parent) for parent in row["parents"].split()),
            words=re.compile(row["words"]),
            phrases=_parse_phrases(row["phrases"]),
        )
        for row in rows
    )


@lru_cache(maxsize=1)
def labels() -> dict[str, Label]:
    """The 40 labels of `recordings/esc50` and the 21 of `sound_events`, by name."""
    found = {}
    for row in _read(_FOLDER / "labels.csv"):
        indices = tuple(int(index) for index in row["classes"].split())
        phrases = _parse_phrases(row["phrases"]) or classes()[indices[0]].phrases
        found[row["label"]] = Label(row["label"], indices, phrases)
    return found


@lru_cache(maxsize=1)
def _by_name() -> dict[str, SoundClass]:
    return {entry.name: entry for entry in classes()}


def find(sound: int | str) -> SoundClass | Label:
    """A class by index or name, or a label by name; a label wins over a class of the same name.

    Raises:
        KeyError: No class or label has this name or index.
    """
    if isinstance(sound, str):
        for table in (labels(), _by_name()):
            if sound in table:
                return table[sound]
    elif 0 <= sound < len(classes()):
        return classes()[sound]
    raise KeyError(f"expected an index below {len(classes())}, or the name of a class or label, got {sound!r}")


@lru_cache(maxsize=1 << 18)
def caption_classes(text: str) -> np.ndarray:
    """Indices of the classes that a caption names by `words`, ascending, of shape (number named,) and type int64.

    Classes that a named one implies are not added: see `implied`.
    """
    text = text.lower()
    return np.array([entry.index for entry in classes() if entry.words.search(text)], dtype=np.int64)


@cache
def implied(index: int) -> frozenset[int]:
    """Indices of all less specific classes that a class implies: its parents, theirs, and so on."""
    parents = classes()[index].parents
    return frozenset(parents).union(*(implied(parent) for parent in parents))


def names_person(text: str) -> bool:
    """Whether a caption names a person or a group of persons."""
    return _PERSON.search(text) is not None
