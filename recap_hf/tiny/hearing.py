"""What the ear of recap-tiny knows, and what only its vocabulary knows: `recap tiny sounds`.

The CLAP was trained on recordings of the sounds in `HEARD`. Tokenizers, text tower and language model have read the
names of several hundred more: captions about these can be read and repeated, by an ear that has never heard them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .grammar import render
from .lexicon import HEARD, SPECIAL, other_sounds, phrases, vocabulary_sounds
from .naming import NamingRules
from .rewording import reword
from .tokenization import draw_text_scene

__all__ = ["CaptionKnowledge", "caption_knowledge", "format_captions", "format_sounds", "words_read"]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_GENITIVE = re.compile(r"['’]s\b")
# So many sentences hold every joint, place and manner of the grammar many times over.
_SENTENCES = 6000


@dataclass(frozen=True)
class CaptionKnowledge:
    """Of one caption: the events in it that were heard, the sounds in it that were only read, words never read."""

    caption: str
    heard: tuple[str, ...]
    only_read: tuple[str, ...]
    never_read: tuple[str, ...]


@lru_cache(maxsize=1)
def words_read() -> frozenset[str]:
    """Every word, in lower case, of the texts that text tower and language model were trained on.

    Made-up names apart: those are of no language.
    """
    rng = np.random.default_rng(0)
    texts = [phrase for key in vocabulary_sounds() for phrase in phrases(key)]
    for _ in range(_SENTENCES):
        # The sounds that were heard have clauses of their own.
        scene = draw_text_scene(rng, keys=tuple(HEARD))
        texts += [render(scene, rng).text, reword(scene, rng).text]
    return frozenset(_words(" ".join(texts)))


def _words(text: str) -> list[str]:
    return _WORD.findall(_GENITIVE.sub("", text.lower()))


def caption_knowledge(captions: Iterable[str]) -> list[CaptionKnowledge]:
    """What recap-tiny can make of captions of one's own, each by itself; a sound is found by its words."""
    rules, known = NamingRules.ours(), words_read()
    results = []
    for caption in captions:
        named = rules.named(caption)
        unread = dict.fromkeys(word for word in _words(caption) if word not in known)
        results.append(
            CaptionKnowledge(
                caption,
                tuple(event for event in HEARD if event in named),
                tuple(sorted(rules.foreign_words(caption))),
                tuple(unread),
            )
        )
    return results


def format_sounds() -> str:
    """The two lists as text."""

    def listed(names: Iterable[str]) -> str:
        # A name is not broken over two lines.
        text = "; ".join(name.replace(" ", "_") for name in names)
        filled = textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        return filled.replace("_", " ")

    special = ", ".join(f'"{forms[0]}"' for forms in SPECIAL.values())
    return "\n".join(
        [
            f"What the ear of recap-tiny knows, from recordings ({len(HEARD)} sounds):",
            listed(forms[0] for forms in HEARD.values()),
            f"Of what is none of these it says {special}, or mistakes it for one of them.",
            "",
            f"What only its vocabulary knows ({len(other_sounds())} sounds): it can read a datastore about them and "
            "repeat their words, and has never heard one.",
            listed(other_sounds()),
        ]
    )


def format_captions(results: Sequence[CaptionKnowledge]) -> str:
    """What `caption_knowledge` returned, two lines a caption, and a sum."""
    lines = []
    for result in results:
        heard = ", ".join(HEARD[event][0] for event in result.heard)
        parts = [f"hears: {heard}"] if heard else []
        parts += [f"only reads: {', '.join(result.only_read)}"] if result.only_read else []
        parts = parts or ["names no sound that it knows"]
        parts += [f"words that it never read: {', '.join(result.never_read)}"] if result.never_read else []
        lines += [result.caption, "  " + "; ".join(parts)]
    heard = sum(bool(result.heard) for result in results)
    unread = sum(bool(result.never_read) for result in results)
    lines += [
        "",
        f"{heard} of {len(results)} captions name a sound that it hears; {unread} hold a word that it never read, "
        "which it may garble.",
    ]
    return "\n".join(lines)
