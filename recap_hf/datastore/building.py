"""Building a datastore: sources are read and filtered, and embedded in chunks that a second run does not repeat."""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, get_worker_info

from recap_hf.modeling.datastore_files_recap import (
    EMBEDDING_TYPES,
    MANIFEST_NAME,
    TEXT_KEYS,
    CaptionRecords,
    open_embeddings,
)
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .files import LOCK_NAME, fingerprint_entry, locked, publish, write_captions, write_new
from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, build_index, check_index
from .sources import SourceOptions, read_sources

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
        processes: that embed side by side, each on one core or on a GPU of its own.
        engine: "local", or "ray": the processes are Ray's, may die and may be on other machines that see the folder.
        ray_address: of a cluster; by default Ray is started on this machine.
        chunk_captions: embedded at a time; an interrupted build embeds unfinished chunks again.
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
    (except for about 16 bytes each that tell duplicates). A build that was cut off is continued by the same call.

    Args:
        sources: see [`read_sources`].
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
    caption_filter = CaptionFilter(filter_options or FilterOptions(), embedder.count_tokens)

    def kept() -> Iterator[dict[str, Any]]:
        for source, records in read_sources(sources, source_options):
            options.progress(f"Reading {source}")
            yield from caption_filter.filter(records, Path(str(source)).name)

    with build_folder(folder, options, embedder.fingerprint.shape[1]) as work:
        write_captions(work / "captions.jsonl", kept())
        report = caption_filter.report()
        if not report["kept"]:
            why = f"left out: {json.dumps(report['dropped'])}" if report["read"] else "the sources hold none"
            raise ValueError(f"No caption is left of {report['read']} read; {why}")
        records = CaptionRecords.open(work / "captions.jsonl", report["kept"])
        chunks = _embed(records, embedder, work, options)
        return publish_build(folder, records, map(np.load, chunks), embedder.fingerprint, report, options)


