"""Time, memory and recall, as the benchmarks of datastores state them."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.datastore.files import publish, write_new
from recap_hf.datastore.indexing import RECALL_AT, Queries


def single_query_ms(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of one query at a time, in milliseconds."""
    times = []
    for query in queries:
        started = time.perf_counter()
        search(query[None])
        times.append(1000 * (time.perf_counter() - started))
    return {"median": round(float(np.median(times)), 3), "p95": round(float(np.percentile(times, 95)), 3)}


def resident_mb() -> dict[str, float]:
    """Memory of this process: `anonymous` is its own, `file` is mapped and may be dropped by the system (Linux)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = {"total": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: round(int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024) for name, key in fields.items()}


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, so that its memory is measured alone, and returns what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_store(folder: Path, records: Iterable[Any], blocks: Iterable[np.ndarray], shape: Any, dtype: str) -> None:
    """A datastore without an index, of records and of blocks of embeddings, which have `shape` together."""
    folder.mkdir(parents=True, exist_ok=True)
    new = write_new(folder, records, blocks, shape, dtype)
    contents = {"num_captions": shape[0], "dimension": shape[1], "keys": "text", "dtype": dtype, "fingerprint": None}
    publish(folder, contents, new)


def recall_at(store: Any, queries: Queries, k: int = RECALL_AT) -> float:
    """Recall@k of the rows that a datastore's index proposes; the queries are answered."""
    index = store.search_index
    return queries.recall(index.search(queries.vectors, max(k, index.num_candidates))[0], k)


__all__ = ["in_own_process", "recall_at", "resident_mb", "single_query_ms", "write_store"]
