"""Building a datastore: sources read once and filtered, embedded in chunks that a second run does not repeat."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_files_recap import (
    EMBEDDING_TYPES,
    MANIFEST_NAME,
    TEXT_KEYS,
    CaptionRecords,
)
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .files import LOCK_NAME, array_blocks, fingerprint_entry, locked, publish, write_captions, write_new
from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, build_index, check_index
from .processes import process_pool
from .sources import SourceOptions, read_source

WORK_NAME = ".building"
CHUNK_CAPTIONS = 8192
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """How a datastore is built.

    Args:
        index, recall: see [`build_index`].
        dtype: of the stored embeddings; "float16" halves them and moves a cosine by less than 0.001, "int8" quarters
            them and moves it by less than 0.01.
        overwrite: replace a datastore that the folder holds.
        processes: that embed side by side, each on its share of the cores or on a GPU of its own.
        engine: "local", or "ray": the processes are Ray's, may die and may be on other machines that see the folder.
        ray_address: of a cluster; by default Ray is started on this machine.
        chunk_captions: embedded between two notes of what is done.
        progress: is called with messages.
    """

    index: str = "auto"
    recall: float = DEFAULT_RECALL
    dtype: str = "float32"
    overwrite: bool = False
    processes: int = 1
    engine: str = "local"
    ray_address: str | None = None
    chunk_captions: int = CHUNK_CAPTIONS
    progress: Progress = lambda message: None

    def __post_init__(self) -> None:
        if self.dtype not in EMBEDDING_TYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(EMBEDDING_TYPES)}, got {self.dtype!r}")


def build_datastore(
    sources: Sequence[str | Path],
    output: str | Path,
    embedder: Any,
    *,
    source_options: SourceOptions | None = None,
    filter_options: FilterOptions | None = None,
    options: BuildOptions | None = None,
) -> CaptionDatastore:
    """Builds a datastore from files and datasets.

    The captions are streamed to the disk and embedded in chunks of 8,192: memory does not grow with their number
    (but for about 16 bytes each that tell duplicates). A build that was cut off is continued by the same call.

    Args:
        sources: see [`read_source`].
        output: folder, made if need be. It holds no datastore until all of it is there.
        embedder ([`CaptionEmbedder`]): embeds, and counts decoder tokens.
        source_options, filter_options: what is known of the captions, and which are left out.
        options: how it is built.

    Returns:
        The datastore, opened.

    Raises:
        FileExistsError: `output` holds a datastore and `overwrite` is not set, or files that are not of one.
        ValueError: no caption is left, or there is no such index. OSError: a source is missing.
    """
    folder, options = Path(output), options or BuildOptions()
    # Known before an hour of embedding, not after it.
    check_output(folder, options, embedder.fingerprint.shape[1])
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / WORK_NAME
    with locked(folder):
        try:
            plan = _plan(
                work, sources, source_options or SourceOptions(), filter_options or FilterOptions(), embedder, options
            )
        except BaseException:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        chunks = _Chunks(work, plan["report"]["kept"], options.chunk_captions)
        embeddings = _embed(chunks, embedder, options)
    records = CaptionRecords.open(chunks.captions, chunks.count)
    return publish_build(folder, records, embeddings, embedder.fingerprint, plan["report"], options)


def check_output(folder: Path, options: BuildOptions, dimension: int) -> None:
    """Refuses a folder that a datastore cannot be built in, and an index that cannot be built.

    Raises:
        OSError: it is a file, holds a datastore that must not be replaced, or files that are not of a datastore.
        ValueError: there is no such index.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the datastore needs a folder of its own")
    if (folder / MANIFEST_NAME).is_file():
        if not options.overwrite:
            raise FileExistsError(
                f"{folder} holds a datastore already. To add to it: recap datastore add {folder} FILE...; to replace "
                "it, give --overwrite"
            )
    elif folder.is_dir():
        foreign = sorted(each.name for each in folder.iterdir() if not each.name.startswith((".", LOCK_NAME)))
        if foreign:
            raise FileExistsError(
                f"{folder} holds files that are not of a datastore, such as {foreign[0]!r}: give a new or empty folder"
            )
    check_index(options.index, options.recall, dimension)


def publish_build(
    folder: Path,
    records: Sequence[dict[str, Any]],
    embeddings: np.ndarray,
    fingerprint: np.ndarray,
    report: dict[str, Any],
    options: BuildOptions,
    keys: str = TEXT_KEYS,
) -> CaptionDatastore:
    """Indexes what was embedded, writes the datastore, deletes the files of the build and opens the result."""
    options.progress("Index: trained and tuned where the size needs one")
    index = build_index(embeddings, options.index, options.recall)
    with locked(folder):
        new = write_new(folder, records, array_blocks(embeddings), embeddings.shape, options.dtype)
        contents = {
            "num_captions": len(records),
            "dimension": embeddings.shape[1],
            "keys": keys,
            "dtype": options.dtype,
            "fingerprint": fingerprint_entry(fingerprint),
            "report": report | {"exact_search": options.index == "exact"},
        }
        publish(folder, contents, new, index)
        shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    return CaptionDatastore.from_pretrained(folder)


