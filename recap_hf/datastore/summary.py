"""What a datastore holds, how well its index finds it, and whether its files are whole."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.hub.licences import forbids_commercial_use
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .files import BLOCK_ROWS
from .filters import DuplicateCounter
from .indexing import RECALL_AT, TUNING_QUERIES, Queries, answer, exact_rows, tuning_queries
from .milvus import refuse_milvus

_HUB_RANK = 10
_NORM_TOLERANCE = {"float32": 1e-3, "float16": 4e-3, "int8": 1e-3}


def describe(store: CaptionDatastore, queries: int = TUNING_QUERIES, seed: int = 1) -> dict[str, Any]:
    """Contents and search of a datastore.

    Args:
        store: the datastore.
        queries: stored captions that the search is measured on, without themselves; 0 measures nothing.
        seed: of their choice.

    Returns:
        `captions`, `keys`, `duplicates`, `dimension`, `dtype`, `sources`, `licences`, `splits`, `weak`,
        `non_commercial`, `index` (kind and settings), `recall`, `latency_ms`, `memory` in bytes, `hubness`,
        `generation`, and the `report` of the build.
    """
    counts: dict[str, Counter[str]] = {key: Counter() for key in ("source", "licence", "split")}
    duplicates = DuplicateCounter()
    weak = clips = 0
    for record in store.records:
        for key, counter in counts.items():
            counter[str(record.get(key) or "not stated")] += 1
        duplicates.add(record["caption"], str(record.get("source") or "not stated"))
        weak += bool(record.get("weak"))
        clips += record.get("clip_id") is not None
    manifest = store.manifest or {}
    licences = counts["licence"].items()
    found = {
        "captions": len(store),
        "keys": store.keys,
        "duplicates": duplicates.report(),
        "dimension": store.dimension,
        "dtype": str(store.embeddings.dtype),
        "sources": dict(counts["source"].most_common()),
        "licences": dict(counts["licence"].most_common()),
        "non_commercial": sum(count for name, count in licences if forbids_commercial_use(name)),
        "splits": dict(counts["split"].most_common()),
        "weak": weak,
        "with_clip_id": clips,
        "encoder_known": store.fingerprint is not None,
        "generation": manifest.get("generation"),
        "index": store.index or {"kind": "exact"},
        "memory": memory(store),
    }
    if queries and len(store):
        found |= measure(store, tuning_queries(store.embeddings, queries, seed))
    return found | {"report": manifest.get("report")}


def memory(store: CaptionDatastore) -> dict[str, int]:
    """Bytes of a datastore: `mapped` from its files, which the system may drop, and those of the `index`."""
    manifest = store.manifest
    if manifest is None:
        return {"mapped": 0, "held": int(store.embeddings.nbytes), "index": 0}
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    index = sizes.pop(manifest["index"]["file"]) if manifest["index"] else 0
    return {"mapped": sum(sizes.values()), "held": 0, "index": index}


def measure(store: CaptionDatastore, queries: list[Queries], k: int = RECALL_AT) -> dict[str, Any]:
    """Tie-aware recall@k, latency of one query at a time, and hubness.

    Returns:
        `recall`: for each sort of query, of the rows that the datastore's index proposes; `latency_ms`: median and
        95th percentile of `search` with one query; `hubness`: over the 10 nearest of the text queries, skewness of
        how often a row is among them and the share of queries that have the most frequent one (Radovanovic et al.,
        JMLR 2010).
    """
    answer(queries, store.embeddings, k)
    index = store.search_index
    fetch = min(max(k + 1, index.num_candidates), index.max_k)
    recall, latencies = {"k": k}, []
    for each in queries:
        recall[each.name] = round(each.recall(index.search(each.vectors, fetch)[0], k), 4)
        for query in each.vectors[:64]:
            started = time.perf_counter()
            store.search(query[None], k=k)
            latencies.append(1000 * (time.perf_counter() - started))
    latency = dict(zip(("median", "p95"), np.percentile(latencies, [50, 95]).round(3).tolist(), strict=True))
    return {"recall": recall, "latency_ms": latency, "hubness": hubness(store.embeddings, queries[0])}


def hubness(embeddings: Any, queries: Queries) -> dict[str, Any]:
    """How unevenly the neighbours of the queries are spread over the rows."""
    rank = min(_HUB_RANK + 1, len(embeddings))
    rows = exact_rows(queries.vectors, embeddings, rank)[0]
    counts = np.bincount(rows[rows != queries.own[:, None]], minlength=len(embeddings)).astype(float)
    deviation = counts.std()
    skewness = float((((counts - counts.mean()) / deviation) ** 3).mean()) if deviation else 0.0
    share = round(float(counts.max() / len(rows)), 4)
    return {"k": rank - 1, "queries": len(rows), "skewness": round(skewness, 3), "largest_share": share}


def verify_datastore(folder: str | Path, embedder: Any = None) -> list[str]:
    """What is wrong with a datastore. Unlike opening, it reads every record and embedding.

    Args:
        embedder ([`CaptionEmbedder`], *optional*): the encoder that the datastore should be of; a few captions are
            embedded again too.
    """
    try:
        refuse_milvus(folder)
        store = CaptionDatastore.open_folder(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = []
    for row in range(len(store)):
        try:
            if not store.records[row]["caption"].strip():
                problems.append(f"row {row}: the caption is empty")
        except ValueError as error:
            problems.append(str(error))
    tolerance = _NORM_TOLERANCE[store.manifest["dtype"]]
    for start in range(0, len(store), BLOCK_ROWS):
        norms = np.linalg.norm(np.asarray(store.embeddings[start : start + BLOCK_ROWS], dtype=np.float64), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= tolerance))
        problems += [f"row {start + row}: the embedding has the length {norms[row]:.4f}, expected 1" for row in wrong]
    if embedder is not None and not problems:
        problems += _encoder_problems(store, embedder)
    return problems


def _encoder_problems(store: CaptionDatastore, embedder: Any) -> list[str]:
    try:
        store.check_encoder(embedder.fingerprint)
    except ValueError as error:
        return [str(error)]
    if store.keys == AUDIO_KEYS:
        # Their recordings are not here.
        return []
    rows = np.unique(np.linspace(0, len(store) - 1, 16).astype(int))
    again = embedder.embed([store.records[row]["caption"] for row in rows])
    cosines = (np.asarray(store.embeddings[rows], dtype=np.float64) * again).sum(axis=1)
    return [
        f"row {row}: its embedding and its caption do not belong together (cosine {cosine:.3f})"
        for row, cosine in zip(rows, cosines, strict=True)
        if cosine < 0.99
    ]
