"""Captions of recap-tiny, written by a grammar from what the synthesis of a mixture did.

A `Scene` is the truth of a mixture: its sounds in order of their onsets, whether they overlap or follow one another,
and for each sound the attributes that the synthesis caused. `render` words a scene; it may leave attributes and order
unsaid, but never says what is not in the scene. `answer` words it in the one way that the captioner is taught: with
the words of its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .lexicon21 import COUNTABLE, phrases

__all__ = [
    "ATTRIBUTES",
    "Caption",
    "Part",
    "Scene",
    "answer",
    "compatible",
    "contradict",
    "invented_sound",
    "render",
]

# far: low-passed, smeared along time and attenuated.  background: at least 9 dB below the loudest sound of an overlap.
# once, twice, repeatedly: a burst cut from its clip and placed one, two or at least four times.
ATTRIBUTES = ("far", "background", "once", "twice", "repeatedly")

_ATTRIBUTE_WORDS = {
    "far": ("in the distance", "far away"),
    "background": ("in the background",),
    "once": ("once",),
    "twice": ("twice",),
    "repeatedly": ("repeatedly", "again and again"),
}
_COUNTS = ("once", "twice", "repeatedly")


@dataclass(frozen=True)
class Part:
    """One sound of a scene: a key of the lexicon (or an invented phrase) and its attributes."""

    key: str
    attributes: frozenset[str] = frozenset()
    phrases: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Scene:
    """Sounds in order of onset; `relation` is "overlap" or "sequence" (a single sound is an overlap of one)."""

    parts: tuple[Part, ...]
    relation: str = "overlap"

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(part.key for part in self.parts)

    @property
    def order(self) -> tuple[str, ...] | None:
        """Keys in order of onset where the order can be heard, else None."""
        return tuple(part.key for part in self.parts) if self.relation == "sequence" and len(self.parts) > 1 else None

    @property
    def attributes(self) -> frozenset[tuple[str, str]]:
        return frozenset((part.key, name) for part in self.parts for name in part.attributes)


@dataclass(frozen=True)
class Caption:
    """A worded scene with what it claims: the sounds, an order (or None) and (sound, attribute) pairs."""

    text: str
    keys: frozenset[str]
    order: tuple[str, ...] | None = None
    attributes: frozenset[tuple[str, str]] = frozenset()


def compatible(caption: Caption, scene: Scene) -> bool:
    """Whether a caption is true of a scene: the same sounds, and no order or attribute that the scene has not."""
    return (
        caption.keys == scene.keys
        and (caption.order is None or caption.order == scene.order)
        and caption.attributes <= scene.attributes
    )


def _word_part(part: Part, rng: np.random.Generator, detail: float) -> tuple[str, frozenset[tuple[str, str]]]:
    said = [name for name in ATTRIBUTES if name in part.attributes and rng.random() < detail]
    choices = part.phrases or phrases(part.key)
    if any(name in _COUNTS for name in said):
        countable = COUNTABLE.get(part.key)
        if countable is None:
            said = [name for name in said if name not in _COUNTS]
        else:
            choices = countable
    words = [choices[rng.integers(len(choices))]]
    # The count belongs to the verb, so it is said first.
    for name in sorted(said, key=lambda name: name not in _COUNTS):
        options = _ATTRIBUTE_WORDS[name]
        words.append(options[rng.integers(len(options))])
    return " ".join(words), frozenset((part.key, name) for name in said)


def _join_overlap(texts: list[str], rng: np.random.Generator) -> str:
    if len(texts) == 1:
        return texts[0]
    last = (" and ", " along with ", " together with ", " while there is ")
    joined = ", ".join(texts[:-1])
    return joined + last[rng.choice(len(last), p=(0.55, 0.15, 0.15, 0.15))] + texts[-1]


def _join_sequence(texts: list[str], rng: np.random.Generator) -> str:
    form = rng.integers(4)
    if len(texts) == 2 and form == 0:
        return f"{texts[1]} after {texts[0]}"
    if form == 1:
        return ", then ".join(texts)
    if form == 2:
        return f"{texts[0]} and then " + ", then ".join(texts[1:])
    return " followed by ".join(texts)


def render(scene: Scene, rng: np.random.Generator, detail: float = 0.6, say_order: float = 0.8) -> Caption:
    """Word a scene.

    Args:
        scene: The truth.
        rng: Source of every choice.
        detail: Probability that an attribute is said.
        say_order: Probability that the order of a sequence is said.
    """
    worded = [_word_part(part, rng, detail) for part in scene.parts]
    claims = frozenset().union(*(claim for _, claim in worded))
    if scene.order is not None and rng.random() < say_order:
        return Caption(_join_sequence([text for text, _ in worded], rng), scene.keys, scene.order, claims)
    texts = [worded[index][0] for index in rng.permutation(len(worded))]
    # What is in the background is said last, as people do.
    texts.sort(key=lambda text: text.endswith("in the background"))
    return Caption(_join_overlap(texts, rng), scene.keys, None, claims)


def _quoted(part: Part, said: list[str], captions: list[str]) -> tuple[str, tuple[int, int]]:
    """The words of a part in the first caption that has any (else its first phrase), and where they stand."""
    choices = part.phrases or phrases(part.key)
    if any(name in _COUNTS for name in said):
        choices = COUNTABLE[part.key]
    for index, caption in enumerate(captions):
        found = [phrase for phrase in choices if phrase in caption.lower()]
        if found:
            phrase = max(found, key=len)
            return phrase, (index, caption.lower().find(phrase))
    return choices[0], (len(captions), 0)


def answer(scene: Scene, captions: list[str]) -> str:
    """The caption of a scene after a prompt of `captions`: all that the scene holds, in the words of the prompt.

    One wording for each scene and prompt, without a choice: where several were right, each would have only a share of
    the probability, and the end of the caption would win against a second sound that is said in many ways. Sounds that
    follow one another are joined by "and then", others by "and" in the order of the prompt: whether there is another
    sound is told by one word.

    Args:
        scene: The truth.
        captions: The retrieved captions, most similar first; none when audio alone is to speak.
    """
    worded = []
    for part in scene.parts:
        said = [name for name in ATTRIBUTES if name in part.attributes]
        if part.key not in COUNTABLE:
            said = [name for name in said if name not in _COUNTS]
        phrase, place = _quoted(part, said, captions)
        said.sort(key=lambda name: name not in _COUNTS)
        text = " ".join([phrase, *(_ATTRIBUTE_WORDS[name][0] for name in said)])
        worded.append(("background" in said, place, text))
    if scene.order is not None:
        return " and then ".join(text for _, _, text in worded)
    texts = [text for _, _, text in sorted(worded, key=lambda item: item[:2])]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def contradict(scene: Scene, rng: np.random.Generator, keys: tuple[str, ...]) -> Scene:
    """A scene that is close but wrong: one sound more, one fewer, one exchanged, or the order reversed."""
    kinds = ["exchange", "exchange"]
    if len(scene.parts) < 3:
        kinds += ["more", "more"]
    if len(scene.parts) > 1:
        kinds += ["fewer", "fewer"]
    if scene.order is not None:
        kinds += ["reverse", "reverse", "reverse"]
    kind = kinds[rng.integers(len(kinds))]
    parts = list(scene.parts)
    if kind == "reverse":
        return replace(scene, parts=tuple(reversed(parts)))
    if kind == "fewer":
        del parts[rng.integers(len(parts))]
        return replace(scene, parts=tuple(parts))
    other = [key for key in keys if key not in scene.keys]
    new = Part(other[rng.integers(len(other))])
    if kind == "more":
        parts.insert(int(rng.integers(len(parts) + 1)), new)
    else:
        parts[rng.integers(len(parts))] = new
    return replace(scene, parts=tuple(parts), relation=scene.relation)


_ONSETS = (
    "b",
    "bl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gl",
    "h",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sk",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "oo", "ea")
_CODAS = ("", "b", "ck", "d", "g", "l", "m", "n", "p", "r", "sh", "st", "t", "x", "zz")


def invented_sound(rng: np.random.Generator) -> Part:
    """A sound with a made-up name ("a troob flaining"): nothing can be known of it, so it can only be copied."""

    def syllable() -> str:
        return "".join(pool[rng.integers(len(pool))] for pool in (_ONSETS, _VOWELS, _CODAS))

    noun = "".join(syllable() for _ in range(rng.integers(1, 3)))
    verb = syllable() + "ing"
    return Part(noun, phrases=(f"a {noun} {verb}", f"the {verb} of a {noun}", f"a {noun}"))
