"""Captions from what is known of a recording: its sounds, their attributes, and whether they overlap or follow.

`describe` words them as people do in captions of everyday sounds: "A dog barks while rain falls on a roof", "An engine
idles, then a horn honks twice", "Birds chirp in the distance as a man speaks". It never says an attribute or an order
that it was not given, and names no sound twice.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np

from .inflection import base_form, gerund, plural, with_article
from .lexicon import (
    HUMAN_KINDS,
    Label,
    Phrase,
    SoundClass,
    caption_classes,
    classes,
    find,
    implied,
    names_person,
)

__all__ = ["Sound", "caption_classes", "describe", "inflect", "merge", "repeated_words", "word_clause", "word_stem"]

FINITE, PROGRESSIVE, PARTICIPLE = "finite", "progressive", "participle"

_DISTANCE = {
    "far": ("in the distance", "in the distance", "in the distance", "far away", "off in the distance"),
    "near": ("nearby", "nearby", "close by"),
    "background": ("in the background",),
}
_LEVEL = {"loud": ("loudly",), "soft": ("softly", "quietly", "faintly")}
_COUNT = {
    1: ("once",),
    2: ("twice",),
    3: ("three times",),
    "several": ("several times", "a few times"),
    "repeated": ("repeatedly", "again and again", "over and over"),
}
_STEADY = ("steadily", "continuously")
# Words that two clauses of a caption may share without seeming to name a sound twice.
_COMMON_WORDS = """
a an the of in on at to from with and as is are be being it its their they some several few into onto over by up down
out off away something someone people person while through against sound sounds noise play plays played playing music
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_LASTING = frozenset({"continuous", "music", "machine", "scene", "quality"})


@dataclass(frozen=True)
class Sound:
    """A sound to word.

    Attributes:
        name: Index or name of a class, or a label.
        distance: "far", "near", "background" or None (not known, or not worth a word).
        count: 1, 2, 3, "several", "repeated" or None.
        level: "loud", "soft" or None.
        steady: Whether it goes on without a pause.
        throughout: In a sequence, whether it is there all the time, under the others.
    """

    name: int | str
    distance: str | None = None
    count: int | str | None = None
    level: str | None = None
    steady: bool = False
    throughout: bool = False

    def __post_init__(self) -> None:
        for value, table, field in (
            (self.distance, _DISTANCE, "distance"),
            (self.count, _COUNT, "count"),
            (self.level, _LEVEL, "level"),
        ):
            if value is not None and value not in table:
                raise ValueError(f"expected a {field} of {', '.join(map(str, table))} or None, got {value!r}")


Generator = Random | np.random.Generator


def _pick(rng: Generator, options: Sequence, weights: Sequence[float] | None = None):
    """One of `options`, by `weights` where given; one call of `rng.random`, the same for both kinds of generator."""
    if weights is None:
        return options[min(int(rng.random() * len(options)), len(options) - 1)]
    left = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        left -= weight
        if left < 0:
            return option
    return options[-1]


def _head(entry: SoundClass | Label) -> SoundClass:
    return classes()[entry.classes[0]] if isinstance(entry, Label) else entry


@cache
def _includes(index: int, other: int) -> bool:
    """Whether a caption of class `index` names `other` as well: it implies it, or most of its phrases name it."""
    phrases = [inflect(phrase, FINITE, False).lower() for phrase in classes()[index].phrases]
    naming = sum(classes()[other].words.search(phrase) is not None for phrase in phrases)
    return index == other or other in implied(index) or 2 * naming >= len(phrases)


def merge(sounds: Sequence[Sound]) -> list[Sound]:
    """`sounds` without those that another one of them names as well ("animal" beside "dog"), in order."""
    kept: list[tuple[Sound, int]] = []
    for sound in sounds:
        index = _head(find(sound.name)).index
        if any(_includes(other, index) for _, other in kept):
            continue
        kept = [(entry, other) for entry, other in kept if not _includes(index, other)]
        kept.append((sound, index))
    return [sound for sound, _ in kept]