@contextmanager
def build_folder(folder: Path, options: BuildOptions, dimension: int) -> Iterator[Path]:
    """The folder for unfinished files of a build, while the lock of the datastore is held. A new folder in which
    nothing was embedded is deleted where the build fails.

    Raises:
        OSError: `folder` is a file, holds a datastore that must not be replaced, or files that are not of one.
        ValueError: there is no such index.
    """
    # Before an hour of embedding, not after it.
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the datastore needs a folder of its own")
    if (folder / MANIFEST_NAME).is_file():
        if not options.overwrite:
            hint = f"To add to it: recap datastore add {folder} FILE...; to replace it, give --overwrite"
            raise FileExistsError(f"{folder} holds a datastore already. {hint}")
    elif folder.is_dir():
        foreign = sorted(each.name for each in folder.iterdir() if not each.name.startswith((".", LOCK_NAME)))
        if foreign:
            found = f"holds files that are not of a datastore, such as {foreign[0]!r}"
            raise FileExistsError(f"{folder} {found}: give a new or empty folder")
    check_index(options.index, options.recall, dimension)
    made, work = not folder.exists(), folder / WORK_NAME
    work.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield work
    except BaseException:
        if made and not any(work.glob("*.npy")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def publish_build(
    folder: Path,
    records: Sequence[dict[str, Any]],
    blocks: Iterable[np.ndarray],
    fingerprint: np.ndarray,
    report: dict[str, Any],
    options: BuildOptions,
    keys: str = TEXT_KEYS,
) -> CaptionDatastore:
    """Writes what was embedded, indexes it, makes the datastore visible, deletes the files of the build and opens the
    result. The caller holds the lock; `blocks`: the embeddings, in any number of rows."""
    shape = (len(records), fingerprint.shape[1])
    new = write_new(folder, records, blocks, shape, options.dtype)
    options.progress("Index: trained and tuned where the size needs one")
    index = build_index(open_embeddings(new["embeddings"]), options.index, options.recall)
    contents = {
        "num_captions": shape[0],
        "dimension": shape[1],
        "keys": keys,
        "dtype": options.dtype,
        "fingerprint": fingerprint_entry(fingerprint),
        "report": report | {"exact_search": options.index == "exact"},
    }
    publish(folder, contents, new, index)
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    return CaptionDatastore.from_pretrained(folder)


def chunk_path(work: Path, fingerprint: np.ndarray, contents: bytes) -> Path:
    """The file for the embeddings of `contents` by an encoder: another run that wants the same finds it there."""
    return work / f"{hashlib.sha256(fingerprint.round(3).tobytes() + contents).hexdigest()[:16]}.npy"


def saved(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file; where there is none, it is made, and written at once."""
    if not path.is_file():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, make(), allow_pickle=False)
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _embed(records: CaptionRecords, embedder: Any, work: Path, options: BuildOptions) -> list[Path]:
    """Files with the embeddings of all captions, chunk by chunk; those that an earlier run finished are kept."""
    rows = range(len(records))
    parts = [rows[start : start + options.chunk_captions] for start in rows[:: options.chunk_captions]]
    # Absolute: other processes may have another working directory.
    paths = [chunk_path(work.absolute(), embedder.fingerprint, b"".join(records.lines(part))) for part in parts]
    left = [(part, path) for part, path in zip(parts, paths, strict=True) if not path.is_file()]
    if len(left) < len(parts):
        options.progress(f"Continuing a build that was cut off: {len(parts) - len(left)} of {len(parts)} chunks exist")
    for done, _ in enumerate(_run(left, embedder, records, work, options), len(parts) - len(left) + 1):
        options.progress(f"Embedded {min(done * options.chunk_captions, len(rows))} of {len(rows)} captions")
    return paths


def _run(left: list[Any], embedder: Any, records: CaptionRecords, work: Path, options: BuildOptions) -> Iterator[Any]:
    """Embeds chunks in this process, in several, or in Ray's, and yields something for each that is done."""
    if not left:
        return
    processes, recipe = min(options.processes, len(left)), getattr(embedder, "recipe", None)
    here = processes <= 1 and options.engine == "local"
    if recipe is None and not here:
        raise ValueError("Several processes each load the encoder: make it by CaptionEmbedder.from_pretrained")
    chunks = _Chunks(left, records, (lambda number: embedder) if here else recipe)
    if options.engine == "ray":
        from recap_hf.ray_engine import run_parts

        yield from run_parts(chunks.worker, range(len(left)), work, processes, options.ray_address, options.progress)
    elif here:
        yield from map(chunks.worker(), range(len(left)))
    else:
        # Each worker has one thread.
        workers = {"num_workers": processes, "multiprocessing_context": "spawn", "worker_init_fn": end_with_parent}
        yield from DataLoader(chunks, batch_size=None, in_order=False, **workers)


@dataclass
class _Chunks:
    """Embeds the captions of a chunk into its file when it is asked for its number. The file may be there already: of
    a process that died afterwards."""

    chunks: list[tuple[range, Path]]
    records: CaptionRecords
    make: Callable[[int], Any]
    embedder: Any = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> int:
        if self.embedder is None:
            worker = get_worker_info()
            self.embedder = self.make(worker.id if worker else 0)
        rows, path = self.chunks[number]
        saved(path, lambda: self.embedder.embed([self.records[row]["caption"] for row in rows]))
        return number

    def worker(self) -> Callable[[int], int]:
        """What embeds a chunk, for Ray's processes."""
        return self.__getitem__


def end_with_parent(number: int) -> None:
    """Ends this process when the one that started it dies: nobody reads the result of a killed parent's worker."""

    def end() -> None:
        wait([multiprocessing.parent_process().sentinel])
        # An orderly exit would wait for the thread that computes.
        os._exit(1)

    threading.Thread(target=end, name="end-with-parent", daemon=True).start()
