"""How fast and how right a large datastore is searched, beside the exact search of FAISS, in one run.

    python -m benchmarks.datastore_search CAPTIONS... --rows 600000 --dimension 512 --work DIR
    python -m benchmarks.datastore_search CAPTIONS... --growth --sizes 10000 100000 1000000 10000000 --work DIR

The captions that are given are the real ones; a grammar of their own clauses makes up the number ("a dog barks" from
one, "as rain falls" from another), so that neighbourhoods are as dense as those of real captions. They are embedded by
TF-IDF and SVD to any dimension, or by a captioner's text tower (`--model`). Queries are real captions that are held
out of the datastore, and the same behind a simulated audio gap; with `--audio` and `--model`, real recordings too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_cli.status import exit_status
from recap_hf.datastore.files import array_blocks

from .measuring import recall_at, resident_mb, single_query_ms, write_store
from .synthetic_captions import made_captions, tfidf_svd

# Captions that are embedded and noted at a time: batches are sorted by length within them.
_CHUNK = 1 << 14


def _texts(args: argparse.Namespace, note: Callable[[str], None]) -> tuple[list[str], int, int]:
    """The captions of the datastore and then those held out, how many of the former are real, and of the latter."""
    from recap_hf.datastore import read_source

    path = Path(args.work) / "texts.json"
    if path.is_file():
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    real = list(dict.fromkeys(record["caption"] for name in args.captions for record in read_source(name)))
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(real))
    real = [real[number] for number in order]
    held_out, stored = real[: args.queries], real[args.queries :][: args.rows]
    missing = args.rows - len(stored)
    note(f"{len(stored)} real captions, {missing} made of their clauses, {len(held_out)} held out")
    found = stored + made_captions(stored, missing, args.seed) + held_out, len(stored), len(held_out)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _embedded(args: argparse.Namespace, texts: Sequence[str], note: Callable[[str], None]) -> np.ndarray:
    """Embeddings by the captioner's text tower; a run that was cut off is taken up."""
    from recap_hf.datastore import CaptionEmbedder

    name = None if args.model == "recap-tiny" else args.model
    embedder = CaptionEmbedder.from_pretrained(name, args.device, args.model_dtype, batch_size=256)
    path, done_path = Path(args.work) / "vectors.npy", Path(args.work) / "vectors.done"
    done = int(done_path.read_text(encoding="utf-8")) if done_path.is_file() else 0
    shape = (len(texts), embedder.fingerprint.shape[1])
    vectors = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float32, None if done else shape)
    started, first = time.perf_counter(), done
    while done < len(texts):
        chunk = texts[done : done + _CHUNK]
        vectors[done : done + len(chunk)] = embedder.embed(chunk)
        done += len(chunk)
        vectors.flush()
        done_path.write_text(str(done), encoding="utf-8")
        note(f"embedded {done} of {len(texts)}: {(done - first) / (time.perf_counter() - started):.0f} a second")
    return vectors


def prepare(args: argparse.Namespace, note: Callable[[str], None]) -> tuple[Path, np.ndarray]:
    """The datastore without an index, and the held-out queries; both are kept in the working folder."""
    folder, queries_path = Path(args.work) / "store", Path(args.work) / "queries.npy"
    if queries_path.is_file():
        return folder, np.load(queries_path)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    texts, num_real, _ = _texts(args, note)
    if args.model:
        vectors = _embedded(args, texts, note)
    else:
        vectors = tfidf_svd(texts, num_real, args.dimension, args.seed)
    records = ({"caption": text} for text in texts[: args.rows])
    stored = vectors[: args.rows]
    write_store(folder, records, array_blocks(stored), stored.shape, args.embeddings_dtype)
    np.save(queries_path, vectors[args.rows :])
    return folder, np.load(queries_path)


def audio_embeddings(args: argparse.Namespace) -> np.ndarray:
    """Embeddings of real recordings, one row each."""
    from recap_hf.datastore import CaptionEmbedder

    name = None if args.model == "recap-tiny" else args.model
    embedder = CaptionEmbedder.from_pretrained(name, device=args.device)
    return np.concatenate([embedder.embed_audio(path)[:, 0] for path in args.audio])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One run: the index built and tuned, then its search and the exact one on the same queries."""
    import faiss

    from recap_hf import CaptionDatastore
    from recap_hf.datastore import index_datastore
    from recap_hf.datastore.indexing import RECALL_AT, Queries, answer, with_audio_gap

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
        answer([asked], store.embeddings, RECALL_AT)
        result["queries"][name] = {
            "number": len(vectors),
            "recall@4": round(recall_at(store, asked), 4),
            "search_ms": single_query_ms(store.search, vectors),
        }
        if store.index is not None:
            index, count = store.search_index, store.search_index.num_candidates
            found = single_query_ms(lambda query, index=index, count=count: index.search(query, count), vectors)
            result["queries"][name]["index_alone_ms"] = found
    result["memory_mb"] = resident_mb()
    flat.add(np.ascontiguousarray(store.embeddings, dtype=np.float32))
    for name, vectors in queries.items():
        result["queries"][name]["exact_faiss_ms"] = single_query_ms(lambda q: flat.search(q, 4), vectors[:50])
    return result


def _add_growth_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("growth with the size, instead of one size")
    group.add_argument("--growth", action="store_true", help="measure several sizes, rows made of real captions' ones")
    group.add_argument(
        "--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="rows (default: %(default)s)"
    )
    group.add_argument("--plot", metavar="FILE", help="picture of the growth, .png or .svg")
    group.add_argument("--keep", action="store_true", help="do not delete the datastores when they are measured")


def _growth(args: argparse.Namespace) -> int:
    from .datastore_growth import grow, plot, table

    found = grow(args, lambda message: print(message, file=sys.stderr, flush=True))
    if args.plot:
        plot(found, args.plot)
    print(table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datastore_search", description=__doc__)
    parser.add_argument("captions", nargs="+", metavar="CAPTIONS", help="files of real captions")
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for the datastore; kept for the next run")
    parser.add_argument("--rows", type=int, default=600_000, help="default: %(default)s, the paper's DSlarge")
    parser.add_argument("--dimension", type=int, default=512, help="of TF-IDF and SVD (default: %(default)s)")
    parser.add_argument("--model", help="embed with this captioner's text tower instead; recap-tiny: the embedded one")
    parser.add_argument(
        "--model-dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s"
    )
    parser.add_argument(
        "--embeddings-dtype", default="float32", choices=("float32", "float16"), help="stored (default: %(default)s)"
    )
    parser.add_argument("--audio", nargs="+", default=[], metavar="FILE", help="recordings as queries, with --model")
    parser.add_argument("--device", help="for the model")
    parser.add_argument("--queries", type=int, default=500, help="held-out captions (default: %(default)s)")
    parser.add_argument("--index", default="auto", help="kind; keep: of an earlier run (default: %(default)s)")
    parser.add_argument("--recall", type=float, default=0.95, help="recall@4 to tune for (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of FAISS (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    _add_growth_arguments(parser)
    args = parser.parse_args(argv)
    if args.growth:
        return _growth(args)
    if args.audio and not args.model:
        parser.error("recordings need the captioner that embeds them: give --model")
    print(json.dumps(run(args), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("python -m benchmarks.datastore_search", main))
