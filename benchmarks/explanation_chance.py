"""Whether maps lie where they should more often than shuffled ones: permutation tests and effect sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Look:
    """One word that names an event, with its map over time.

    Args:
        density (`np.ndarray` of shape `(bins,)`): weight per second.
        edges (`np.ndarray` of shape `(bins + 1,)`): seconds.
        own, other: (start, end) in seconds of the event that the word names, and of the recording's other event.
        item (`int`): the recording.
        stratum (`int`): maps are shuffled among the looks of one stratum (the word's place in its caption).
    """

    density: np.ndarray
    edges: np.ndarray
    own: tuple[float, float]
    other: tuple[float, float]
    item: int
    stratum: int


def mean_within(density: np.ndarray, edges: np.ndarray, interval: tuple[float, float]) -> float:
    """The mean of a density over an interval of time; beyond its end the density is 0."""
    covered = np.clip(np.minimum(edges[1:], interval[1]) - np.maximum(edges[:-1], interval[0]), 0, None)
    return float((density * covered).sum() / (interval[1] - interval[0]))


def lies_on(look: Look, density: np.ndarray, edges: np.ndarray) -> float:
    """1 if a map has more weight a second on the look's own event than on the other one, 0 if less, 0.5 if equal."""
    own, other = (mean_within(density, edges, interval) for interval in (look.own, look.other))
    return 0.5 if own == other else float(own > other)


def _two_sided(observed: float, shuffled: np.ndarray) -> float:
    """Share of the shuffles at least as far from their mean as the observation, itself counted as one of them."""
    centre = shuffled.mean()
    return float((1 + (np.abs(shuffled - centre) >= abs(observed - centre) - 1e-12).sum()) / (1 + len(shuffled)))


def shuffled_maps(looks: Sequence[Look], permutations: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """How often a look's map lies on its event, beside maps shuffled over the looks of the same stratum.

    A habit that has nothing to do with the word (looking at the beginning, at loud places, elsewhere for the caption's
    second half) is kept by such a shuffle, and so cannot pass.

    Returns:
        `dict`: `rate` with its 95 % bootstrap `interval` over recordings, `shuffled` (mean rate of the shuffles),
        `difference`, Cohen's `h` of the two rates, `p` of the permutation test (two-sided), `looks`, `recordings`.
    """
    rng = np.random.default_rng(seed)
    hits = np.array([[lies_on(look, other.density, other.edges) for other in looks] for look in looks])
    strata = np.array([look.stratum for look in looks])
    items = np.array([look.item for look in looks])
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    observed = float(np.diag(hits).mean())
    rates = np.empty(permutations)
    order = np.arange(len(looks))
    for index in range(permutations):
        for group in groups:
            order[group] = rng.permutation(group)
        rates[index] = hits[np.arange(len(looks)), order].mean()
    shuffled = float(rates.mean())
    return {
        "rate": observed,
        "interval": _over_items(np.diag(hits), items, rng),
        "shuffled": shuffled,
        "difference": observed - shuffled,
        "cohens_h": float(2 * np.arcsin(np.sqrt(observed)) - 2 * np.arcsin(np.sqrt(shuffled))),
        "p": _two_sided(observed, rates),
        "looks": len(looks),
        "recordings": len(np.unique(items)),
    }


def _over_items(values: np.ndarray, items: np.ndarray, rng: np.random.Generator, samples: int = 2000) -> list[float]:
    names, inverse = np.unique(items, return_inverse=True)
    sums = np.bincount(inverse, values)
    counts = np.bincount(inverse)
    picks = rng.integers(len(names), size=(samples, len(names)))
    return [float(v) for v in np.percentile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [2.5, 97.5])]


def swapped_maps(pairs: Sequence[tuple[Look, Look]], permutations: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Whether the two words of one caption look at different places, each at its own event.

    For each caption the share of weight on the right event, minus the same with the two maps swapped; under chance its
    sign is a coin's.

    Returns:
        `dict`: `rate` of captions with the maps the right way round, mean `difference` of shares, Cohen's `d`, `p` of
        the sign-flip test (two-sided), `captions`.
    """
    rng = np.random.default_rng(seed)
    differences = []
    for first, second in pairs:
        right = _share(first, first) + _share(second, second)
        wrong = _share(first, second) + _share(second, first)
        differences.append((right - wrong) / 2)
    values = np.array(differences)
    signs = rng.choice([-1.0, 1.0], size=(permutations, len(values)))
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return {
        "rate": float(np.mean(np.where(values == 0, 0.5, values > 0))),
        "difference": float(values.mean()),
        "cohens_d": float(values.mean() / deviation) if deviation else 0.0,
        "p": _two_sided(float(values.mean()), (signs * values).mean(axis=1)),
        "captions": len(values),
    }


def _share(look: Look, source: Look) -> float:
    own, other = (mean_within(source.density, source.edges, interval) for interval in (look.own, look.other))
    return own / (own + other) if own + other > 0 else 0.5


def caption_weights(
    weights: Sequence[np.ndarray], has_word: Sequence[np.ndarray], permutations: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Whether a word's weights lie on the retrieved captions that have the word.

    Args:
        weights: for each word its weights of the k captions, summing to 1.
        has_word: for each word which of the captions have it; words in none or in all of them do not belong here.

    Returns:
        `dict`: mean weight on captions with the word (`share`), the same with the weights of each word shuffled over
        its captions (`shuffled`), `difference`, `p` (two-sided), `words`.
    """
    rng = np.random.default_rng(seed)
    observed = np.mean([w[h].sum() for w, h in zip(weights, has_word, strict=True)])
    # Shuffling a word's weights gives each caption any of them: drawn together for all words with the same k.
    totals = np.zeros(permutations)
    for w, h in zip(weights, has_word, strict=True):
        orders = rng.permuted(np.tile(np.arange(len(w)), (permutations, 1)), axis=1)
        totals += w[orders][:, h].sum(axis=1)
    shuffled = totals / len(weights)
    return {
        "share": float(observed),
        "shuffled": float(shuffled.mean()),
        "difference": float(observed - shuffled.mean()),
        "p": _two_sided(float(observed), shuffled),
        "words": len(weights),
    }


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def correlation(x: Sequence[float], y: Sequence[float], permutations: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Spearman's rank correlation `rho` with the `p` of a permutation test (two-sided), over `pairs`."""
    rng = np.random.default_rng(seed)
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    if scale == 0:
        return {"rho": 0.0, "p": 1.0, "pairs": len(x)}
    shuffled = np.array([(a * rng.permutation(b)).sum() for _ in range(permutations)]) / scale
    observed = float((a * b).sum() / scale)
    return {"rho": observed, "p": _two_sided(observed, shuffled), "pairs": len(x)}
