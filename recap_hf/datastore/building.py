"""Building a datastore: sources read once and filtered, embedded in chunks that a second run does not repeat."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_files_recap import EMBEDDING_TYPES, MANIFEST_NAME, CaptionRecords
from recap_hf.modeling.datastore_writing_recap import add_file, locked, write_array, write_manifest
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, build_index, check_index
from .processes import process_pool
from .sources import SourceOptions, read_source

WORK_NAME = ".building"
CHUNK_CAPTIONS = 8192
DTYPES = EMBEDDING_TYPES
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
    engine: str = "local",
    ray_address: str | None = None,
    chunk_captions: int = CHUNK_CAPTIONS,
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
        dtype: of the stored embeddings; "float16" halves them and moves a cosine by less than 0.001, "int8" quarters
            them and moves it by less than 0.01.
        overwrite: replace a datastore that `output` holds.
        processes: that embed side by side, each on its share of the cores or on a GPU of its own.
        engine: "local", or "ray": the processes are Ray's, may die and may be on other machines that see `output`.
        ray_address: of a cluster; by default Ray is started on this machine.
        chunk_captions: embedded between two notes of what is done.
        progress: is told what happens.

    Returns:
        The datastore, opened.

    Raises:
        FileExistsError: `output` holds a datastore. ValueError: no caption is left, or there is no such index.
        OSError: a source is missing.
    """
    folder = Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (folder / MANIFEST_NAME).is_file() and not overwrite:
        raise FileExistsError(
            f"{folder} holds a datastore already. To add to it: recap datastore add {folder} FILE...; to replace it, "
            "give --overwrite"
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the datastore needs a folder of its own")
    # Known before an hour of embedding, not after it.
    check_index(index, recall, embedder.fingerprint.shape[1])
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        work = folder / WORK_NAME
        try:
            plan = _plan(work, sources, source_options, filter_options, embedder, chunk_captions, progress)
        except BaseException:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        chunks = _Chunks(work, plan["kept"], chunk_captions)
        workers = _ray_workers(ray_address, progress) if engine == "ray" else _workers
        embeddings = _embed(chunks, embedder, processes, workers, progress)
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
    chunk_captions: int,
    progress: Progress,
) -> dict[str, Any]:
    """The captions, filtered, in a file; read again only if sources, options or encoder have changed."""
    source_options, filter_options = source_options or SourceOptions(), filter_options or FilterOptions()
    state = [_state(source) for source in sources]
    guard = filter_options.guard and sorted(filter_options.guard.clip_ids)
    blacklists = [(ending, sorted(ids)) for ending, ids in filter_options.blacklists]
    settings = repr(
        (state, chunk_captions, source_options, {**vars(filter_options), "guard": guard, "blacklists": blacklists})
    )
    key = hashlib.sha256(settings.encode() + embedder.fingerprint.round(3).tobytes()).hexdigest()
    path = work / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["key"] == key:
            progress(f"Taking up a build of {plan['kept']} captions that was cut off")
            return plan
    # Beside an earlier build, which a mistyped source must not cost: that goes when this one has its captions.
    fresh = work.with_name(f"{work.name}-next")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        report = _read_captions(fresh / "captions.jsonl", sources, source_options, filter_options, embedder, progress)
        plan = {"key": key, "kept": report["kept"], "report": report}
        _write_json(fresh / path.name, plan)
        shutil.rmtree(work, ignore_errors=True)
        fresh.rename(work)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return plan


