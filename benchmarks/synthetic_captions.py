"""Captions and embeddings for benchmarks: real ones, and as many more as a size asks for, as dense as real ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

_CLAUSE = re.compile(r",? (?:and then|followed by|and|while|as|with|then)\b |, ")
_MIN_TERM_COUNT = 2
_SVD_OVERSAMPLING = 16
_SVD_ITERATIONS = 4


def made_captions(real: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Captions of clauses of real ones, all different from them and from each other.

    Raises:
        ValueError: if the clauses do not give so many.
    """
    rng = np.random.default_rng(seed)
    clauses = [clause for text in real for clause in _CLAUSE.split(text.rstrip(". ")) if len(clause.split()) > 1]
    joints = (" and ", " while ", " as ", " followed by ", ", then ")
    made: dict[str, None] = {}
    known = set(real)
    while len(made) < count:
        before = len(made)
        parts = rng.integers(len(clauses), size=(count, 2))
        chosen = rng.integers(len(joints), size=count)
        for (first, second), joint in zip(parts, chosen, strict=True):
            text = clauses[first] + joints[joint] + clauses[second]
            if text not in known and len(made) < count:
                made[text] = None
        if len(made) == before:
            raise ValueError(f"{len(real)} captions give only {len(made)} others, {count} are needed")
    return list(made)


def tfidf_svd(texts: Sequence[str], num_fitted: int, dimension: int, seed: int = 0) -> np.ndarray:
    """Unit vectors of texts: words and pairs of words by TF-IDF, projected on the leading singular vectors of the
    first `num_fitted` texts (randomised subspace iteration, Halko et al. 2011).

    Returns:
        float32 array of shape `(len(texts), dimension)`.
    """
    try:
        from scipy import sparse
    except ImportError as error:
        raise ImportError("TF-IDF embeddings need SciPy: pip install scipy") from error

    terms = [_terms(text) for text in texts]
    counts: dict[str, int] = {}
    for each in terms[:num_fitted]:
        for term in set(each):
            counts[term] = counts.get(term, 0) + 1
    vocabulary = {term: number for number, term in enumerate(t for t, n in counts.items() if n >= _MIN_TERM_COUNT)}
    idf = np.log(num_fitted / np.array([counts[term] for term in vocabulary], dtype=np.float32)) + 1
    columns = [[vocabulary[term] for term in each if term in vocabulary] for each in terms]
    bounds = np.cumsum([0, *map(len, columns)])
    flat = np.fromiter((column for each in columns for column in each), dtype=np.int32, count=bounds[-1])
    matrix = sparse.csr_matrix((idf[flat], flat, bounds), shape=(len(texts), len(vocabulary)), dtype=np.float32)
    fitted = matrix[:num_fitted]
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((len(vocabulary), dimension + _SVD_OVERSAMPLING)).astype(np.float32)
    for _ in range(_SVD_ITERATIONS):
        basis = np.linalg.qr(fitted.T @ (fitted @ basis))[0]
    _, vectors = np.linalg.eigh((fitted @ basis).T @ (fitted @ basis))
    basis = np.ascontiguousarray(basis @ vectors[:, ::-1][:, :dimension])
    found = matrix @ basis
    # A text of unknown words alone has no direction: it gets one of its own.
    empty = np.linalg.norm(found, axis=1) < 1e-6
    found[empty] = rng.standard_normal((int(empty.sum()), dimension))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def _terms(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return words + [f"{one} {other}" for one, other in pairwise(words)]


class MixedRows:
    """Any number of unit vectors with the clustering of real ones: row n is made of two of them, as a caption of two
    clauses is, and of noise. Rows are made when they are asked for, the same every time.

    Args:
        base (`np.ndarray` of shape `(num_base, dimension)`): unit vectors of real captions.
        seed: of the choices.
        noise: length of the noise.
    """

    block_rows = 1 << 14

    def __init__(self, base: np.ndarray, seed: int = 0, noise: float = 0.2) -> None:
        self.base = base
        self.seed = seed
        self.noise = noise

    def block(self, number: int) -> np.ndarray:
        """Rows `number * block_rows` and following, float32 of shape `(block_rows, dimension)`."""
        rng = np.random.default_rng([self.seed, number])
        pairs = rng.integers(len(self.base), size=(2, self.block_rows))
        share = rng.uniform(0.5, 1.0, size=(self.block_rows, 1)).astype(np.float32)
        rows = share * self.base[pairs[0]] + (1 - share) * self.base[pairs[1]]
        scale = np.float32(self.noise / np.sqrt(rows.shape[1]))
        rows += scale * rng.standard_normal(rows.shape, dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` rows, block by block."""
        for start in range(0, count, self.block_rows):
            yield self.block(start // self.block_rows)[: count - start]


__all__ = ["MixedRows", "made_captions", "tfidf_svd"]
