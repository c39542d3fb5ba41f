"""Writing a datastore: new files beside the old ones, then the manifest at once, then the old files are deleted.

Reading is part of the remote code: `modeling/datastore_files_recap.py`.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from recap_hf.modeling.datastore_files_recap import (
    EMBEDDING_TYPES,
    FILE_NAMES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    manifest_checksum,
    sha256,
)

LOCK_NAME = "datastore.lock"
BLOCK_ROWS = 1 << 14
_SUFFIXES = {"captions": "jsonl", "embeddings": "npy"}
_LEFTOVER = re.compile(r"(captions|embeddings|deleted|index)-[0-9a-f]{16}\.\w+|\.[a-z]+\.\d+\.tmp")


def save_datastore(store: Any, folder: str | os.PathLike) -> None:
    """Writes a datastore into a folder, where it replaces another at once; see `CaptionDatastore.save_pretrained`.

    Args:
        store ([`CaptionDatastore`]): any datastore.
        folder: made if need be.

    Raises:
        OSError: another process is writing there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(store.embeddings.dtype)
    dtype = dtype if dtype in EMBEDDING_TYPES else "float32"
    with locked(folder) if (folder / MANIFEST_NAME).is_file() else nullcontext():
        new = write_new(folder, store.records, array_blocks(store.embeddings), store.embeddings.shape, dtype)
        contents = {
            "num_captions": len(store),
            "dimension": store.dimension,
            "keys": store.keys,
            "dtype": dtype,
            "fingerprint": fingerprint_entry(store.fingerprint),
            "report": (store.manifest or {}).get("report"),
        }
        index = store.search_index
        publish(folder, contents, new, index if hasattr(index, "write") else None)


def fingerprint_entry(fingerprint: np.ndarray | None) -> list[list[float]] | None:
    """A fingerprint as the manifest states it."""
    return None if fingerprint is None else np.asarray(fingerprint).astype(float).round(7).tolist()


def encode_int8(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors as int8: the largest value of each row becomes 127. No scale is stored, since the length is known:
    `decode_int8` gives unit vectors again, at a cosine above 0.999 to the original."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return np.round(vectors * (127 / np.abs(vectors).max(axis=-1, keepdims=True))).astype(np.int8)


@contextmanager
def locked(folder: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of a datastore's one writer; the system releases it when a process dies.

    Raises:
        `OSError`: if another process is writing.
    """
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise OSError(f"{folder}: another process is writing this datastore. Try again when it is done.") from error
    try:
        yield
    finally:
        lock.release()


def temporary(folder: Path, kind: str) -> Path:
    """A name for an unfinished file; what a killed writer leaves under it, the next one deletes."""
    return folder / f".{kind}.{os.getpid()}.tmp"


def write_new(
    folder: Path, records: Iterable[Any], blocks: Iterable[np.ndarray], shape: tuple[int, int], dtype: str
) -> dict[str, Path]:
    """Writes captions and embeddings beside those of a datastore, for [`publish`].

    Args:
        folder: of the datastore.
        records: mappings, or lines of JSON as bytes, which are copied.
        blocks: of embeddings, in any number of rows.
        shape: of all embeddings together.
        dtype: "float32", "float16" or "int8".
    """
    new = {kind: temporary(folder, kind) for kind in ("captions", "embeddings")}
    write_captions(new["captions"], records)
    with open(new["embeddings"], "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            encoded = encode_int8(block) if dtype == "int8" and block.dtype != np.int8 else block
            file.write(np.ascontiguousarray(encoded, dtype=dtype).tobytes())
    return new


def write_captions(path: Path, records: Iterable[Any]) -> None:
    """Writes records as JSON lines; lines that are bytes already are copied."""
    records = records.lines() if hasattr(records, "lines") else records
    with open(path, "wb") as file:
        for record in records:
            file.write(record if isinstance(record, bytes) else _record_line(record))


def _record_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON. JSON knows no NaN and no infinity: they are missing values."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(dict(record)), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def array_blocks(array: Any, dtype: str | None = None, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Some or all rows of an array in blocks, in the type in which it is stored if that is `dtype`."""
    raw = getattr(array, "codes", array)
    array = raw if dtype is None or raw.dtype == dtype else array
    for start in range(0, len(array) if rows is None else len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield np.asarray(array[part if rows is None else rows[part]])


def publish(folder: Path, contents: Mapping[str, Any], new: Mapping[str, Path], index: Any = None) -> None:
    """Makes a new generation of a datastore visible, at once, and deletes the files that it does not use.

    Args:
        folder: of the datastore; the caller holds its lock.
        contents: of the manifest: `num_captions`, `dimension`, `keys`, `dtype`, `fingerprint`, `report`, and for what
            is not new, `captions`, `embeddings`, `index` and `files` as they were.
        new: finished files in `folder`: "captions", "embeddings", both or neither.
        index ([`StoredIndex`], *optional*): is written and replaces the old one.
    """
    manifest = {"index": None, "report": None, **contents, "format_version": FORMAT_VERSION}
    before, generation = _previous(folder)
    files: dict[str, Any] = {}
    for kind, path in new.items():
        manifest[kind] = _place(path, folder, kind, _SUFFIXES[kind], files)
    if index is not None:
        path = temporary(folder, "index")
        index.write(path)
        name = _place(path, folder, "index", index.suffix, files)
        manifest["index"] = {"file": name, "backend": index.backend, **index.description, "num_rows": index.num_rows}
    used = [manifest["captions"], manifest["embeddings"]]
    if manifest["index"] is not None:
        used.append(manifest["index"]["file"])
    manifest["files"] = {name: files.get(name) or contents["files"][name] for name in used}
    manifest["generation"] = generation + 1
    manifest["checksum"] = manifest_checksum(json.loads(json.dumps(manifest)))
    path = temporary(folder, "datastore")
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _flush(path)
    os.replace(path, folder / MANIFEST_NAME)
    _flush(folder)
    for name in before | {each.name for each in folder.iterdir() if _LEFTOVER.fullmatch(each.name)}:
        # A file that a reader has open cannot be deleted everywhere (Windows): the next writer tries again.
        with suppress(PermissionError):
            if name not in used:
                (folder / name).unlink(missing_ok=True)


def _place(path: Path, folder: Path, kind: str, suffix: str, files: dict[str, Any]) -> str:
    """Gives a finished file its name and lists it in `files`. The name is one of the content where there is a
    datastore or another file already, so that no file replaces another."""
    digest, name = sha256(path), f"{kind}.{suffix}"
    if (folder / MANIFEST_NAME).exists() or (folder / name).exists():
        name = f"{kind}-{digest[:16]}.{suffix}"
    files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    _flush(path)
    os.replace(path, folder / name)
    return name


def _previous(folder: Path) -> tuple[set[str], int]:
    """Files and generation of the datastore that a folder holds already."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        names, generation = set(manifest.get("files", ())), int(manifest.get("generation", 0))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return set(), 0
    # Whatever a damaged manifest lists: only files of a datastore are deleted.
    return {name for name in names if any(known.fullmatch(name) for known in FILE_NAMES.values())}, generation


def _flush(path: Path) -> None:
    """To the disk, so that a power cut does not leave a manifest without its files."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Folders cannot be opened everywhere (Windows); there the system orders the writes itself.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
