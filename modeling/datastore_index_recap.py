"""Searching embeddings: exactly, or through a FAISS index that was saved beside them.

An index only proposes candidates. The datastore scores them again with the stored embeddings, so that a coarse index
costs recall and never a wrong score. Captions added after the index was made are searched exactly beside it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .datastore_writing_recap import add_file

logger = logging.getLogger(__name__)

# Rows that are converted to float32 at a time, where embeddings are stored in another type.
_BLOCK_ROWS = 1 << 15


@contextmanager
def threads_for(num_queries: int, faiss: Any) -> Iterator[None]:
    """FAISS's threads for a search: one for one query. More save nothing there, and on a busy machine each is waited
    for."""
    threads = faiss.omp_get_max_threads()
    if num_queries > 1 or threads == 1:
        yield
        return
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def searchable(part: Any) -> Any:
    """Embeddings to search exactly: a float32 copy of few that are stored in fewer bits, which would otherwise be
    converted for every query."""
    few = part.dtype != np.float32 and len(part) <= _BLOCK_ROWS
    return np.asarray(part, dtype=np.float32) if few else part


def exact_neighbours(queries: np.ndarray, embeddings: np.ndarray, count: int, faiss: Any = None) -> np.ndarray:
    """Rows of the `count` largest dot products, in any order.

    Args:
        queries: float32 array of shape `(num_queries, dimension)`.
        embeddings: array of shape `(rows, dimension)`, float32 or float16, may be memory-mapped: it is not copied.
        count: rows per query; fewer where there are fewer.
        faiss: the module, or `None` to do it with NumPy.

    Returns:
        int64 array of shape `(num_queries, min(count, rows))`.
    """
    count = min(count, len(embeddings))
    if count == 0:
        return np.empty((len(queries), 0), np.int64)
    if faiss is not None and embeddings.dtype == np.float32:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        with threads_for(len(queries), faiss):
            return faiss.knn(queries, np.ascontiguousarray(embeddings), count, metric=faiss.METRIC_INNER_PRODUCT)[1]
    best_scores = np.empty((len(queries), 0), np.float32)
    best_rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        block = np.asarray(embeddings[start : start + _BLOCK_ROWS], dtype=np.float32)
        scores = np.concatenate([best_scores, queries @ block.T], axis=1)
        rows = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        rows = np.concatenate([best_rows, rows], axis=1)
        if scores.shape[1] > count:
            kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            scores, rows = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
        best_scores, best_rows = scores, rows
    return best_rows


class DeviceSearch:
    """All embeddings on a device of torch, compared with the queries in one product.

    Args:
        embeddings: array of shape `(rows, dimension)`; may be memory-mapped, it is copied block by block.
        device: of torch, such as "cuda".
        dtype: "float32" or "float16".
    """

    def __init__(self, embeddings: Any, device: Any, dtype: str = "float32") -> None:
        # Here: what runs without torch searches datastores too.
        import torch

        if dtype not in ("float32", "float16"):
            raise ValueError(f"`dtype` must be 'float32' or 'float16', got {dtype!r}.")
        self.embeddings = torch.empty(embeddings.shape, dtype=getattr(torch, dtype), device=device)
        for start in range(0, len(embeddings), _BLOCK_ROWS):
            block = np.array(embeddings[start : start + _BLOCK_ROWS], dtype=np.float32)
            self.embeddings[start : start + len(block)] = torch.from_numpy(block)

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Rows of the `count` largest dot products, int64 of shape `(num_queries, count)`."""
        import torch

        vectors = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self.embeddings)
        return (vectors @ self.embeddings.T).topk(count, dim=1).indices.cpu().numpy()


class SearchIndex:
    """A FAISS index over the first rows of a datastore, with the effort that its recall was measured at.

    Args:
        index: a `faiss.Index` of inner products.
        description: `kind` (the string of FAISS's index factory), `effort` (lists that a query visits, or HNSW's
            search depth), `num_candidates` (rows that are scored again), and measurements under other names.
        faiss: the module.
    """

    def __init__(self, index: Any, description: Mapping[str, Any], faiss: Any) -> None:
        self.index = index
        self.description = {key: value for key, value in description.items() if key not in ("file", "num_rows")}
        self._faiss = faiss
        self.num_rows = int(index.ntotal)
        self.set_effort(int(description["effort"]), int(description["num_candidates"]))

    def set_effort(self, effort: int, num_candidates: int) -> None:
        """Visits `effort` lists, or nodes of HNSW's graph, per query; `num_candidates` are scored again."""
        index = self._faiss.downcast_index(self.index)
        if hasattr(index, "nprobe"):
            index.nprobe = effort
        elif hasattr(index, "hnsw"):
            index.hnsw.efSearch = effort
        self.description["effort"], self.description["num_candidates"] = effort, num_candidates

    @property
    def dimension(self) -> int:
        return self.index.d

    @property
    def num_candidates(self) -> int:
        return self.description["num_candidates"]

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Rows of about the `count` nearest embeddings, -1 where fewer were found."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        with threads_for(len(queries), self._faiss):
            return self.index.search(queries, count)[1]

    def write(self, folder: Path, files: dict[str, Any]) -> dict[str, Any]:
        """Writes the index into a datastore's folder and returns its entry for the manifest."""
        temporary = folder / f".index.{os.getpid()}.tmp"
        self._faiss.write_index(self.index, str(temporary))
        return {
            "file": add_file(folder, "index", temporary, files),
            "num_rows": self.num_rows,
            **self.description,
        }


def open_index(folder: Path, manifest: Mapping[str, Any], faiss: Any) -> SearchIndex | None:
    """The index of an opened datastore; `None` where it has none, or where FAISS is missing: the search is exact.

    Raises:
        `OSError`: if it is missing. `ValueError`: if the file is no index of this datastore.
    """
    entry = manifest["index"]
    if entry is None:
        return None
    if faiss is None:
        logger.warning("%s: the search is exact and slow, its index needs FAISS (pip install faiss-cpu).", folder)
        return None
    path = folder / entry["file"]
    try:
        index = SearchIndex(faiss.read_index(str(path)), entry, faiss)
    except (RuntimeError, KeyError, TypeError) as error:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, the datastore is incomplete.") from error
        raise ValueError(f"{path}: not an index of a datastore ({error!r:.200}).") from error
    # Positions are counted over whole segments: an index ends where one of them does.
    ends = np.cumsum([segment["num_captions"] for segment in manifest["segments"]])
    fits = index.num_rows == entry["num_rows"] and index.num_rows in ends and index.dimension == manifest["dimension"]
    if not fits or index.index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"{path}: holds {index.num_rows} rows of dimension {index.dimension}, expected {entry['num_rows']} of "
            f"dimension {manifest['dimension']}: it is of another datastore."
        )
    return index


__all__ = ["DeviceSearch", "SearchIndex", "exact_neighbours", "open_index", "searchable"]
