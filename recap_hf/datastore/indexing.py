"""Building search indexes: a kind for each size, and as much effort as a recall target needs.

Effort is tuned on queries of two sorts, and both must reach the target. Text queries are stored captions, searched
without themselves. Audio lies outside the cloud of captions (the modality gap of contrastive models), which costs an
inverted-file index recall that text queries do not show: these queries are shifted by a constant vector.
"""

import bisect
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recap_hf.modeling.index_recap import INDEX_BACKENDS, ExactIndex, FaissIndex, index_class

# Up to here exact search takes about 2 ms at dimension 512, and an index saves little.
EXACT_UP_TO = 20_000
# From here inverted lists of product codes, scanned in registers, are faster than 8-bit scalars.
PQ_FROM = 200_000
DEFAULT_RECALL = 0.95
RECALL_AT = 4
TUNING_QUERIES = 512
# A result counts as right when its score is at least the k-th exact one less this.
_TIE = 1e-5
# So many rows are looked at for ties of the k-th.
_RANKED = 128
_MANY_ROWS = 2_000_000
_TRAINING_ROWS_PER_LIST = 40
_TIMED_QUERIES = 64
_CANDIDATES = (32, 64, 128, 256, 512, 1024)
# Chosen on some queries and measured on others, a recall differs by half a hundredth or so: aimed that much higher.
_MARGIN = 0.005
# Fewer candidates that need more than this times the effort are not faster.
_EFFORT_RANGE = 8
# The coarse quantiser of a large inverted file compares codes, and this many times the lists asked for exactly.
_COARSE_REFINED = 2.0
_GAP, _NOISE = 1.0, 0.5
_BLOCK_ROWS = 1 << 17


class StoredIndex(Protocol):
    """An index that is built of embeddings and saved in the folder of a datastore.

    Attributes:
        exact, max_k, num_candidates, description: see [`ExactIndex`].
        backend: its name in `INDEX_BACKENDS` and in the manifest.
        suffix: of its file: "faiss", "bin" or "npy".
        kinds: the kinds that `build` makes.
        num_rows, dimension: shape of the embeddings that it was made of.
    """

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See [`ExactIndex.search`]."""

    @classmethod
    def build(cls, embeddings: Any, kind: str, recall: float) -> "StoredIndex":
        """An index of unit vectors of shape `(rows, dimension)` that finds the share `recall` of the nearest rows."""

    @classmethod
    def read(cls, path: Path, description: Mapping[str, Any]) -> "StoredIndex":
        """The index in a file; a `ValueError` for a file that holds none."""

    def write(self, path: Path) -> None:
        """Writes the file."""

    def refill(self, embeddings: Any, appended: bool) -> None:
        """Takes over changed embeddings; `appended`: the first rows are those that the index has."""


def index_kinds() -> dict[str, type[StoredIndex]]:
    """Kinds of indexes and the classes that build them."""
    return {kind: each for each in map(index_class, INDEX_BACKENDS) for kind in each.kinds}


def check_index(kind: str, recall: float, dimension: int) -> None:
    """Refuses what [`build_index`] could not do, before there is anything to index.

    Raises:
        ValueError: for an unknown kind, or a recall that is no share. ImportError: without FAISS.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"`recall` must be above 0 and at most 1, got {recall}")
    kinds = index_kinds()
    if kind in ("auto", "exact") or (kind in kinds and not issubclass(kinds[kind], FaissIndex)):
        return
    faiss = _faiss()
    if kind in kinds:
        return
    try:
        faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        hint = f"expected auto, exact, {', '.join(kinds)} or a FAISS string"
        raise ValueError(f"{kind!r} is no kind of index for dimension {dimension}: {hint}") from error


def build_index(embeddings: Any, kind: str = "auto", recall: float = DEFAULT_RECALL) -> StoredIndex | None:
    """Makes an index that reaches a recall.

    Args:
        embeddings: unit vectors of shape `(rows, dimension)`; may be memory-mapped.
        kind: "auto" (by size), "exact", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw", or a factory string of FAISS.
        recall: tie-aware recall@4 that text and audio queries must both reach.

    Returns:
        The index with its settings and measurements, `None` for exact search.

    Raises:
        ValueError: for an unknown kind, a target that is not above 0 and at most 1, or too few rows for the kind.
        ImportError: without FAISS.
    """
    check_index(kind, recall, embeddings.shape[1])
    # There is nothing to train on.
    chosen = kind if len(embeddings) else "exact"
    if kind == "auto":
        rows = len(embeddings)
        chosen = "exact" if rows <= EXACT_UP_TO else "ivf_sq8" if rows < PQ_FROM else "ivf_pq"
    if chosen == "exact":
        return None
    index = index_kinds().get(chosen, FaissIndex).build(embeddings, chosen, recall)
    if kind == "auto" and chosen == "ivf_pq" and not index.description.get("reached", True):
        # Codes too coarse for these embeddings: 8 bits a dimension.
        index = FaissIndex.build(embeddings, "ivf_sq8", recall)
    if not index.description.get("reached", True):
        found = min(value for name, value in index.description["recall"].items() if name != "k")
        hint = "try another kind of index, or `exact`"
        warnings.warn(
            f"An index of the kind {index.description['kind']} reaches a recall of {found}, not {recall}: {hint}.",
            stacklevel=2,
        )
    index.description |= {"wanted_kind": kind, "wanted_recall": recall, "trained_rows": len(embeddings)}
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("An approximate index needs FAISS: pip install faiss-cpu") from error
    return faiss


