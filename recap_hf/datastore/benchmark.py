"""How fast and how right a large datastore is searched, beside the exact search of FAISS, in one run.

    python -m recap_hf.datastore.benchmark CAPTIONS... --rows 600000 --dimension 512 --work DIR

The captions that are given are the real ones; a grammar of their own clauses makes up the number ("a dog barks" from
one, "as rain falls" from another), so that neighbourhoods are as dense as those of real captions. They are embedded by
TF-IDF and SVD to any dimension, or by a captioner's text tower (`--model`). Queries are real captions that are held
out of the datastore, and the same behind a simulated audio gap; with `--audio` and `--model`, real recordings too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

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


def prepare(args: argparse.Namespace, note: Callable[[str], None]) -> tuple[Path, np.ndarray]:
    """The datastore without an index, and the held-out queries; both are kept in the working folder."""
    from recap_hf.modeling.datastore_writing_recap import write_manifest, write_segment

    from .sources import read_source

    folder, queries_path = Path(args.work) / "store", Path(args.work) / "queries.npy"
    if queries_path.is_file():
        return folder, np.load(queries_path)
    folder.mkdir(parents=True, exist_ok=True)
    real = list(dict.fromkeys(record["caption"] for name in args.captions for record in read_source(name)))
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(real))
    real = [real[number] for number in order]
    held_out, stored = real[: args.queries], real[args.queries :][: args.rows]
    note(f"{len(stored)} real captions, {args.rows - len(stored)} made of their clauses, {len(held_out)} held out")
    texts = stored + made_captions(stored, args.rows - len(stored), args.seed)
    if args.model:
        from .embedding import CaptionEmbedder

        embedder = CaptionEmbedder.from_pretrained(args.model, device=args.device, batch_size=256)
        vectors = np.empty((args.rows + len(held_out), embedder.fingerprint.shape[1]), dtype=np.float32)
        texts += held_out
        for start in range(0, len(texts), 1 << 13):
            vectors[start : start + (1 << 13)] = embedder.embed(texts[start : start + (1 << 13)])
            note(f"embedded {min(start + (1 << 13), len(texts))} of {len(texts)}")
    else:
        vectors = tfidf_svd(texts + held_out, len(stored), args.dimension, args.seed)
    files: dict[str, Any] = {}
    records = [{"caption": text} for text in texts[: args.rows]]
    segment = write_segment(folder, records, vectors[: args.rows], files)
    manifest = {"num_captions": args.rows, "dimension": vectors.shape[1], "dtype": "float32", "fingerprint": None}
    write_manifest(folder, {**manifest, "segments": [segment], "index": None, "report": None, "files": files})
    np.save(queries_path, vectors[args.rows :])
    return folder, np.load(queries_path)


def audio_embeddings(args: argparse.Namespace) -> np.ndarray:
    """Embeddings of real recordings, one row each."""
    from .embedding import CaptionEmbedder

    embedder = CaptionEmbedder.from_pretrained(args.model, device=args.device)
    return np.concatenate([embedder.embed_audio(path)[:, 0] for path in args.audio])


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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One run: the index built and tuned, then its search and the exact one on the same queries."""
    import faiss

    from recap_hf import CaptionDatastore

    from .editing import index_datastore
    from .indexing import Queries, with_audio_gap

    def note(message: str) -> None:
        print(message, file=sys.stderr)

    folder, text = prepare(args, note)
    faiss.omp_set_num_threads(args.threads)
    queries = {"text": text, "audio gap": with_audio_gap(text, np.random.default_rng([args.seed, 2]))}
    if args.audio:
        queries["recordings"] = audio_embeddings(args)
    started = time.perf_counter()
    if args.index != "keep":
        index_datastore(folder, args.index, args.recall)
    build_s = time.perf_counter() - started
    store = CaptionDatastore.from_pretrained(folder)
    note(f"index: {store.index}")
    result: dict[str, Any] = {
        "rows": len(store),
        "dimension": store.dimension,
        "threads": args.threads,
        "load_average": round(os.getloadavg()[0], 1),
        "index": store.index or {"kind": "exact"},
        "build_s": round(build_s, 1),
        "queries": {},
    }
    flat = faiss.IndexFlatIP(store.dimension)
    for name, vectors in queries.items():
        asked = Queries(name, vectors, np.full(len(vectors), -1))
        rows = np.stack([_padded(store.candidate_rows(query[None], 4)[0]) for query in vectors])
        result["queries"][name] = {
            "number": len(vectors),
            "recall@4": round(asked.recall(store.embeddings, rows, 4), 4),
            "search_ms": single_query_ms(store.search, vectors),
        }
        if store._index is not None:
            index, count = store._index, store._index.num_candidates
            found = single_query_ms(lambda query, index=index, count=count: index.search(query, count), vectors)
            result["queries"][name]["index_alone_ms"] = found
    result["memory_mb"] = resident_mb()
    flat.add(np.ascontiguousarray(store.embeddings))
    for name, vectors in queries.items():
        result["queries"][name]["exact_faiss_ms"] = single_query_ms(lambda q: flat.search(q, 4), vectors[:50])
    return result


def _padded(rows: np.ndarray, width: int = 2048) -> np.ndarray:
    found = np.full(width, -1, dtype=np.int64)
    found[: len(rows)] = rows
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements as JSON."""
    parser = argparse.ArgumentParser(prog="python -m recap_hf.datastore.benchmark", description=__doc__)
    parser.add_argument("captions", nargs="+", metavar="CAPTIONS", help="files of real captions")
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for the datastore; kept for the next run")
    parser.add_argument("--rows", type=int, default=600_000, help="default: %(default)s, the paper's DSlarge")
    parser.add_argument("--dimension", type=int, default=512, help="of TF-IDF and SVD (default: %(default)s)")
    parser.add_argument("--model", help="embed with this captioner's text tower instead")
    parser.add_argument("--audio", nargs="+", default=[], metavar="FILE", help="recordings as queries, with --model")
    parser.add_argument("--device", help="for the model")
    parser.add_argument("--queries", type=int, default=500, help="held-out captions (default: %(default)s)")
    parser.add_argument("--index", default="auto", help="kind; keep: of an earlier run (default: %(default)s)")
    parser.add_argument("--recall", type=float, default=0.95, help="recall@4 to tune for (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of FAISS (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.audio and not args.model:
        parser.error("recordings need the captioner that embeds them: give --model")
    print(json.dumps(run(args), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
