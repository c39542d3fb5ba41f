"""Which of the captions that a search has found are given: of several windows, diverse ones, as many as are near."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Hit = tuple[int, float]
# Diverse captions are chosen from this many times as many.
POOL = 8


def check_choice(diversity: Any, score_drop: Any, prefix: str = "") -> None:
    """Refuses values that say nothing about which captions are given.

    Args:
        diversity: a number from 0 to 1.
        score_drop: a number of at least 0, or `None`.
        prefix: of the names in the message, such as "retrieval_".

    Raises:
        `ValueError`: for another value of either.
    """
    if not _is_number(diversity) or not 0 <= diversity <= 1:
        raise ValueError(f"`{prefix}diversity` must be a number from 0 to 1, got {diversity!r}.")
    if score_drop is not None and (not _is_number(score_drop) or not score_drop >= 0):
        raise ValueError(f"`{prefix}score_drop` must be a number of at least 0, or None, got {score_drop!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def by_similarity(hit: Hit) -> tuple[float, int]:
    """Sorts hits (row, cosine) most similar first, ties to the lower row."""
    return -hit[1], hit[0]


def take_turns(found: Sequence[Sequence[Hit]], k: int, text_of: Callable[[int], str]) -> list[Hit]:
    """Merges the windows' results: all first choices, then all second ones, until k texts are together.

    Args:
        found: for each window its hits (row, cosine), most similar first.
        k: hits to give.
        text_of: the text of a row; no text comes twice.
    """
    if len(found) == 1:
        return list(found[0])
    merged: dict[str, Hit] = {}
    for rank in range(k):
        for row, score in sorted((hits[rank] for hits in found if rank < len(hits)), key=by_similarity):
            text = text_of(row)
            if text in merged:
                # Another window found it too: its best similarity counts.
                merged[text] = min(merged[text], (row, score), key=by_similarity)
            elif len(merged) < k:
                merged[text] = (row, score)
    return sorted(merged.values(), key=by_similarity)


def choose_diverse(hits: Sequence[Hit], embeddings: Any, k: int, diversity: float) -> list[Hit]:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): k of the hits that are near the query and far
    from each other. Each next one has the largest `(1 - diversity) * cosine to the query - diversity * largest cosine
    to those chosen before`.

    Args:
        hits: (row, cosine), most similar first; the first is always chosen.
        embeddings: unit vectors of all rows.
        k: how many.
        diversity: 0 gives the first k, 1 looks at nothing but the distance from each other.

    Returns:
        Those chosen, most similar first.
    """
    if len(hits) <= k or not diversity:
        return list(hits[:k])
    vectors = np.asarray(embeddings[np.array([row for row, _ in hits])], dtype=np.float32)
    relevance = (1 - diversity) * np.array([score for _, score in hits])
    chosen = [0]
    nearest = vectors @ vectors[0]
    while len(chosen) < k:
        gain = relevance - diversity * nearest
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        nearest = np.maximum(nearest, vectors @ vectors[best])
    return [hits[number] for number in sorted(chosen)]


def cut_at_drop(hits: Sequence[Hit], drop: float) -> list[Hit]:
    """Only hits that score no more than `drop` less than the best: where one caption alone fits, k is 1."""
    return [hit for hit in hits if hit[1] >= hits[0][1] - drop]


__all__ = ["POOL", "Hit", "by_similarity", "check_choice", "choose_diverse", "cut_at_drop", "take_turns"]
