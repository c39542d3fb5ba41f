"""Search indexes: which kind for which size, and as much effort as a recall target asks for.

Effort is tuned on queries of two sorts, and both must reach the target. Text queries are stored captions, searched
without themselves. Audio lies outside the cloud of captions (the modality gap of contrastive models), which costs an
inverted-file index recall that text queries do not show: these queries are shifted by a constant vector.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_index_recap import SearchIndex, exact_neighbours

from .measuring import resident_mb

INDEX_KINDS = ("auto", "exact", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw")
# Up to here the exact search takes about 2 ms at dimension 512, and an index buys little.
EXACT_UP_TO = 20_000
# From here inverted lists of product codes, scanned in registers, beat 8-bit scalars.
PQ_FROM = 200_000
DEFAULT_RECALL = 0.95
RECALL_AT = 4
# A result counts as right when its score is at least the k-th exact one less this.
TIE = 1e-5
TUNING_QUERIES = 512
_MANY_ROWS = 2_000_000
# Rows read at a time where they lie apart: each maps the 64 KiB around it, so that as many map half a gigabyte.
_SCATTERED_ROWS = 1 << 13
_RELEASED_FROM_BYTES = 2 << 30
_TRAINING_ROWS_PER_LIST = 40
_TIMED_QUERIES = 64
_CANDIDATES = (32, 64, 128, 256, 512, 1024)
# Chosen on some queries and measured on others, a recall differs by half a hundredth or so: aimed that much higher.
_MARGIN = 0.005
# Fewer candidates that need more than this times the effort are not faster.
_EFFORT_RANGE = 8
# The coarse quantiser of a large inverted file compares codes, and this many times the lists asked for exactly.
_COARSE_REFINED = 2.0
_GAP = 1.0
_NOISE = 0.5
_BLOCK_ROWS = 1 << 15


def factory_string(kind: str, num_rows: int, dimension: int) -> str | None:
    """The string of FAISS's index factory for a kind and size; `None` for the exact search.

    Args:
        kind: one of `INDEX_KINDS`, or a factory string, which is returned as it is.
    """
    if kind == "auto":
        kind = "exact" if num_rows <= EXACT_UP_TO else "ivf_sq8" if num_rows < PQ_FROM else "ivf_pq"
    if kind == "exact":
        return None
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


def check_index(kind: str, recall: float, dimension: int) -> None:
    """Refuses what [`build_index`] could not do, before there is anything to index.

    Raises:
        ValueError: for an unknown kind, or a recall that is no share. ImportError: without FAISS.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"`recall` must be above 0 and at most 1, got {recall}")
    if kind in ("auto", "exact"):
        return
    faiss = _faiss()
    if kind in INDEX_KINDS:
        return
    try:
        faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"{kind!r} is no kind of index for dimension {dimension}: expected {', '.join(INDEX_KINDS)} or a FAISS "
            "string"
        ) from error