def _read_captions(
    path: Path,
    sources: Sequence[str | Path],
    source_options: SourceOptions,
    filter_options: FilterOptions,
    embedder: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the captions that the filter leaves to a file, and returns its report."""
    caption_filter = CaptionFilter(filter_options, embedder.count_tokens)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for source in sources:
            progress(f"Reading {source}")
            write_records(file, caption_filter.filter(read_source(source, source_options), Path(str(source)).name))
    report = caption_filter.report()
    if not report["kept"]:
        why = f"left out: {json.dumps(report['dropped'])}" if report["read"] else "the sources hold none"
        raise ValueError(f"No caption is left of {report['read']} read; {why}")
    return report


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


@dataclass(frozen=True)
class _Chunks:
    """The planned captions in chunks of `size`: where they lie, and how many they are."""

    work: Path
    count: int
    size: int

    @property
    def embeddings(self) -> Path:
        return self.work / "embeddings.npy"


_Workers = Callable[[Any, int, _Chunks], AbstractContextManager[Callable[[Sequence[int]], Iterator[int]]]]


def _embed(chunks: _Chunks, embedder: Any, processes: int, workers: _Workers, progress: Progress) -> np.ndarray:
    """Embeddings of the planned captions, memory-mapped; chunks that an earlier run finished are kept."""
    done_path, count = chunks.work / "done.json", chunks.count
    done = set(json.loads(done_path.read_text(encoding="utf-8"))) if done_path.is_file() else set()
    if not done:
        shape = (count, embedder.fingerprint.shape[1])
        np.lib.format.open_memmap(chunks.embeddings, "w+", np.float32, shape).flush()
    left = [start for start in range(0, count, chunks.size) if start not in done]
    with workers(embedder, min(processes, len(left)), chunks) as embed_chunks:
        for start in embed_chunks(left):
            done.add(start)
            _write_json(done_path, sorted(done))
            progress(f"Embedded {min(len(done) * chunks.size, count)} of {count} captions")
    return np.load(chunks.embeddings, mmap_mode="r", allow_pickle=False)


@contextmanager
def _workers(embedder: Any, processes: int, chunks: _Chunks) -> Iterator[Callable[[Sequence[int]], Iterator[int]]]:
    """What embeds chunks and yields their beginnings as they are done: this process, or several."""
    if processes <= 1:
        embed_chunk = _ChunkEmbedder(embedder, chunks)
        yield lambda starts: map(embed_chunk, starts)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (_recipe(embedder), context.Value("i", 0), processes, chunks)
    with process_pool(processes, _start_worker, arguments) as pool:

        def embed_chunks(starts: Sequence[int]) -> Iterator[int]:
            for future in as_completed([pool.submit(_work, start) for start in starts]):
                yield future.result()

        try:
            yield embed_chunks
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _recipe(embedder: Any) -> Callable[[int, int], Any]:
    recipe = getattr(embedder, "recipe", None)
    if recipe is None:
        raise ValueError("Several processes each load the encoder: make it by CaptionEmbedder.from_pretrained")
    return recipe


def _ray_workers(address: str | None, progress: Progress) -> _Workers:
    """The same by processes of Ray. A chunk is written in place, so that it may be begun twice."""

    @contextmanager
    def workers(embedder: Any, processes: int, chunks: _Chunks) -> Iterator[Callable[[Sequence[int]], Iterator[int]]]:
        from recap_hf.ray_engine import run_parts

        make = partial(_make_chunk_embedder, _recipe(embedder), processes, chunks)

        def embed_chunks(starts: Sequence[int]) -> Iterator[int]:
            for number in run_parts(make, starts, chunks.work, processes, address, progress) if starts else ():
                yield starts[number]

        yield embed_chunks

    return workers


def _make_chunk_embedder(recipe: Callable[[int, int], Any], processes: int, chunks: _Chunks) -> _ChunkEmbedder:
    return _ChunkEmbedder(recipe(0, processes), chunks)


class _ChunkEmbedder:
    """Embeds the chunk that begins at a row, in place, and returns that row."""

    def __init__(self, embedder: Any, chunks: _Chunks) -> None:
        self.embedder = embedder
        self.size = chunks.size
        self.records = CaptionRecords(chunks.work / "captions.jsonl", chunks.count)
        self.embeddings = np.load(chunks.embeddings, mmap_mode="r+", allow_pickle=False)

    def __call__(self, start: int) -> int:
        chunk = self.records[start : start + self.size]
        self.embeddings[start : start + len(chunk)] = self.embedder.embed([record["caption"] for record in chunk])
        self.embeddings.flush()
        return start


# A worker process's own.
_WORKER: dict[str, _ChunkEmbedder] = {}


def _start_worker(recipe: Callable[[int, int], Any], number: Any, processes: int, chunks: _Chunks) -> None:
    with number.get_lock():
        rank, number.value = number.value, number.value + 1
    _WORKER["embed"] = _ChunkEmbedder(recipe(rank, processes), chunks)


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