def inflect(phrase: Phrase, form: str, many: bool, extra: str = "") -> str:
    """A phrase in a form of its verbs: `many` sets the number of a free subject, `extra` is an adverb of the verb."""
    subject = phrase.subject
    if phrase.free_number:
        subject = plural(subject) if many else with_article(subject)
    words = [subject]
    for position, (verb, rest) in enumerate(phrase.verbs):
        first, _, after = verb.partition(" ")
        is_be = first in ("is", "are")
        plural_verb = many if phrase.free_number else base_form(first) == first or first == "are"
        be = "are" if plural_verb else "is"
        if form == FINITE or subject == "it":
            finite = be if is_be else (base_form(first) if many and phrase.free_number else first)
            words += [finite, after]
        elif is_be and after.endswith("ing"):
            words += [be if form == PROGRESSIVE and not position else "", after]
        else:
            going = "" if after.startswith("being ") and is_be else gerund(base_form(first))
            words += [be if form == PROGRESSIVE and not position else "", going, after]
        words += [extra if not position and _adverb_first(rest) else "", rest]
    if extra and (not phrase.verbs or not _adverb_first(phrase.verbs[0][1])):
        words.append(extra)
    return " ".join(word for word in words if word)


def _adverb_first(rest: str) -> bool:
    """Whether an adverb stands before the words that follow a verb, not after them."""
    place = r"(?:on|in|from|through|against|over|at|into|onto|under|to|around|along|across)\b .+ "
    return re.match(place, rest) is not None


def _phrase_weight(phrase: Phrase, human: bool) -> float:
    """Seldom a person for what is no human sound, seldom a bare "something" or a single word."""
    if not human and names_person(phrase.subject):
        return 0.25
    if phrase.subject == "something":
        return 0.6
    return 1.0 if phrase.verbs or " " in phrase.subject else 0.5


def _said(sound: Sound, head: SoundClass, rng: Generator, detail: float) -> tuple:
    """Level, count, distance and steadiness to say: what the class can have, and seldom two at once."""
    level = sound.level if sound.level in head.attributes and rng.random() < detail else None
    count = sound.count if "count" in head.attributes and rng.random() < detail else None
    can_be_far = "far" in head.attributes or sound.distance == "background"
    distance = sound.distance if can_be_far and rng.random() < detail else None
    if distance and level and rng.random() < 0.8:
        distance, level = _pick(rng, ((distance, None), (None, level)))
    if count is not None:
        level = None
    steady = sound.steady and "steady" in head.attributes and not level and count is None and rng.random() < detail / 2
    return level, count, distance, steady


def word_clause(sound: Sound, rng: Generator, forms: Sequence[str], detail: float = 0.8) -> str:
    """A clause, participle or noun phrase for one sound, without a capital.

    Args:
        sound: The sound and its attributes.
        rng: Source of every choice.
        forms: Forms to choose from: "finite", "progressive" or "participle"; a noun phrase counts as a participle.
        detail: Probability that an attribute is said.
    """
    entry = find(sound.name)
    head = _head(entry)
    level, count, distance, steady = _said(sound, head, rng, detail)
    form = _pick(rng, forms)
    pool = [phrase for phrase in entry.phrases if phrase.verbs or form == PARTICIPLE]
    if form == FINITE:
        pool = [phrase for phrase in pool if not phrase.is_progressive] or pool
    else:
        pool = [phrase for phrase in pool if phrase.subject != "it"]
    if count is not None:
        pool = [phrase for phrase in pool if phrase.can_be_counted] or pool
    if steady:
        pool = [phrase for phrase in pool if phrase.can_be_steady] or pool
    if level or count is not None:
        pool = [phrase for phrase in pool if phrase.takes_adverb] or pool
    elif distance:
        pool = [phrase for phrase in pool if phrase.takes_distance] or pool
    if not pool:
        # Only noun phrases, where a clause is asked for: they stand with the verb that suits any of them.
        noun = _pick(rng, entry.phrases).subject
        return f"{noun} can be heard"
    phrase = _pick(rng, pool, [_phrase_weight(phrase, head.kind in HUMAN_KINDS) for phrase in pool])
    single = count is not None or head.kind in HUMAN_KINDS
    many = phrase.free_number and not single and rng.random() < 0.35
    if count is not None and form == PROGRESSIVE:
        form = FINITE
    adverb = ""
    if phrase.takes_adverb and level:
        adverb = _pick(rng, _LEVEL[level])
    elif phrase.can_be_steady and steady:
        adverb = _pick(rng, _STEADY)
    text = inflect(phrase, form, many, adverb)
    if many and rng.random() < 0.25:
        text = _pick(rng, ("several ", "some ", "a few ")) + text
    if count is not None and phrase.can_be_counted:
        text += " " + _pick(rng, _COUNT[count])
    if distance and phrase.takes_distance:
        text += " " + _pick(rng, _DISTANCE[distance])
    return text


