"""Properties of the captions beside their scores: vocabulary, lengths, novelty, and copying from the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from recap_hf.modeling.retrieval_recap import normalize_text


def caption_statistics(tokenized: Sequence[str], tokenized_references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Vocabulary and lengths, in words of the tokenized text.

    `reference_length` is the mean over clips of the mean length of their references.
    """
    lengths = [len(caption.split()) for caption in tokenized]
    reference_lengths = [np.mean([len(text.split()) for text in refs]) for refs in tokenized_references]
    return {
        "vocabulary_size": len(_words(tokenized)),
        "reference_vocabulary_size": len(_words(text for refs in tokenized_references for text in refs)),
        "caption_length": float(np.mean(lengths)),
        "shortest_caption": min(lengths),
        "longest_caption": max(lengths),
        "reference_length": float(np.mean(reference_lengths)),
        "distinct_captions": len(set(tokenized)) / len(tokenized),
        "empty_captions": sum(not length for length in lengths),
    }


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in text.split()}


def novelty(
    captions: Sequence[str], references: Sequence[Sequence[str]], training_captions: Iterable[str]
) -> dict[str, float]:
    """What differs from the training captions, ignoring case and punctuation.

    `novel_captions` is the share of captions that equal no training caption. `novel_reference_words` counts the words
    of the references that no training caption has, once per clip; `novel_word_recall` (absent if there are none) is
    the share of them in the clip's caption: only a datastore can supply them.
    """
    texts = {normalize_text(text) for text in training_captions}
    known, normalized = _words(texts), [normalize_text(caption) for caption in captions]
    statistics: dict[str, float] = {"novel_captions": sum(text not in texts for text in normalized) / len(captions)}
    novel = [_words(normalize_text(text) for text in refs) - known for refs in references]
    found = sum(len(words & set(text.split())) for words, text in zip(novel, normalized, strict=True))
    statistics["novel_reference_words"] = sum(map(len, novel))
    if statistics["novel_reference_words"]:
        statistics["novel_word_recall"] = found / statistics["novel_reference_words"]
    return statistics


def copying(captions: Sequence[str], retrieved: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of captions that equal a retrieved one, and of those that equal the first, ignoring case and punctuation.

    An empty caption copies nothing; a clip without retrieved captions counts as not copied.
    """
    any_copied = first_copied = 0
    for caption, found in zip(captions, retrieved, strict=True):
        own, others = normalize_text(caption), [normalize_text(text) for text in found]
        any_copied += bool(own) and own in others
        first_copied += bool(own) and own in others[:1]
    return {"copied_retrieved": any_copied / len(captions), "copied_first_retrieved": first_copied / len(captions)}
