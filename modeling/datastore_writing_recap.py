"""Writing the files of a caption datastore: one writer, and no moment at which a reader finds half of an edit."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .datastore_files_recap import (
    CAPTIONS_NAME,
    EMBEDDINGS_NAME,
    FILE_KINDS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    OpenedFiles,
    encode_int8,
    manifest_checksum,
    sha256,
)

try:
    from filelock import FileLock, Timeout
except ImportError:
    FileLock = None

LOCK_NAME = "datastore.lock"


@contextmanager
def locked(folder: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of a datastore's one writer; the system releases it when a process dies.

    Raises:
        `OSError`: if another process is writing.
    """
    if FileLock is None:
        raise ImportError("Writing a datastore needs the package filelock: pip install filelock")
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise OSError(f"{folder}: another process is writing this datastore. Try again when it is done.") from error
    try:
        yield
    finally:
        lock.release()


def add_file(folder: Path, kind: str, temporary: Path, files: dict[str, Any], name: str | None = None) -> str:
    """Gives a finished file its name, lists it in `files` with its checksum, and returns the name.

    Args:
        kind: "captions", "embeddings", "deleted" or "index".
        temporary: the file, in `folder`.
        files: the manifest's table of files.
        name: by default one that tells the content, so that no file is ever overwritten by another.
    """
    digest = sha256(temporary)
    name = name or f"{kind}-{digest[:16]}.{FILE_KINDS[kind]}"
    files[name] = {"bytes": temporary.stat().st_size, "sha256": digest}
    flush(temporary)
    os.replace(temporary, folder / name)
    return name


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest, at once, and deletes the files that belong to no datastore any more."""
    contents = {key: value for key, value in manifest.items() if key != "checksum"}
    contents = {"format_version": FORMAT_VERSION, **contents, "generation": int(manifest.get("generation", 0)) + 1}
    contents["format_version"] = FORMAT_VERSION
    contents["checksum"] = manifest_checksum(json.loads(json.dumps(contents)))
    temporary = folder / f".{MANIFEST_NAME}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, folder / MANIFEST_NAME)
    flush(folder)
    delete_leftovers(folder, contents["files"])


def delete_leftovers(folder: Path, files: Mapping[str, Any]) -> None:
    """Deletes files of earlier generations and of edits that were cut off. Readers that opened them keep them."""
    kinds = "|".join(f"{kind}(-[0-9a-f]{{16}})?\\.{suffix}" for kind, suffix in FILE_KINDS.items())
    for path in folder.iterdir():
        ours = re.fullmatch(kinds, path.name) or re.fullmatch(r"\.[\w.-]+\.\d+\.tmp", path.name)
        if ours and path.name not in files:
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
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


def copy_files(opened: OpenedFiles, folder: Path, files: dict[str, Any]) -> None:
    """Copies captions and embeddings of an opened datastore that has no removed rows, and lists them in `files`."""
    for segment in opened.manifest["segments"]:
        for name in (segment["captions"], segment["embeddings"]):
            files[name] = opened.manifest["files"][name]
            source, target = opened.folder / name, folder / name
            if target.exists() and target.samefile(source):
                continue
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            shutil.copyfile(source, temporary)
            flush(temporary)
            os.replace(temporary, target)


def write_segment(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    embeddings: Any,
    files: dict[str, Any],
    dtype: str = "float32",
    plain_names: bool = False,
) -> dict[str, Any]:
    """Writes captions and embeddings, block by block, and returns the segment's entry for a manifest."""
    captions = folder / f".{CAPTIONS_NAME}.{os.getpid()}.tmp"
    with open(captions, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    array = folder / f".{EMBEDDINGS_NAME}.{os.getpid()}.tmp"
    write_array(array, embeddings, dtype)
    return {
        "captions": add_file(folder, "captions", captions, files, CAPTIONS_NAME if plain_names else None),
        "embeddings": add_file(folder, "embeddings", array, files, EMBEDDINGS_NAME if plain_names else None),
        "num_captions": len(records),
        "deleted": None,
    }


def write_array(path: Path, array: Any, dtype: str) -> None:
    """`np.save` of anything that has a shape and slices, without a second copy of it in memory. As "int8" unit vectors
    are encoded."""
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(array), 1 << 14):
            block = array[start : start + (1 << 14)]
            block = encode_int8(block) if dtype == "int8" else np.ascontiguousarray(block, dtype=dtype)
            file.write(block.tobytes())


__all__ = ["LOCK_NAME", "add_file", "copy_files", "locked", "write_array", "write_manifest", "write_segment"]
