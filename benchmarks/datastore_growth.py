"""How latency, memory, build time and recall grow with the size of a datastore: measured, tabled, fitted, plotted.

    python -m benchmarks.datastore_search CAPTIONS... --growth --work DIR

Every size is a whole datastore on the disk, embeddings in float16, indexed as `auto` indexes it. Its rows are made of
those of real captions (`synthetic_captions.MixedRows`) and streamed: ten million of dimension 512 are 10 GB, which
are written, trained on, added and searched block by block. Recall is measured against a streamed exact search.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf import CaptionDatastore
from recap_hf.datastore import index_datastore, read_source
from recap_hf.datastore.indexing import RECALL_AT, Queries, answer, with_audio_gap

from .measuring import in_own_process, recall_at, resident_mb, single_query_ms, write_store
from .synthetic_captions import MixedRows, tfidf_svd

_FITTED = ("build_s", "latency_ms", "anonymous_mb", "index_mb")


def prepare_base(captions: Sequence[str], work: Path, dimension: int, seed: int) -> np.ndarray:
    """Embeddings of real captions by TF-IDF and SVD, which rows and queries are made of."""
    path = work / "base.npy"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        real = list(dict.fromkeys(record["caption"] for name in captions for record in read_source(name)))
        real = [real[number] for number in np.random.default_rng(seed).permutation(len(real))]
        np.save(path, tfidf_svd(real, len(real), dimension, seed))
    return np.load(path, mmap_mode="r")


def measure_size(
    folder: Path, text: np.ndarray, recall: float, seed: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Builds the index of a datastore and measures its search."""
    description = CaptionDatastore.from_pretrained(folder, verify=False).index
    if description is None:
        description = index_datastore(folder, "auto", recall)
        peak = max(resident_mb()["peak"], _noted(folder.with_suffix(".written"), "peak_mb"))
        folder.with_suffix(".peak").write_text(str(round(peak)))
    note(f"index: {description}")
    store = CaptionDatastore.from_pretrained(folder, verify=False)
    result: dict[str, Any] = {
        "rows": len(store),
        "dimension": store.dimension,
        "kind": (description or {"kind": "exact"})["kind"],
        "write_s": _noted(folder.with_suffix(".written"), "write_s"),
        "build_s": (description or {}).get("build_s", 0.0),
        "tuning_s": (description or {}).get("tuning_s", 0.0),
        "build_peak_mb": int(folder.with_suffix(".peak").read_text()),
        "index_mb": round(_index_bytes(store) / 2**20, 1),
    }
    gap = with_audio_gap(text, np.random.default_rng([seed, 2]))
    sorts = [Queries(name, vectors, np.full(len(vectors), -1)) for name, vectors in (("text", text), ("gap", gap))]
    answer(sorts, store.embeddings, RECALL_AT)
    for asked in sorts:
        result[f"recall_{asked.name}"] = round(recall_at(store, asked), 4)
        timed = single_query_ms(lambda query: store.search(query, 4), asked.vectors)
        result[f"latency_{asked.name}_ms"], result[f"latency_{asked.name}_p95_ms"] = timed["median"], timed["p95"]
    found = resident_mb()
    result["latency_ms"] = max(result["latency_text_ms"], result["latency_gap_ms"])
    return result | {"anonymous_mb": found["anonymous"], "load_average": round(os.getloadavg()[0], 1)}


def _noted(path: Path, name: str) -> float:
    """What is noted in a JSON file beside a datastore or an index that is filled; 0 where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))[name] if path.is_file() else 0


def _index_bytes(store: Any) -> int:
    entry = store.manifest["index"]
    return store.manifest["files"][entry["file"]]["bytes"] if entry else 0


def grow(args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Measures every size; what an earlier run has measured is kept."""
    # Read by the processes that are started below. Threads that spin while they wait for each other made a build take
    # thirty times as long on cores that were shared with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    work = Path(args.work)
    path = work / "growth.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sizes": []}
    prepare_base(args.captions, work, args.dimension, args.seed)
    for count in sorted(args.sizes):
        if any(each["rows"] == count for each in done["sizes"]):
            continue
        folder = work / f"store-{count}"
        if not (folder / "datastore.json").is_file():
            in_own_process(_write, args, folder, count)
        note(f"{count} rows written in {_noted(folder.with_suffix('.written'), 'write_s'):.0f} s")
        measured = in_own_process(_measure, args, folder)
        done["sizes"] = sorted([*done["sizes"], measured], key=lambda each: each["rows"])
        done["laws"] = laws(done["sizes"])
        path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        note(json.dumps(measured))
        if not args.keep:
            shutil.rmtree(folder)
            for left in work.glob(f"{folder.name}.*"):
                left.unlink()
    return done


