"""Tokenizers of recap-tiny: byte-level BPE trained on our own grammar and lexicon, so that any text can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recap_hf.modeling.prompt_recap import PAPER_PROMPT

from .grammar import Part, Scene, invented_sound, render
from .lexicon import phrases, unheard_sounds, vocabulary_sounds

__all__ = ["draw_text_scene", "train_tokenizers"]


def draw_text_scene(rng: np.random.Generator, invented: float = 0.0, keys: tuple[str, ...] | None = None) -> Scene:
    """A scene of one to three sounds, for models of text alone; attributes drawn freely.

    Args:
        rng: Source of every choice.
        invented: Share of sounds under an invented name.
        keys: Sounds to draw from; the whole vocabulary by default.
    """
    keys = keys or vocabulary_sounds()
    count = int(rng.choice([1, 2, 3], p=(0.55, 0.35, 0.1)))
    chosen = [keys[index] for index in rng.choice(len(keys), size=count, replace=False)]
    parts = [invented_sound(rng) if rng.random() < invented else Part(key) for key in chosen]
    if rng.random() < 0.25:
        name = ("far", "background", "once", "twice", "repeatedly")[rng.integers(5)]
        parts[-1] = Part(parts[-1].key, frozenset({name}), parts[-1].phrases)
    relation = "sequence" if count > 1 and rng.random() < 0.45 else "overlap"
    return Scene(tuple(parts), relation)


def _corpus(sentences: int, seed: int, keys: tuple[str, ...]) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for key in keys:
        for phrase in phrases(key):
            # A word of a rare phrase deserves to be one token, whichever sounds come up in the sentences below.
            yield from [" " + phrase] * 20
    for _ in range(sentences):
        yield PAPER_PROMPT.build([render(draw_text_scene(rng, keys=keys), rng).text])


def train_tokenizers(
    folder: str | Path, vocab_size: int = 2048, sentences: int = 4000, seed: int = 0, heard_words: bool = True
) -> None:
    """Train one vocabulary and save it twice: `folder/gpt2` (with an end token) and `folder/clap` (RoBERTa style).

    Without `heard_words`, the one of `folder/gpt2` never reads the name of a sound that the CLAP hears, and writes it
    in pieces that it knows from other words: a token of its own would never come up in the training of a language
    model that is kept from these names, and so could not be said. The one of `folder/clap` stays as it is.
    """
    from recap_hf.pretraining.bases import train_tokenizer

    folder = Path(folder)
    for name, length in (("gpt2", 512), ("clap", 96)):
        keys = vocabulary_sounds() if heard_words or name == "clap" else unheard_sounds()
        tokenizer = train_tokenizer(_corpus(sentences, seed, keys), name, vocab_size, length)
        tokenizer.save_pretrained(folder / name)
    settings = {"vocab_size": vocab_size, "sentences": sentences, "seed": seed, "heard_words": heard_words}
    (folder / "tokenizers.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
