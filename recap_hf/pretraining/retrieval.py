"""Retrieval between clips and captions: R@1, R@5, R@10 and mAP@10 in both directions."""

from __future__ import annotations

import numpy as np

DEPTHS = (1, 5, 10)


def retrieval_figures(similarity: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Figures of both directions, and `map10`, the mean of their mAP@10.

    Args:
        similarity: `(clips, captions)`.
        relevant: the same shape, bool: the caption is one of the clip's.
    """
    figures = {}
    for name, scores, right in (
        ("audio_to_text", similarity, relevant),
        ("text_to_audio", similarity.T, relevant.T),
    ):
        figures |= {f"{name}_{metric}": value for metric, value in one_direction(scores, right).items()}
    return {"map10": (figures["audio_to_text_map10"] + figures["text_to_audio_map10"]) / 2, **figures}


def one_direction(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """R@k: share of queries with anything relevant among the first k. mAP@10: the mean over the queries of the
    precisions at the relevant places among the first ten, over as many as ten places could hold (as in DCASE's
    language-based audio retrieval, where one is relevant).

    Args:
        scores: `(queries, candidates)`; equal scores keep the candidates' order.
        relevant: the same shape, bool; queries without anything relevant are left out.
    """
    kept = relevant.any(axis=1)
    scores, relevant = scores[kept], relevant[kept]
    depth = min(max(DEPTHS), scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    hits = np.take_along_axis(relevant, order, axis=1)
    figures = {f"r{k}": float(hits[:, :k].any(axis=1).mean()) for k in DEPTHS}
    precision = np.cumsum(hits, axis=1) / np.arange(1, depth + 1)
    possible = np.minimum(relevant.sum(axis=1), max(DEPTHS))
    figures["map10"] = float(((precision * hits).sum(axis=1) / possible).mean())
    return figures
