"""Building a datastore: sources read once and filtered, embedded in chunks that a second run does not repeat."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_files_recap import MANIFEST_NAME, CaptionRecords
from recap_hf.modeling.datastore_writing_recap import add_file, locked, write_array, write_manifest
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, build_index
from .sources import SourceOptions, read_source

WORK_NAME = ".building"
CHUNK_CAPTIONS = 8192
DTYPES = ("float32", "float16")
Progress = Callable[[str], None]


def build_datastore(
    sources: Sequence[str | Path],
    output: str | Path,
    embedder: Any,
    *,
    source_options: SourceOptions | None = None,
    filter_options: FilterOptions | None = None,
    index: str = "auto",
    recall: float = DEFAULT_RECALL,
    dtype: str = "float32",
    overwrite: bool = False,
    processes: int = 1,
    progress: Progress = lambda message: None,
) -> CaptionDatastore:
    """Builds a datastore from files and datasets.

    The captions are streamed to the disk and embedded in chunks of 8,192: memory does not grow with their number
    (but for 16 bytes or so each that tell duplicates). A build that was cut off is taken up again by the same call.

    Args:
        sources: see [`read_source`].
        output: folder, made if need be. It holds no datastore until all of it is there.
        embedder ([`CaptionEmbedder`]): what embeds, and counts decoder tokens.
        source_options, filter_options: what is known of the captions, and which are left out.
        index, recall: see [`build_index`].
        dtype: of the stored embeddings; "float16" halves them and moves a cosine by less than 0.001.
        overwrite: replace a datastore that `output` holds.
        processes: that embed side by side, each on its share of the cores or on a GPU of its own.
        progress: is told what happens.

    Returns:
        The datastore, opened.

    Raises:
        FileExistsError: `output` holds a datastore. ValueError: no caption is left. OSError: a source is missing.
    """
    folder = Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (folder / MANIFEST_NAME).is_file() and not overwrite:
        raise FileExistsError(
            f"{folder} holds a datastore already. To add to it: recap datastore add {folder} FILE...; to replace it, "
            "give --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        work = folder / WORK_NAME
        plan = _plan(work, sources, source_options, filter_options, embedder, progress)
        embeddings = _embed(work, plan["kept"], embedder, processes, progress)
        progress("Index: trained and tuned where the size asks for one")
        search_index = build_index(embeddings, index, recall)
        plan["report"]["exact_search"] = index == "exact"
        _publish(folder, work, plan, embeddings, embedder.fingerprint, search_index, dtype)
        shutil.rmtree(work)
    return CaptionDatastore.from_pretrained(folder)


def _plan(
    work: Path,
    sources: Sequence[str | Path],
    source_options: SourceOptions | None,
    filter_options: FilterOptions | None,
    embedder: Any,
    progress: Progress,
) -> dict[str, Any]:
    """The captions, filtered, in a file; read again only if sources, options or encoder have changed."""
    source_options, filter_options = source_options or SourceOptions(), filter_options or FilterOptions()
    state = [_state(source) for source in sources]
    guard = filter_options.guard and sorted(filter_options.guard.clip_ids)
    blacklists = [(ending, sorted(ids)) for ending, ids in filter_options.blacklists]
    settings = repr((state, source_options, {**vars(filter_options), "guard": guard, "blacklists": blacklists}))
    key = hashlib.sha256(settings.encode() + embedder.fingerprint.round(3).tobytes()).hexdigest()
    path = work / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["key"] == key:
            progress(f"Taking up a build of {plan['kept']} captions that was cut off")
            return plan
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    caption_filter = CaptionFilter(filter_options, embedder.count_tokens)
    with open(work / "captions.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for source in sources:
            progress(f"Reading {source}")
            write_records(file, caption_filter.filter(read_source(source, source_options), Path(str(source)).name))
    report = caption_filter.report()
    if not report["kept"]:
        raise ValueError(f"No caption is left of {report['read']} read: {json.dumps(report['dropped'])}")
    plan = {"key": key, "kept": report["kept"], "report": report}
    _write_json(path, plan)
    return plan


def write_records(file: Any, records: Iterable[dict[str, Any]]) -> None:
    """Records as JSON lines."""
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _state(source: str | Path) -> tuple[Any, ...]:
    """What tells whether a source has changed since."""
    path = Path(str(source).partition(":")[2] or str(source)) if not Path(str(source)).exists() else Path(str(source))
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    found = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files if each.is_file()]
    return str(source), tuple(found)


def _write_json(path: Path, contents: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(contents), encoding="utf-8")
    os.replace(temporary, path)


def _embed(work: Path, count: int, embedder: Any, processes: int, progress: Progress) -> np.ndarray:
    """Embeddings of the planned captions, memory-mapped; chunks that an earlier run finished are kept."""
    path, done_path = work / "embeddings.npy", work / "done.json"
    done = set(json.loads(done_path.read_text(encoding="utf-8"))) if done_path.is_file() else set()
    if not done:
        np.lib.format.open_memmap(path, "w+", np.float32, (count, embedder.fingerprint.shape[1])).flush()
    left = [start for start in range(0, count, CHUNK_CAPTIONS) if start not in done]
    with _workers(embedder, min(processes, len(left)), work, count) as embed_chunks:
        for start in embed_chunks(left):
            done.add(start)
            _write_json(done_path, sorted(done))
            progress(f"Embedded {min(len(done) * CHUNK_CAPTIONS, count)} of {count} captions")
    return np.load(path, mmap_mode="r", allow_pickle=False)


@contextmanager
def _workers(
    embedder: Any, processes: int, work: Path, count: int
) -> Iterator[Callable[[Sequence[int]], Iterator[int]]]:
    """What embeds chunks and yields their beginnings as they are done: this process, or several."""
    if processes <= 1:
        embed_chunk = _ChunkEmbedder(embedder, work, count)
        yield lambda starts: map(embed_chunk, starts)
        return
    if getattr(embedder, "recipe", None) is None:
        raise ValueError("Several processes each load the encoder: make it by CaptionEmbedder.from_pretrained")
    context = multiprocessing.get_context("spawn")
    arguments = (embedder.recipe, context.Value("i", 0), processes, work, count)
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:

        def embed_chunks(starts: Sequence[int]) -> Iterator[int]:
            for future in as_completed([pool.submit(_work, start) for start in starts]):
                yield future.result()

        try:
            yield embed_chunks
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _ChunkEmbedder:
    """Embeds the chunk that begins at a row, in place, and returns that row."""

    def __init__(self, embedder: Any, work: Path, count: int) -> None:
        self.embedder = embedder
        self.records = CaptionRecords(work / "captions.jsonl", count)
        self.embeddings = np.load(work / "embeddings.npy", mmap_mode="r+", allow_pickle=False)

    def __call__(self, start: int) -> int:
        chunk = self.records[start : start + CHUNK_CAPTIONS]
        self.embeddings[start : start + len(chunk)] = self.embedder.embed([record["caption"] for record in chunk])
        self.embeddings.flush()
        return start


# A worker process's own.
_WORKER: dict[str, _ChunkEmbedder] = {}


def _start_worker(recipe: Callable[[int, int], Any], number: Any, processes: int, work: Path, count: int) -> None:
    with number.get_lock():
        rank, number.value = number.value, number.value + 1
    _WORKER["embed"] = _ChunkEmbedder(recipe(rank, processes), work, count)


def _work(start: int) -> int:
    return _WORKER["embed"](start)


def _publish(
    folder: Path,
    work: Path,
    plan: dict[str, Any],
    embeddings: np.ndarray,
    fingerprint: np.ndarray,
    search_index: Any,
    dtype: str,
) -> None:
    """Gives the finished files their names, and at last the folder its manifest."""
    files: dict[str, Any] = {}
    captions, array = folder / f".captions.{os.getpid()}.tmp", folder / f".embeddings.{os.getpid()}.tmp"
    # Copies under new names: until the manifest is there, a build that is cut off can be taken up again.
    _link(work / "captions.jsonl", captions)
    if dtype == "float32":
        _link(work / "embeddings.npy", array)
    else:
        write_array(array, embeddings, dtype)
    segment = {
        "captions": add_file(folder, "captions", captions, files),
        "embeddings": add_file(folder, "embeddings", array, files),
        "num_captions": plan["kept"],
        "deleted": None,
    }
    manifest = {
        "num_captions": plan["kept"],
        "dimension": embeddings.shape[1],
        "dtype": dtype,
        "fingerprint": fingerprint.astype(float).round(7).tolist(),
        "segments": [segment],
        "index": None if search_index is None else search_index.write(folder, files),
        "report": plan["report"],
        "files": files,
    }
    write_manifest(folder, manifest)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # A file system without links.
        shutil.copyfile(source, target)


__all__ = ["build_datastore"]