def word_stem(word: str) -> str | None:
    """The stem of a word in lower case that carries a caption's meaning; None for a function word."""
    return None if word in _COMMON else re.sub(r"(?:ing|ed|es|s|e)$", "", word)


def _content(text: str) -> set[str]:
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {stem for word in words if (stem := word_stem(word)) is not None}


def repeated_words(text: str) -> set[str]:
    """Stems of the words that a caption says twice, other than function words: a sound named twice shows here."""
    stems = [stem for word in re.findall(r"[a-z]+", text.lower()) for stem in _content(word)]
    return {stem for stem in stems if stems.count(stem) > 1}


def _clash(texts: Sequence[str], sounds: Sequence[Sound]) -> int:
    """How much the clauses repeat one another: shared words count most, then naming another's class."""
    words = [_head(find(sound.name)).words for sound in sounds]
    content = [_content(text) for text in texts]
    vague = [re.match(r"someone|something|a person|people", text) for text in texts]
    penalty = 0
    for i, j in itertools.permutations(range(len(texts)), 2):
        penalty += 5 * len(content[i] & content[j])
        penalty += words[i].search(texts[j].lower()) is not None
        penalty += vague[i] is not None and vague[j] is not None and vague[i][0] == vague[j][0]
    return penalty


# Patterns of overlapping sounds: weight, joining words, and the forms of each clause ("S" finite,
# "F" and "G" finite or progressive, "P" participle or noun phrase).
_OVERLAP = {
    2: (
        (0.24, "{F} while {G}"),
        (0.22, "{F} as {G}"),
        (0.18, "{F} and {F}"),
        (0.12, "{F} with {P}"),
        (0.10, "{P} and {P}"),
        (0.05, "{P} while {G}"),
        (0.04, "as {F}, {F}"),
        (0.03, "{P} along with {P}"),
        (0.02, "{P} with {P}"),
    ),
    3: (
        (0.3, "{F} and {F} while {G}"),
        (0.25, "{F} while {F} and {F}"),
        (0.2, "{F}, {F}, and {F}"),
        (0.1, "{F} with {P} and {P}"),
        (0.15, "{P}, {P}, and {P}"),
    ),
}
_SEQUENCE = {
    2: (
        (0.25, "{F}, then {F}"),
        (0.18, "{F} and then {F}"),
        (0.10, "{F}, and then {F}"),
        (0.12, "{F} followed by {P}"),
        (0.08, "{P} followed by {P}"),
        (0.08, "{F}, followed by {P}"),
        (0.06, "{F} before {F}"),
        (0.03, "first {F}, then {F}"),
        (0.06, "after {S}, {F}"),
        (0.04, "{P}, then {P}"),
    ),
    3: (
        (0.35, "{F}, then {F}, and then {F}"),
        (0.25, "{F}, {F}, and then {F}"),
        (0.2, "{F}, followed by {P} and then {P}"),
        (0.2, "{F}, then {F}, and finally {F}"),
    ),
}
_THROUGHOUT = ("as {0}, {1}", "{1} while {0}", "{1}, while {0} throughout")
_SLOT = re.compile(r"\{([FGPS])\}")
_FORMS = {"F": (FINITE,) * 3 + (PROGRESSIVE,), "G": (FINITE, PROGRESSIVE), "P": (PARTICIPLE,), "S": (FINITE,)}


