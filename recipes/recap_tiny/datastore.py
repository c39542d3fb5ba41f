"""Write the captions of the shipped datastore: some twelve thousand, over all that the audio tower can tell.

    python -m recipes.recap_tiny.datastore OUT.txt [--special OUT.txt] [--corpora FOLDER]

One caption a line: single sounds in several wordings, with distance, count and level, and sounds that go together
(`scenes.csv`: what lasts and what happens at one place; `chains.csv`: what follows what). Captions of silence, noise,
tones and unrecognised sounds stand at the end, or in a file of their own. The output is the same in every run.

With `--corpora`, the captions of more than five words that equal one of that folder's CSV files (columns `caption` and
`abstract_captions`), apart from case, punctuation and spaces, are left out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

from .grammar import Sound, describe, inflect, merge, repeated_words
from .lexicon import Label, Phrase, classes, find, labels, names_person

__all__ = ["captions", "corpus_captions", "normalised", "special_captions", "without_copies"]

_FOLDER = Path(__file__).parent
_SEED = 23
# A caption of so few words says only what anybody would say ("A dog barks"): it is no copy.
SHORT_CAPTION_WORDS = 5
_SPECIAL = {
    "silence": (
        "Silence",
        "Complete silence",
        "It is silent",
        "There is no sound",
        "No sound at all",
        "Near silence",
        "The recording is silent",
    ),
    "noise": (
        "White noise",
        "Steady white noise",
        "A steady hiss of noise",
        "Noise",
        "Constant noise without any other sound",
        "Pink noise",
        "Soft rushing noise",
        "A low rushing noise",
        "Plain background noise",
        "The hiss of a recording",
        "An even hiss",
    ),
    "tone": (
        "A steady tone",
        "A pure tone",
        "A continuous electronic tone",
        "A high-pitched tone",
        "A low tone",
        "A sine wave tone",
        "A test tone sounds",
        "A single tone holds",
        "A tone rises in pitch",
        "A tone falls in pitch",
        "A tone sweeps up and down",
        "A steady tone with overtones",
    ),
    "unknown": (
        "An unrecognised sound",
        "Some unrecognised sound",
        "A sound that is not recognised",
        "An unrecognised noise",
        "Several unrecognised sounds",
        "A short unrecognised sound",
        "A long unrecognised sound",
        "A repeated sound that is not recognised",
    ),
}
# Classes whose captions are in `_SPECIAL`: silence, tones, noise.
_SPECIAL_CLASSES = frozenset({494, 495, 496, 497, 507, 514, 515})
_STEADY_KINDS = frozenset({"continuous", "machine", "quality", "signal"})
# Wordings of a label or an instrument beyond one of each phrase.
_MORE_WORDINGS = 4
_FORMS = ("finite",) * 5 + ("progressive",) * 2 + ("participle",) * 4


def normalised(text: str) -> str:
    """A caption without case and punctuation, its words parted by single spaces."""
    return " ".join("".join(mark if mark.isalnum() else " " for mark in text.lower()).split())


class _Collection:
    """Captions in order, each once and of more than one word."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._seen: set[str] = set()

    def add(self, text: str) -> bool:
        key = normalised(text)
        if key in self._seen or " " not in key or repeated_words(text):
            return False
        self._seen.add(key)
        self.texts.append(text)
        return True

    def collect(self, wanted: int, tries: int, write) -> None:
        """Add `wanted` new captions of `write()`, or what `tries` calls give."""
        for _ in range(tries):
            if wanted <= 0:
                return
            wanted -= self.add(write())


def _kind(name: int | str) -> str:
    entry = find(name)
    return (classes()[entry.classes[0]] if isinstance(entry, Label) else entry).kind


def _one_wording(phrase: Phrase, rng: Random) -> str:
    many = phrase.free_number and not names_person(phrase.subject) and rng.random() < 0.3
    text = inflect(phrase, rng.choice(_FORMS), many)
    return text[0].upper() + text[1:]


def _singles(found: _Collection, rng: Random) -> None:
    names = [entry.index for entry in classes() if entry.index not in _SPECIAL_CLASSES]
    for name in [*names, *labels()]:
        entry = find(name)
        for phrase in entry.phrases:
            found.add(_one_wording(phrase, rng))
        if isinstance(entry, Label) or entry.kind == "instrument":
            found.collect(_MORE_WORDINGS, 4 * _MORE_WORDINGS, lambda name=name: describe([name], rng))
        for sound in _with_attributes(name, rng):
            found.collect(1, 4, lambda sound=sound: describe([sound], rng, detail=1.0))


def _with_attributes(name: int | str, rng: Random) -> Iterator[Sound]:
    """The sound with each attribute that it can have, one at a time."""
    entry = find(name)
    attributes = classes()[entry.classes[0]].attributes if isinstance(entry, Label) else entry.attributes
    if "far" in attributes:
        yield Sound(name, distance="far")
        yield Sound(name, distance=rng.choice(["near", "background", "far"]))
    if "count" in attributes:
        yield Sound(name, count=rng.choice([1, 2, 3]))
        yield Sound(name, count=rng.choice(["several", "repeated", 2]))
    if "loud" in attributes:
        yield Sound(name, level="loud")
    if "soft" in attributes:
        yield Sound(name, level="soft")
    if "steady" in attributes and _kind(name) in _STEADY_KINDS:
        yield Sound(name, steady=True)
    if {"count", "far"} <= attributes:
        yield Sound(name, count=rng.choice([1, 2, 3, "several", "repeated"]), distance=rng.choice(["far", "near"]))