def _plan(
    work: Path,
    sources: Sequence[str | Path],
    source_options: SourceOptions,
    filter_options: FilterOptions,
    embedder: Any,
    options: BuildOptions,
) -> dict[str, Any]:
    """Writes the filtered captions into a file; again only if sources, options or encoder have changed."""
    guard = filter_options.guard and sorted(filter_options.guard.clip_ids)
    blacklists = [(ending, sorted(ids)) for ending, ids in filter_options.blacklists]
    filters = {**vars(filter_options), "guard": guard, "blacklists": blacklists}
    settings = repr(([_state(source) for source in sources], options.chunk_captions, source_options, filters))
    key = hashlib.sha256(settings.encode() + embedder.fingerprint.round(3).tobytes()).hexdigest()
    path = work / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["key"] == key:
            options.progress(f"Continuing a build of {plan['report']['kept']} captions that was cut off")
            return plan
    # Beside an earlier build, which a mistyped source must not cost: that goes when this one has its captions.
    fresh = work.with_name(f"{work.name}-next")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        caption_filter = CaptionFilter(filter_options, embedder.count_tokens)

        def kept() -> Iterator[dict[str, Any]]:
            for source in sources:
                options.progress(f"Reading {source}")
                yield from caption_filter.filter(read_source(source, source_options), Path(str(source)).name)

        write_captions(fresh / "captions.jsonl", kept())
        report = caption_filter.report()
        if not report["kept"]:
            why = f"left out: {json.dumps(report['dropped'])}" if report["read"] else "the sources hold none"
            raise ValueError(f"No caption is left of {report['read']} read; {why}")
        plan = {"key": key, "report": report}
        _write_json(fresh / path.name, plan)
        shutil.rmtree(work, ignore_errors=True)
        fresh.rename(work)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return plan


def _state(source: str | Path) -> tuple[Any, ...]:
    """What shows whether a source has changed since."""
    path = Path(source) if Path(source).exists() else Path(str(source).partition(":")[2] or source)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    found = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files if each.is_file()]
    return str(source), tuple(found)


def _write_json(path: Path, contents: Any) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(contents), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------- embedding


@dataclass(frozen=True)
class _Chunks:
    """The planned captions: where they are, how many, and how many are embedded at a time."""

    work: Path
    count: int
    size: int

    @property
    def captions(self) -> Path:
        return self.work / "captions.jsonl"

    @property
    def embeddings(self) -> Path:
        return self.work / "embeddings.npy"


def _embed(chunks: _Chunks, embedder: Any, options: BuildOptions) -> np.ndarray:
    """Embeddings of the planned captions, memory-mapped; chunks that an earlier run finished are kept."""
    done_path, count = chunks.work / "done.json", chunks.count
    done = set(json.loads(done_path.read_text(encoding="utf-8"))) if done_path.is_file() else set()
    if not done:
        shape = (count, embedder.fingerprint.shape[1])
        np.lib.format.open_memmap(chunks.embeddings, "w+", np.float32, shape).flush()
    left = [start for start in range(0, count, chunks.size) if start not in done]
    with _workers(embedder, min(options.processes, len(left)), chunks, options) as embed_chunks:
        for start in embed_chunks(left):
            done.add(start)
            _write_json(done_path, sorted(done))
            options.progress(f"Embedded {min(len(done) * chunks.size, count)} of {count} captions")
    return np.load(chunks.embeddings, mmap_mode="r", allow_pickle=False)


@contextmanager
def _workers(
    embedder: Any, processes: int, chunks: _Chunks, options: BuildOptions
) -> Iterator[Callable[[Sequence[int]], Iterator[int]]]:
    """What embeds chunks and yields their beginnings as they are done: this process, several, or Ray's. A chunk is
    written in place, so that it may be begun twice."""
    recipe = getattr(embedder, "recipe", None)
    if (processes > 1 or options.engine == "ray") and recipe is None:
        raise ValueError("Several processes each load the encoder: make it by CaptionEmbedder.from_pretrained")
    if options.engine == "ray":
        from recap_hf.ray_engine import run_parts

        make = partial(_make_chunk_embedder, recipe, processes, chunks)
        arguments = (chunks.work, processes, options.ray_address, options.progress)
        yield lambda starts: (starts[n] for n in (run_parts(make, starts, *arguments) if starts else ()))
    elif processes <= 1:
        yield lambda starts: map(_ChunkEmbedder(embedder, chunks), starts)
    else:
        number = multiprocessing.get_context("spawn").Value("i", 0)
        with process_pool(processes, _start_worker, (recipe, number, processes, chunks)) as pool:
            try:
                yield lambda starts: (
                    each.result() for each in as_completed([pool.submit(_work, start) for start in starts])
                )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class _ChunkEmbedder:
    """Embeds the chunk that begins at a row, in place, and returns that row."""

    def __init__(self, embedder: Any, chunks: _Chunks) -> None:
        self.embedder = embedder
        self.size = chunks.size
        self.records = CaptionRecords.open(chunks.captions, chunks.count)
        self.embeddings = np.load(chunks.embeddings, mmap_mode="r+", allow_pickle=False)

    def __call__(self, start: int) -> int:
        chunk = self.records[start : start + self.size]
        self.embeddings[start : start + len(chunk)] = self.embedder.embed([record["caption"] for record in chunk])
        self.embeddings.flush()
        return start


def _make_chunk_embedder(recipe: Callable[[int, int], Any], processes: int, chunks: _Chunks) -> _ChunkEmbedder:
    return _ChunkEmbedder(recipe(0, processes), chunks)


# The chunk embedder of a worker process.
_WORKER: dict[str, _ChunkEmbedder] = {}


def _start_worker(recipe: Callable[[int, int], Any], number: Any, processes: int, chunks: _Chunks) -> None:
    with number.get_lock():
        rank, number.value = number.value, number.value + 1
    _WORKER["embed"] = _ChunkEmbedder(recipe(rank, processes), chunks)


def _work(start: int) -> int:
    return _WORKER["embed"](start)


__all__ = ["BuildOptions", "build_datastore"]