def _write(args: argparse.Namespace, folder: Path, count: int) -> None:
    base = prepare_base(args.captions, Path(args.work), args.dimension, args.seed)
    started = time.perf_counter()
    records = ({"caption": f"synthetic caption {row}"} for row in range(count))
    write_store(folder, records, MixedRows(base, args.seed).blocks(count), (count, base.shape[1]), "float16")
    about = {"write_s": round(time.perf_counter() - started, 2), "peak_mb": resident_mb()["peak"]}
    folder.with_suffix(".written").write_text(json.dumps(about), encoding="utf-8")


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(args.threads)
    base = prepare_base(args.captions, Path(args.work), args.dimension, args.seed)
    # Made as the rows are, and none of them.
    text = MixedRows(base, args.seed + 1).block(0)[: args.queries]
    return measure_size(folder, text, args.recall, args.seed, lambda message: print(message, flush=True))


def laws(sizes: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each measured quantity the power law that fits it best: `value = factor * rows ** exponent`, by least
    squares of the logarithms, over the sizes that have the codes of the largest: others follow another law."""
    found = {}
    codes = [each["kind"].rpartition(",")[2] for each in sizes]
    indexed = [each for each, code in zip(sizes, codes, strict=True) if code == codes[-1] != "exact"]
    for name in _FITTED:
        points = [(each["rows"], each[name]) for each in indexed if each[name] > 0]
        if len(points) < 2:
            continue
        exponent, intercept = np.polyfit(*np.log(np.array(points, dtype=float)).T, 1)
        found[name] = {"exponent": round(float(exponent), 3), "factor": float(f"{np.exp(intercept):.4g}")}
    return found


def table(found: dict[str, Any]) -> str:
    """The sizes as a table in Markdown, and the laws under it."""
    columns = {
        "captions": lambda each: f"{each['rows']:,}",
        "index": lambda each: each["kind"],
        "written, indexed, tuned (s)": lambda each: (
            f"{each['write_s']:,.0f} + {each['build_s']:,.0f} + {each['tuning_s']:,.0f}"
        ),
        "peak of the build (MB)": lambda each: f"{each['build_peak_mb']:,}",
        "index (MB)": lambda each: f"{each['index_mb']:,.0f}",
        "memory (MB)": lambda each: f"{each['anonymous_mb']:,}",
        "median text / gap (ms)": lambda each: f"{each['latency_text_ms']:.2f} / {each['latency_gap_ms']:.2f}",
        "recall@4 text / gap": lambda each: f"{each['recall_text']:.3f} / {each['recall_gap']:.3f}",
    }
    lines = [f"| {' | '.join(columns)} |", "| " + " | ".join("---" for _ in columns) + " |"]
    for each in found["sizes"]:
        lines.append("| " + " | ".join(show(each) for show in columns.values()) + " |")
    lines.append("")
    lines += list(_law_lines(found.get("laws", {})))
    return "\n".join(lines)


def _law_lines(found: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, law in found.items():
        yield f"{name} = {law['factor']:g} * rows^{law['exponent']:.2f}"


def plot(found: dict[str, Any], path: str | Path) -> None:
    """Latency, memory, build time and recall against the size, in one picture.

    Raises:
        ImportError: without Matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("The plot needs Matplotlib: pip install recap-hf[report]") from error
    rows = [each["rows"] for each in found["sizes"]]
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    panels = (
        ("median of one search (ms)", {"text": "latency_text_ms", "with the audio gap": "latency_gap_ms"}),
        ("memory (MB)", {"of the searching process": "anonymous_mb", "peak of the build": "build_peak_mb"}),
        ("build (s)", {"index trained and filled": "build_s", "effort tuned": "tuning_s", "rows written": "write_s"}),
        ("recall@4", {"text": "recall_text", "with the audio gap": "recall_gap"}),
    )
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        for label, key in lines.items():
            # Nothing has no place on an axis of powers.
            axis.plot(rows, [each[key] or np.nan for each in found["sizes"]], "o-", label=label)
        axis.set(xscale="log", xlabel="captions", title=title)
        if title == "recall@4":
            axis.set_ylim(0.8, 1.01)
        else:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


__all__ = ["grow", "laws", "measure_size", "plot", "prepare_base", "table"]