@lru_cache(maxsize=1)
def _scenes() -> tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]:
    with (_FOLDER / "scenes.csv").open(encoding="utf-8", newline="") as handle:
        return tuple(
            (row["scene"], tuple(row["lasting"].split("; ")), tuple(row["events"].split("; ")))
            for row in csv.DictReader(handle)
        )


@lru_cache(maxsize=1)
def _chains() -> tuple[tuple[str, ...], ...]:
    with (_FOLDER / "chains.csv").open(encoding="utf-8", newline="") as handle:
        return tuple(tuple(row["sounds"].split("; ")) for row in csv.DictReader(handle))


def _event(name: str, rng: Random) -> Sound:
    draw = rng.random()
    if draw < 0.12:
        return Sound(name, distance=rng.choice(["far", "far", "near"]))
    if draw < 0.30:
        return Sound(name, count=rng.choice([1, 2, 2, 3, "several", "repeated"]))
    return Sound(name, level=rng.choice(["loud", "soft"])) if draw < 0.38 else Sound(name)


def _lasting(name: str, rng: Random) -> Sound:
    draw = rng.random()
    return Sound(name, distance="background" if draw < 0.1 else "far" if draw < 0.15 else None)


def _together(found: _Collection, sounds: Sequence[Sound], rng: Random, relation: str, wanted: int = 1) -> None:
    kinds = [_kind(sound.name) for sound in sounds]
    if len(merge(sounds)) == len(sounds) and kinds.count("music") < 2:
        found.collect(wanted, 2 * wanted, lambda: describe(sounds, rng, relation, detail=1.0))


def _scene_captions(found: _Collection, rng: Random) -> None:
    for _, lasting, events in _scenes():
        for event in events:
            for bed in rng.sample(lasting, min(2, len(lasting))):
                _together(found, [_event(event, rng), _lasting(bed, rng)], rng, "overlap")
            for other in rng.sample(events, 2):
                _together(found, [_event(event, rng), _event(other, rng)], rng, "sequence")
            if rng.random() < 0.4:
                continue
            bed, other = rng.choice(lasting), rng.choice(events)
            sounds = [Sound(bed, throughout=True), _event(event, rng), Sound(other)]
            _together(found, sounds, rng, rng.choice(["overlap", "sequence", "sequence"]))
        for bed in lasting:
            for other in rng.sample(lasting, 1):
                _together(found, [Sound(bed), _lasting(other, rng)], rng, "overlap")
            for event in rng.sample(events, 2):
                _together(found, [Sound(bed), _event(event, rng)], rng, "sequence")


def _chain_captions(found: _Collection, rng: Random) -> None:
    for chain in _chains():
        _together(found, [Sound(name) for name in chain], rng, "sequence", wanted=2)
        for first, second in itertools.pairwise(chain):
            _together(found, [Sound(first), _event(second, rng)], rng, "sequence", wanted=2)


@lru_cache(maxsize=1)
def captions() -> tuple[str, ...]:
    """All captions but the special ones, each different after normalisation; the same in every call."""
    found, rng = _Collection(), Random(_SEED)
    _singles(found, rng)
    _scene_captions(found, rng)
    _chain_captions(found, rng)
    # A noun with "can be heard" tells nothing more, and of faint noise the language model makes "A can be heard".
    return tuple(text for text in found.texts if not text.endswith("can be heard"))


def special_captions() -> dict[str, tuple[str, ...]]:
    """Captions for a recording without an event: of "silence", "noise", a "tone" or what is "unknown"."""
    return dict(_SPECIAL)


def corpus_captions(folder: str | Path) -> set[str]:
    """Normalised captions of the CSV files in a folder: columns `caption` and `abstract_captions` (lists of lists).

    Raises:
        FileNotFoundError: The folder has no CSV file with such a column.
    """
    found: set[str] = set()
    csv.field_size_limit(sys.maxsize)
    for path in sorted(Path(folder).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                if row.get("caption"):
                    found.add(normalised(row["caption"]))
                for group in ast.literal_eval(row.get("abstract_captions") or "[]"):
                    found.update(normalised(text) for text in ([group] if isinstance(group, str) else group))
    if not found:
        raise FileNotFoundError(f"expected CSV files with a column caption or abstract_captions in {folder}")
    return found


def without_copies(texts: Sequence[str], corpus: set[str]) -> list[str]:
    """`texts` without those of more than `SHORT_CAPTION_WORDS` words that are in `corpus` (normalised captions)."""
    keys = [normalised(text) for text in texts]
    return [
        text
        for text, key in zip(texts, keys, strict=True)
        if len(key.split()) <= SHORT_CAPTION_WORDS or key not in corpus
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="recipes.recap_tiny.datastore", description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", metavar="OUT.txt", help="file to write, one caption a line")
    parser.add_argument("--special", metavar="OUT.txt", help="write silence, noise, tones and unrecognised apart")
    parser.add_argument("--corpora", metavar="FOLDER", help="folder of caption CSV files to keep copies of out")
    options = parser.parse_args(arguments)
    texts = list(captions())
    if options.corpora:
        kept = without_copies(texts, corpus_captions(options.corpora))
        print(f"left out {len(texts) - len(kept)} captions that a corpus holds")
        texts = kept
    special = [text for group in special_captions().values() for text in group]
    if options.special:
        Path(options.special).write_text("".join(f"{text}\n" for text in special), encoding="utf-8")
    else:
        texts += special
    Path(options.out).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    print(f"wrote {len(texts)} captions to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