def build_index(
    embeddings: Any,
    kind: str = "auto",
    recall: float = DEFAULT_RECALL,
    k: int = RECALL_AT,
    audio_queries: np.ndarray | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> SearchIndex | None:
    """Trains an index, fills it, and raises its effort until the recall target holds.

    Args:
        embeddings: unit vectors of shape `(rows, dimension)`; anything that has a shape and slices.
        kind: "auto" (by size), "exact", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw", or a factory string of FAISS.
        recall: tie-aware recall@k that text and audio queries must both reach.
        k: of the recall.
        audio_queries: unit vectors of real recordings; without them the gap is simulated.
        seed: of the samples.
        checkpoint: file for the index that is filled and not tuned yet; one that is there is taken up.

    Returns:
        The index with its settings and measurements, `None` for the exact search.

    Raises:
        ValueError: for an unknown kind, or a target between the bounds of none.
        ImportError: without FAISS.
    """
    num_rows, dimension = embeddings.shape
    check_index(kind, recall, dimension)
    string = factory_string(kind, num_rows, dimension)
    if string is None:
        return None
    faiss = _faiss()
    index, build_s = _filled(embeddings, kind, string, np.random.default_rng(seed), checkpoint)
    search_index = SearchIndex(index, {"kind": string, "effort": 1, "num_candidates": _CANDIDATES[0]}, faiss)
    started = time.perf_counter()
    # At ten million rows the exact answers of all queries would take longer than training.
    count = TUNING_QUERIES if num_rows <= _MANY_ROWS else TUNING_QUERIES // 2
    reached = tune(search_index, embeddings, tuning_queries(embeddings, count, seed, audio_queries), recall, k)
    if not reached and kind == "auto" and string != factory_string("ivf_sq8", num_rows, dimension):
        # Codes too coarse for these embeddings: 8 bits a dimension.
        finer = build_index(embeddings, "ivf_sq8", recall, k, audio_queries, seed)
        finer.description["wanted_kind"] = kind
        return finer
    search_index.description |= {
        "wanted_kind": kind,
        "wanted_recall": recall,
        "build_s": round(build_s, 2),
        "tuning_s": round(time.perf_counter() - started, 2),
    }
    return search_index


def _filled(
    embeddings: Any, kind: str, string: str, rng: np.random.Generator, checkpoint: Path | None
) -> tuple[Any, float]:
    """The index of a factory string, trained and filled, and the seconds that it took."""
    faiss = _faiss()
    if checkpoint is not None and checkpoint.is_file():
        about = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
        return faiss.read_index(str(checkpoint)), about["build_s"]
    num_rows, dimension = embeddings.shape
    started = time.perf_counter()
    index = faiss.index_factory(dimension, string, faiss.METRIC_INNER_PRODUCT)
    index.train(_training_rows(embeddings, getattr(index, "nlist", 256), rng))
    coarse = faiss.downcast_index(index.quantizer) if hasattr(index, "quantizer") else None
    if hasattr(coarse, "k_factor"):
        coarse.k_factor = _COARSE_REFINED
    for start in range(0, num_rows, _BLOCK_ROWS):
        index.add(np.ascontiguousarray(embeddings[start : start + _BLOCK_ROWS], dtype=np.float32))
        release(embeddings)
    build_s = time.perf_counter() - started
    if checkpoint is not None:
        about = {"build_s": build_s, "peak_mb": resident_mb()["peak"]}
        checkpoint.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
        faiss.write_index(index, f"{checkpoint}.tmp")
        os.replace(f"{checkpoint}.tmp", checkpoint)
    return index, build_s


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("An approximate index needs FAISS: pip install faiss-cpu") from error
    return faiss


def _training_rows(embeddings: Any, lists: int, rng: np.random.Generator) -> np.ndarray:
    wanted = max(lists * _TRAINING_ROWS_PER_LIST, 10_000)
    if len(embeddings) <= wanted:
        return np.ascontiguousarray(embeddings[:], dtype=np.float32)
    rows = np.sort(rng.choice(len(embeddings), wanted, replace=False))
    found = np.empty((wanted, embeddings.shape[1]), dtype=np.float32)
    for start in range(0, wanted, _SCATTERED_ROWS):
        part = rows[start : start + _SCATTERED_ROWS]
        found[start : start + len(part)] = embeddings[part]
        release(embeddings)
    return found


def release(embeddings: Any) -> None:
    """Takes the pages of large memory-mapped embeddings that were read out of this process's memory: reading through
    ten gigabytes must not hold them. The system keeps them cached while it has room. Those of smaller ones stay: a
    search would have to map them again, which takes as long as comparing them."""
    if math.prod(embeddings.shape) * embeddings.dtype.itemsize < _RELEASED_FROM_BYTES:
        return
    for part in getattr(embeddings, "parts", [embeddings]):
        mapped = getattr(getattr(part, "codes", part), "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            # Not every kind of mapping can be advised; then the pages stay.
            with contextlib.suppress(ValueError, OSError):
                mapped.madvise(mmap.MADV_DONTNEED)


class Queries:
    """Queries with their exact answers.

    Args:
        name: "text" or "audio".
        vectors: unit vectors of shape `(num_queries, dimension)`.
        own: the row that each query was made of and must not find, -1 for none.
    """

    def __init__(self, name: str, vectors: np.ndarray, own: np.ndarray) -> None:
        self.name = name
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.own = own
        self._thresholds: dict[int, np.ndarray] = {}
        # Of each query the rows that were scored, ascending, and their scores.
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def half(self, first: int) -> Queries:
        """Every second query from the first or the second on, with the thresholds that are known."""
        part = Queries(self.name, self.vectors[first::2], self.own[first::2])
        part._thresholds = {k: values[first::2] for k, values in self._thresholds.items()}
        return part

    def scores(self, embeddings: Any, rows: np.ndarray) -> np.ndarray:
        """Cosines of the rows found for each query; its own row and padding are -inf."""
        found = np.full(rows.shape, -np.inf)
        read = 0
        for number, each in enumerate(rows):
            valid = (each >= 0) & (each != self.own[number])
            read += self._read(embeddings, number, each[valid])
            if read >= _SCATTERED_ROWS:
                release(embeddings)
                read = 0
            known, scores = self._known[number]
            found[number, valid] = scores[np.searchsorted(known, each[valid])]
        release(embeddings)
        return found

    def _read(self, embeddings: Any, number: int, rows: np.ndarray) -> int:
        """Scores rows that a query has not found before, and returns how many: with more effort it mostly finds the
        same again, and each read may be one of the disk."""
        known, scores = self._known.get(number, (np.empty(0, np.int64), np.empty(0)))
        new = np.setdiff1d(rows, known)
        if len(new) or number not in self._known:
            vectors = np.asarray(embeddings[new], dtype=np.float64)
            known = np.concatenate([known, new])
            scores = np.concatenate([scores, vectors @ self.vectors[number].astype(np.float64)])
            order = np.argsort(known)
            self._known[number] = known[order], scores[order]
        return len(new)

    def threshold(self, embeddings: Any, k: int) -> np.ndarray:
        """The exact k-th best cosine of each query."""
        if k not in self._thresholds:
            find_thresholds([self], embeddings, k)
        return self._thresholds[k]

    def recall(self, embeddings: Any, rows: np.ndarray, k: int) -> float:
        """Tie-aware recall@k: how many of the best k of `rows` score at least the exact k-th, less 1e-5."""
        best = -np.sort(-self.scores(embeddings, rows), axis=1)[:, :k]
        return float((best >= self.threshold(embeddings, k)[:, None] - TIE).sum() / (k * len(rows)))


def find_thresholds(queries: Sequence[Queries], embeddings: Any, k: int) -> None:
    """The exact k-th best cosine of every query, of all sorts in one reading of the embeddings."""
    rows = exact_rows(np.concatenate([each.vectors for each in queries]), embeddings, min(k + 1, len(embeddings)))
    ends = np.cumsum([len(each.vectors) for each in queries])
    for each, own in zip(queries, np.split(rows, ends[:-1]), strict=True):
        scores = -np.sort(-each.scores(embeddings, own), axis=1)
        # The own row takes a place of the k + 1 where it is among them.
        each._thresholds[k] = scores[:, min(k, scores.shape[1]) - 1]


def exact_rows(queries: np.ndarray, embeddings: Any, count: int) -> np.ndarray:
    """Rows of the exact nearest neighbours in arrays and in datastores of several segments."""
    from recap_hf.modeling import retrieval_recap

    block_rows = 1 << 17
    found, scores = [], []
    for start in range(0, len(embeddings), block_rows):
        block = np.asarray(embeddings[start : start + block_rows], dtype=np.float32)
        rows = exact_neighbours(queries, block, count, retrieval_recap.faiss)
        found.append(rows + start)
        scores.append(np.einsum("qd,qrd->qr", queries, block[rows]))
        release(embeddings)
    rows, scores = np.concatenate(found, axis=1), np.concatenate(scores, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1)


def tuning_queries(
    embeddings: Any, count: int, seed: int = 0, audio_queries: np.ndarray | None = None
) -> list[Queries]:
    """Text queries (stored rows, to be found without themselves) and audio queries (the gap simulated, or real)."""
    rng = np.random.default_rng([seed, 1])
    rows = np.sort(rng.choice(len(embeddings), min(count, len(embeddings)), replace=False))
    text = np.asarray(embeddings[rows], dtype=np.float32)
    if audio_queries is None:
        audio, own = with_audio_gap(text, rng), rows
    else:
        audio, own = np.asarray(audio_queries, dtype=np.float32), np.full(len(audio_queries), -1)
    return [Queries("text", text, rows), Queries("audio", audio, own)]


def with_audio_gap(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors moved like audio embeddings from those of their captions: noise of length 0.5 for each, and one
    gap of length 1 for all."""
    dimension = vectors.shape[1]
    gap = rng.standard_normal(dimension)
    noise = rng.standard_normal(vectors.shape) / math.sqrt(dimension)
    moved = vectors + _GAP * gap / np.linalg.norm(gap) + _NOISE * noise
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def tune(index: SearchIndex, embeddings: Any, queries: Sequence[Queries], recall: float, k: int) -> bool:
    """Sets the fastest pair of effort and candidates at which every sort of query reaches the target, and records
    what was measured.

    Half of the queries choose the pair, the other half measure its recall.

    Returns:
        Whether any pair reaches the target.
    """
    find_thresholds(queries, embeddings, k)
    chosen = [each.half(0) for each in queries]
    held_out = [each.half(1) for each in queries]
    largest = getattr(index.index, "nlist", 4096)
    best = (math.inf, largest, _CANDIDATES[-1])
    low, high = 0, largest
    # From the most candidates down: fewer need as much effort or more, and are tried while that can still be faster.
    for count in reversed(_CANDIDATES):
        effort = _least_effort(index, embeddings, chosen, count, min(recall + _MARGIN, 1.0), k, (low, high))
        if effort is None:
            break
        low, high = effort - 1, min(largest, _EFFORT_RANGE * effort)
        best = min(best, (_median_s(index, embeddings, chosen[0].vectors, count), effort, count))
    _, effort, count = best
    index.set_effort(effort, count)
    measured = {each.name: each.recall(embeddings, index.search(each.vectors, count), k) for each in held_out}
    index.description["recall"] = {"k": k, **{name: round(value, 4) for name, value in measured.items()}}
    return best[0] < math.inf


def _least_effort(
    index: SearchIndex,
    embeddings: Any,
    queries: Sequence[Queries],
    count: int,
    recall: float,
    k: int,
    bounds: tuple[int, int],
) -> int | None:
    """The least effort above the first bound and up to the second that reaches the target with so many candidates, to
    an eighth; it is left set. `None` where the second does not reach it."""

    def reaches(effort: int) -> bool:
        index.set_effort(effort, count)
        limit = min(count, index.num_rows)
        return all(each.recall(embeddings, index.search(each.vectors, limit), k) >= recall for each in queries)

    low, largest = bounds
    high = low + 1
    while not reaches(high):
        if high >= largest:
            return None
        low, high = high, min(high * 2, largest)
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    index.set_effort(high, count)
    return high


def _median_s(index: SearchIndex, embeddings: Any, vectors: np.ndarray, count: int) -> float:
    """Seconds that one query takes, its candidates scored again."""
    times = []
    for number, query in enumerate(vectors[:_TIMED_QUERIES]):
        if number % 8 == 0:
            release(embeddings)
        started = time.perf_counter()
        rows = index.search(query[None], min(count, index.num_rows))[0]
        np.asarray(embeddings[rows[rows >= 0]], dtype=np.float32) @ query
        times.append(time.perf_counter() - started)
    return float(np.median(times))


__all__ = [
    "DEFAULT_RECALL",
    "EXACT_UP_TO",
    "INDEX_KINDS",
    "RECALL_AT",
    "Queries",
    "build_index",
    "check_index",
    "exact_rows",
    "factory_string",
    "find_thresholds",
    "tuning_queries",
    "with_audio_gap",
]