def factory_string(kind: str, num_rows: int, dimension: int) -> str:
    """The string of FAISS's index factory for a kind and size; another string is returned as it is."""
    # About 2 * sqrt(n) lists, as a power of 2, each with enough rows to be learnt from. More than 4,096 of them take
    # longer to learn than they save, up to 16 million rows.
    root = math.sqrt(max(num_rows, 1))
    lists = 2 ** round(math.log2(min(2 * root, max(4096, root))))
    lists = max(1, min(lists, num_rows // 39))
    # 4 bits for 4 dimensions, but 64 bytes a row where it has them: near-duplicates of a small encoder lie closer
    # together than coarser codes tell.
    codes = max(size for size in range(1, max(128, dimension // 4) + 1) if dimension % size == 0)
    strings = {
        "ivf_flat": f"IVF{lists},Flat",
        "ivf_sq8": f"IVF{lists},SQ8",
        # The lists are found by codes scanned in registers too: comparing a query with 2,048 centroids of dimension
        # 512 as floats takes longer than all the rest.
        "ivf_pq": f"IVF{lists}(PQ{codes}x4fs,RFlat),PQ{codes}x4fs",
        "hnsw": "HNSW32,SQ8",
    }
    return strings.get(kind, kind)


def build_faiss(embeddings: Any, kind: str, recall: float, seed: int = 0) -> FaissIndex:
    """Trains an index, fills it, and raises its effort until the recall target holds; see [`build_index`].

    Its description says whether a pair of effort and candidates `reached` the target.
    """
    faiss = _faiss()
    started = time.perf_counter()
    num_rows, dimension = embeddings.shape
    string = factory_string(kind, num_rows, dimension)
    index = faiss.index_factory(dimension, string, faiss.METRIC_INNER_PRODUCT)
    wanted = max(getattr(index, "nlist", 256) * _TRAINING_ROWS_PER_LIST, 10_000)
    rows = np.arange(num_rows)
    if num_rows > wanted:
        rows = np.sort(np.random.default_rng(seed).choice(num_rows, wanted, replace=False))
    try:
        index.train(np.ascontiguousarray(embeddings[rows], dtype=np.float32))
    except RuntimeError as error:
        hint = "take `exact`, which is fast up to 20,000 captions"
        raise ValueError(f"FAISS cannot train {string} on {num_rows} captions: {hint}") from error
    coarse = faiss.downcast_index(index.quantizer) if hasattr(index, "quantizer") else None
    if hasattr(coarse, "k_factor"):
        coarse.k_factor = _COARSE_REFINED
    found = FaissIndex(index, {"kind": string, "effort": 1, "num_candidates": _CANDIDATES[0]})
    found.refill(embeddings, appended=True)
    filled = time.perf_counter()
    # At ten million rows the exact answers of all queries would take longer than training.
    count = TUNING_QUERIES if num_rows <= _MANY_ROWS else TUNING_QUERIES // 2
    found.description["reached"] = tune(found, embeddings, tuning_queries(embeddings, count, seed), recall)
    times = {"build_s": filled - started, "tuning_s": time.perf_counter() - filled}
    found.description |= {name: round(seconds, 2) for name, seconds in times.items()}
    return found


def tune(index: FaissIndex, embeddings: Any, queries: Sequence["Queries"], recall: float, k: int = RECALL_AT) -> bool:
    """Sets the fastest pair of effort and candidates at which every sort of query reaches the target, and records
    what was measured. Half of the queries choose the pair, the other half measure its recall.

    Returns:
        Whether any pair reaches the target.
    """
    answer(queries, embeddings, k)
    chosen, held_out = ([each.half(first) for each in queries] for first in (0, 1))
    largest = getattr(index.index, "nlist", 4096)

    def recalls(queries: Sequence[Queries], effort: int, count: int) -> dict[str, float]:
        index.set_effort(effort, count)
        limit = min(count, index.num_rows)
        return {each.name: each.recall(index.search(each.vectors, limit)[0], k) for each in queries}

    def reaches(effort: int, count: int) -> bool:
        return min(recalls(chosen, effort, count).values()) >= min(recall + _MARGIN, 1.0)

    best = (math.inf, largest, _CANDIDATES[-1])
    # To an eighth: finer steps cost more than they save.
    efforts = [n for n in range(1, largest) if n < 8 or not n % (1 << (n.bit_length() - 4))] + [largest]
    # From the most candidates down: fewer need as much effort or more, and are tried while that can still be faster.
    for count in reversed(_CANDIDATES):
        place = bisect.bisect_left(efforts, True, key=partial(reaches, count=count))
        if place == len(efforts):
            break
        efforts = [n for n in efforts[place:] if n <= _EFFORT_RANGE * efforts[place]]
        index.set_effort(efforts[0], count)
        best = min(best, (_median_s(index, embeddings, chosen[0].vectors, count), efforts[0], count))
    found = recalls(held_out, *best[1:])
    index.description["recall"] = {"k": k, **{name: round(value, 4) for name, value in found.items()}}
    return best[0] < math.inf


def _median_s(index: FaissIndex, embeddings: Any, vectors: np.ndarray, count: int) -> float:
    """Seconds that one query takes, its candidates scored again."""
    times = []
    for query in vectors[:_TIMED_QUERIES]:
        started = time.perf_counter()
        rows = index.search(query[None], min(count, index.num_rows))[0][0]
        np.asarray(embeddings[rows[rows >= 0]], dtype=np.float32) @ query
        times.append(time.perf_counter() - started)
    return float(np.median(times))


@dataclass
class Queries:
    """Queries of one sort, and after [`answer`] their exact answers.

    Args:
        name: "text" or "audio".
        vectors: unit vectors of shape `(num_queries, dimension)`, float32.
        own: the row that each query was made of and must not find, -1 for none.
        right: for each query the rows that score at least its exact k-th, less 1e-5.
    """

    name: str
    vectors: np.ndarray
    own: np.ndarray
    right: Sequence[np.ndarray] = ()

    def half(self, first: int) -> "Queries":
        """Every second query from the first or the second on."""
        return Queries(self.name, self.vectors[first::2], self.own[first::2], self.right[first::2])

    def recall(self, found: Sequence[np.ndarray], k: int) -> float:
        """Tie-aware recall@k of the rows that were found for each query; 1.0 where there is no row to find."""
        pairs = zip(found, self.right, strict=True)
        hits = sum(min(k, len(np.intersect1d(rows, right))) for rows, right in pairs)
        # A small datastore has fewer than k rows to find.
        wanted = sum(min(k, len(right)) for right in self.right)
        return hits / wanted if wanted else 1.0


def answer(queries: Sequence[Queries], embeddings: Any, k: int) -> None:
    """Finds the right rows of every query; all sorts in one reading of the embeddings."""
    vectors = np.concatenate([each.vectors for each in queries])
    rows, scores = exact_rows(vectors, embeddings, min(max(k + 1, _RANKED), len(embeddings)))
    ends = np.cumsum([len(each.vectors) for each in queries])[:-1]
    for each, own, cosines in zip(queries, np.split(rows, ends), np.split(scores, ends), strict=True):
        cosines = np.where(own == each.own[:, None], -np.inf, cosines)
        kth = -np.sort(-cosines, axis=1)[:, min(k, cosines.shape[1]) - 1]
        near = (cosines >= kth[:, None] - _TIE) & np.isfinite(cosines)
        each.right = [row[fits] for row, fits in zip(own, near, strict=True)]


def exact_rows(queries: np.ndarray, embeddings: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the exact nearest neighbours, most similar first; embeddings are read in blocks."""
    rows, scores = [], []
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        block = np.asarray(embeddings[start : start + _BLOCK_ROWS], dtype=np.float32)
        found = ExactIndex(block).search(queries, min(count, len(block)))
        rows.append(found[0] + start)
        scores.append(found[1])
    rows, scores = np.concatenate(rows, axis=1), np.concatenate(scores, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def tuning_queries(embeddings: Any, count: int, seed: int = 0) -> list[Queries]:
    """Text queries (stored rows, to be found without themselves) and audio queries (the gap simulated)."""
    rng = np.random.default_rng([seed, 1])
    rows = np.sort(rng.choice(len(embeddings), min(count, len(embeddings)), replace=False))
    text = np.ascontiguousarray(embeddings[rows], dtype=np.float32)
    return [Queries("text", text, rows), Queries("audio", with_audio_gap(text, rng), rows)]


def with_audio_gap(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors moved like audio embeddings from those of their captions: noise of length 0.5 for each, and one
    gap of length 1 for all."""
    dimension = vectors.shape[1]
    gap = rng.standard_normal(dimension)
    noise = rng.standard_normal(vectors.shape) / math.sqrt(dimension)
    moved = vectors + _GAP * gap / np.linalg.norm(gap) + _NOISE * noise
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
