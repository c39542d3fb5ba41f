"""Search indexes of a caption datastore, exact and FAISS, and the choice of captions among what they find.

An index proposes rows. The datastore computes their scores again in float64 from the stored embeddings, so an
approximate index can cost recall, and never gives a wrong score.

A further kind of index is a class with the members of `recap_hf.datastore.StoredIndex`, and a line in
`INDEX_BACKENDS`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import faiss
except ImportError:
    faiss = None

logger = logging.getLogger(__name__)

# A row and its cosine to the query.
Hit = tuple[int, float]

# Rows that are converted to float32 at a time, where embeddings are stored in another type.
_BLOCK_ROWS = 1 << 15
# Rows that are fetched beyond those asked for: repeated and excluded captions seldom need a second search.
_MIN_CANDIDATES = 32
# Of an index's candidates an eighth, and no fewer than 32, are scored in float64.
_RESCORED_SHARE, _RESCORED_AT_LEAST = 8, 32
_LEAST_SHARE = 0.7


def from_package(name: str, what: str) -> Any:
    """The module `recap_hf.{name}`; an `ImportError`, that `what` needs it, where only remote code is there."""
    try:
        return importlib.import_module(f"recap_hf.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "recap_hf":
            raise
        raise ImportError(f"{what} needs the package: pip install recap-hf") from error


class ExactIndex:
    """Compares a query with every embedding. Every index has its attributes and its `search`.

    Args:
        embeddings: array of shape `(rows, dimension)`, float32, float16 or what is read as float32; may be
            memory-mapped.

    Attributes:
        exact: whether `search` finds the true nearest rows.
        max_k: the largest `k` that `search` takes.
        num_candidates: rows that a search should fetch at least; an exact one beyond those asked for.
        description: kind, settings and measurements; `None` for exact search.
    """

    exact = True
    description = None
    num_candidates = _MIN_CANDIDATES

    def __init__(self, embeddings: Any) -> None:
        # A small array in fewer bits is converted once, and not for every query.
        small = embeddings.dtype != np.float32 and len(embeddings) <= _BLOCK_ROWS
        self.embeddings = np.asarray(embeddings, dtype=np.float32) if small else embeddings
        self.max_k = len(embeddings)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the largest dot products, in any order.

        Args:
            queries: float32 of shape `(num_queries, dimension)`.
            k: rows per query, at most `max_k`.

        Returns:
            Rows (int64, -1 where fewer were found) and scores (float32), both of shape `(num_queries, k)`.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        # One query is a matrix-vector product, which NumPy computes on all cores and FAISS on one.
        if faiss is not None and self.embeddings.dtype == np.float32 and len(queries) > 1:
            vectors = np.ascontiguousarray(self.embeddings)
            return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[::-1]
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start in range(0, len(self.embeddings), _BLOCK_ROWS):
            block = np.asarray(self.embeddings[start : start + _BLOCK_ROWS], dtype=np.float32)
            own = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
            scores = np.concatenate([scores, queries @ block.T], axis=1)
            rows = np.concatenate([rows, own], axis=1)
            if scores.shape[1] > k:
                kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores, rows = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
        return rows, scores


class FaissIndex:
    """A FAISS index over all rows of a datastore, with the effort that its recall was measured at.

    Args:
        index: a `faiss.Index` of inner products.
        description: `kind` (the string of FAISS's index factory), `effort` (lists that a query visits, or HNSW's
            search depth), `num_candidates` (rows that are scored again), and measurements under other names.
    """

    exact = False
    backend = suffix = "faiss"
    kinds = ("ivf_flat", "ivf_sq8", "ivf_pq", "hnsw")

    def __init__(self, index: Any, description: Mapping[str, Any]) -> None:
        self.index = index
        self.description: dict[str, Any] = dict(description)
        self.set_effort(int(description["effort"]), int(description["num_candidates"]))

    @classmethod
    def build(cls, embeddings: Any, kind: str, recall: float) -> FaissIndex:
        """Trains, fills and tunes an index; needs `recap_hf`."""
        return from_package("datastore.indexing", "building an index").build_faiss(embeddings, kind, recall)

    @classmethod
    def read(cls, path: Path, description: Mapping[str, Any]) -> FaissIndex:
        """See [`StoredIndex.read`]."""
        try:
            index = cls(faiss.read_index(str(path)), description)
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an index of a datastore ({error!r:.200}).") from error
        if index.index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: expected an index of inner products; it is of another datastore.")
        return index

    def write(self, path: Path) -> None:
        """Writes the index into a file."""
        faiss.write_index(self.index, str(path))

    @property
    def num_rows(self) -> int:
        """Rows in the index."""
        return int(self.index.ntotal)

    max_k = num_rows

    @property
    def dimension(self) -> int:
        """Width of the embeddings."""
        return int(self.index.d)

    @property
    def num_candidates(self) -> int:
        """Rows that are scored again."""
        return self.description["num_candidates"]

    def set_effort(self, effort: int, num_candidates: int) -> None:
        """A query visits `effort` lists, or nodes of HNSW's graph; `num_candidates` are scored again."""
        index = faiss.downcast_index(self.index)
        if hasattr(index, "hnsw"):
            index.hnsw.efSearch = effort
        elif (lists := faiss.try_extract_index_ivf(self.index)) is not None:
            lists.nprobe = effort
        self.description |= {"effort": effort, "num_candidates": num_candidates}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See [`ExactIndex.search`]."""
        return self.index.search(np.ascontiguousarray(queries, dtype=np.float32), k)[::-1]

    def refill(self, embeddings: Any, appended: bool) -> None:
        """See [`StoredIndex.refill`]. What was learnt in training stays."""
        if not appended:
            self.index.reset()
        for start in range(self.num_rows, len(embeddings), _BLOCK_ROWS):
            self.index.add(np.ascontiguousarray(embeddings[start : start + _BLOCK_ROWS], dtype=np.float32))

    def __getstate__(self) -> dict[str, Any]:
        return {"description": self.description, "bytes": faiss.serialize_index(self.index)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(faiss.deserialize_index(state["bytes"]), state["description"])


# Name in the manifest -> a class, or "module:class" for one that is imported when it is needed.
INDEX_BACKENDS: dict[str, Any] = {"faiss": FaissIndex}


def index_class(backend: str) -> type[Any]:
    """The class of a name in `INDEX_BACKENDS`."""
    found = INDEX_BACKENDS[backend]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(importlib.import_module(module), name)
    return found


def open_index(folder: Path, manifest: Mapping[str, Any]) -> Any:
    """The index of an opened datastore; `None` where it has none or its package is missing: search is exact then.

    Raises:
        `OSError`: if the file is missing. `ValueError`: if it is no index of this datastore.
    """
    entry = manifest["index"]
    if entry is None:
        return None
    backend, path = entry.get("backend", "faiss"), folder / entry["file"]
    if (backend == "faiss" and faiss is None) or backend not in INDEX_BACKENDS:
        package = "FAISS (pip install faiss-cpu)" if backend == "faiss" else f"{backend!r} of another recap-hf"
        logger.warning("%s: search is exact and slow, its index needs %s.", folder, package)
        return None
    description = {key: value for key, value in entry.items() if key not in ("file", "num_rows", "backend")}
    try:
        index = index_class(backend).read(path, description)
    except ValueError as error:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, the datastore is incomplete.") from error
        raise
    rows, dimension = manifest["num_captions"], manifest["dimension"]
    if (index.num_rows, index.dimension) != (rows, dimension):
        raise ValueError(
            f"{path}: of another datastore, it holds {index.num_rows} rows of dimension {index.dimension}, expected "
            f"{rows} of dimension {dimension}."
        )
    return index


def score_again(query: np.ndarray, vectors: Any, rows: np.ndarray, exact: bool) -> list[Hit]:
    """The rows that an index proposes with their cosines, most similar first, ties to the lower row.

    In float64 and row by row, so that a score does not depend on which rows or queries were computed with it. Of many
    candidates that are not `exact` most are far off: those are dropped by their scores in float32.
    """
    vectors = vectors[rows]
    if not exact and len(rows) > 2 * _RESCORED_AT_LEAST:
        kept = max(_RESCORED_AT_LEAST, len(rows) // _RESCORED_SHARE)
        rough = vectors.astype(np.float32, copy=False) @ query
        chosen = np.flatnonzero(rough >= np.partition(rough, -kept)[-kept] - 1e-5)
        rows, vectors = rows[chosen], vectors[chosen]
    scores = np.round((vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1), 9)
    order = np.lexsort((rows, -scores))
    return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))


def _by_similarity(hit: Hit) -> tuple[float, int]:
    return -hit[1], hit[0]


def merge_round_robin(found: Sequence[Sequence[Hit]], k: int, text_of: Callable[[int], str]) -> list[Hit]:
    """Merges the hits of several windows, each most similar first: all first ones, then all second ones, until there
    are `k` of different texts. `text_of` gives the text of a row."""
    if len(found) == 1:
        return list(found[0])
    merged: dict[str, Hit] = {}
    for rank in range(k):
        for row, score in sorted((hits[rank] for hits in found if rank < len(hits)), key=_by_similarity):
            text = text_of(row)
            if text in merged:
                # Another window found it too: its best similarity counts.
                merged[text] = min(merged[text], (row, score), key=_by_similarity)
            elif len(merged) < k:
                merged[text] = (row, score)
    return sorted(merged.values(), key=_by_similarity)


def choose_diverse(query: np.ndarray, hits: Sequence[Hit], embeddings: Any, k: int, diversity: float) -> list[Hit]:
    """Matching pursuit (Mallat and Zhang, IEEE Transactions on Signal Processing, 1993): each further caption is the
    nearest to what those chosen before leave of the query. Of two sounds at once, it finds captions of either.

    Args:
        query, embeddings: unit vectors, the latter of all rows.
        hits: (row, cosine), most similar first. Behind the first k, those below 0.7 of the first cosine do not count.
        k: hits to choose; they are returned most similar first.
        diversity: share of a chosen caption's direction that is taken out of the query; 0 gives the first k.
    """
    hits = hits[: max(k, sum(score >= _LEAST_SHARE * hits[0][1] for _, score in hits))]
    if len(hits) <= k or not diversity:
        return list(hits[:k])
    vectors = np.asarray(embeddings[np.array([row for row, _ in hits])], dtype=np.float32)
    gains, chosen = vectors @ query, [0]
    while len(chosen) < k:
        last = chosen[-1]
        share = diversity * max(float(gains[last]), 0.0)
        gains[last] = -np.inf
        gains -= share * (vectors @ vectors[last])
        chosen.append(int(gains.argmax()))
    return [hits[number] for number in sorted(chosen)]


__all__ = ["INDEX_BACKENDS", "ExactIndex", "FaissIndex", "open_index"]