def _fill(pattern: str, sounds: Sequence[Sound], rng: Generator, detail: float, sequence: bool) -> tuple[str, int]:
    slots = _SLOT.findall(pattern)
    texts = []
    for slot, sound in zip(slots, sounds, strict=True):
        forms = _FORMS[slot]
        if sequence and slot == "F":
            # What comes next happens; only what lasts was going on before it.
            forms = _FORMS["G"] if not texts and _head(find(sound.name)).kind in _LASTING else (FINITE,)
        texts.append(word_clause(sound, rng, forms, detail))
    left = iter(texts)
    text = _SLOT.sub(lambda _: next(left), pattern)
    subordinate = len(re.findall(r"\b(?:while|as|after|before)\b", text))
    # "Teeth are brushed with waves breaking": after a passive, "with" tells the means.
    means = re.search(r"\b(?:is|are)(?: being)? \w+(?<!ing)\b.* with ", text) is not None
    return text, _clash(texts, sounds) + 3 * max(subordinate - 1, 0) + 3 * means


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def describe(
    sounds: Sequence[Sound | int | str],
    rng: Generator,
    relation: str = "overlap",
    detail: float = 0.8,
    tries: int = 8,
) -> str:
    """One natural caption of the sounds, with a capital and without a full stop.

    Args:
        sounds: One to four sounds: `Sound`, or the index or name of a class or a label. In a sequence, in order of
            onset. Sounds that another one names as well are left out (see `merge`).
        rng: A `random.Random` or `numpy.random.Generator`, the source of every choice.
        relation: "overlap" or "sequence".
        detail: Probability that an attribute is said.
        tries: Wordings to try; the one that repeats fewest words is taken.

    Raises:
        KeyError: No class or label has such a name.
        ValueError: There is no sound, or more than four, or the relation is another.
    """
    if relation not in ("overlap", "sequence"):
        raise ValueError(f'expected the relation "overlap" or "sequence", got {relation!r}')
    entries = merge([sound if isinstance(sound, Sound) else Sound(sound) for sound in sounds])
    if not 1 <= len(entries) <= 4:
        raise ValueError(f"expected one to four different sounds, got {len(entries)}")
    if len(entries) == 1:
        forms = (FINITE,) * 5 + (PROGRESSIVE,) * 2 + (PARTICIPLE,) * 4
        return _sentence(word_clause(entries[0], rng, forms, detail))
    best: tuple[int, str] | None = None
    for _ in range(tries):
        text, clash = _several(entries, rng, relation, detail)
        if best is None or clash < best[0]:
            best = (clash, text)
        if clash == 0:
            break
    assert best is not None
    return _sentence(best[1])


def _several(
    sounds: list[Sound], rng: Generator, relation: str, detail: float, plain: bool = False
) -> tuple[str, int]:
    """A caption of two to four sounds and how much it repeats itself; `plain` keeps it fit to be part of another."""
    under = [sound for sound in sounds if sound.throughout and relation == "sequence"]
    over = [sound for sound in sounds if sound not in under]
    if under and over:
        first, clash = word_clause(over[0], rng, (FINITE,), detail), 0
        if len(over) > 1:
            first, clash = _several(over, rng, relation, detail, plain=True)
        base = word_clause(replace(under[0], distance=None), rng, (FINITE,), detail)
        pattern = _pick(rng, _THROUGHOUT[:1] if re.search(r"\b(?:while|followed)\b", first) else _THROUGHOUT)
        return pattern.format(base, first), clash + _clash([first, base], [over[0], under[0]])
    if len(sounds) == 4:
        one, clash = _several(sounds[:2], rng, relation, detail, plain=True)
        two, more = _several(sounds[2:], rng, relation, detail, plain=True)
        join = ", and then " if relation == "sequence" else ", while "
        return one + join + two, clash + more + _clash([one, two], [sounds[0], sounds[2]])
    patterns = (_SEQUENCE if relation == "sequence" else _OVERLAP)[len(sounds)]
    if plain:
        fit = [entry for entry in patterns if re.fullmatch(r"\{F\},? (?:and|then|followed).*", entry[1])]
        patterns = fit or patterns
    pattern = _pick(rng, [text for _, text in patterns], [weight for weight, _ in patterns])
    if relation == "overlap":
        sounds = _natural_order(sounds, rng, pattern)
    return _fill(pattern, sounds, rng, detail, relation == "sequence")


def _natural_order(sounds: list[Sound], rng: Generator, pattern: str) -> list[Sound]:
    """Overlapping sounds in a random order; what lasts, is far or is in the background tends to come last."""

    def key(sound: Sound) -> float:
        lasting = _head(find(sound.name)).kind in _LASTING
        return rng.random() + (0.7 if lasting and "as {F}," not in pattern else 0) + (0.5 if sound.distance else 0)

    keys = [key(sound) for sound in sounds]
    return [sounds[place] for place in sorted(range(len(sounds)), key=keys.__getitem__)]
