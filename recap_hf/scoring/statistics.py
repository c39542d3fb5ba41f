"""Properties of the captions beside their scores: vocabulary, lengths, novelty, and copying from the prompt."""

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
        "vocabulary_size": len(words_of(tokenized)),
        "reference_vocabulary_size": len(words_of(text for refs in tokenized_references for text in refs)),
        "caption_length": float(np.mean(lengths)),
        "shortest_caption": min(lengths),
        "longest_caption": max(lengths),
        "reference_length": float(np.mean(reference_lengths)),
        "distinct_captions": len(set(tokenized)) / len(tokenized),
        "empty_captions": lengths.count(0),
    }


def words_of(texts: Iterable[str]) -> set[str]:
    """The different words of normalized texts."""
    return {word for text in texts for word in text.split()}


def novel_words(references: Sequence[Sequence[str]], known: set[str]) -> list[set[str]]:
    """The words of each clip's references that are not in `known`, ignoring case and punctuation."""
    return [words_of(map(normalize_text, refs)) - known for refs in references]


def novelty(captions: Sequence[str], references: Sequence, training_captions: Iterable[str]) -> dict[str, float]:
    """What differs from the training captions, ignoring case and punctuation.

    `novel_captions` is the share of captions that equal no training caption. `novel_reference_words` counts the words
    of the references that no training caption has, once per clip; `novel_word_recall` (absent if there are none) is
    the share of them in the clip's caption: only a datastore can supply them.
    """
    known, texts = set(map(normalize_text, training_captions)), [normalize_text(text) for text in captions]
    novel = novel_words(references, words_of(known))
    count = sum(map(len, novel))
    found = sum(len(words & set(text.split())) for words, text in zip(novel, texts, strict=True))
    share = sum(text not in known for text in texts) / len(texts)
    recall = {"novel_word_recall": found / count} if count else {}
    return {"novel_captions": share, "novel_reference_words": count, **recall}


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
