"""The files of a caption datastore: format, reading and writing.

A folder holds `datastore.json` (the manifest), captions (JSON lines), embeddings (NumPy) and perhaps an index. No file
is ever changed. A writer puts new files beside the old ones, replaces the manifest at once and deletes the old files:
a reader opens the datastore before the edit or after it, and one that has the old files open keeps them. All names in
the manifest are plain file names, all files are checked against their checksums, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from .index_recap import open_index

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
MANIFEST_NAME = "datastore.json"
LOCK_NAME = "datastore.lock"
EMBEDDING_TYPES = ("float32", "float16", "int8")
# What the embeddings of a datastore are of: its captions, or the recordings that they describe.
TEXT_KEYS, AUDIO_KEYS = KEYS = ("text", "audio")
BLOCK_ROWS = 1 << 14
# Plain names and `deleted` are of earlier formats.
_SUFFIXES = {"captions": "jsonl", "embeddings": "npy", "deleted": "npy", "index": "(faiss|bin|npy)"}
_FILE_NAMES = {kind: re.compile(rf"{kind}(-[0-9a-f]{{16}})?\.{suffix}") for kind, suffix in _SUFFIXES.items()}
_LEFTOVER = re.compile(r"(captions|embeddings|deleted|index)-[0-9a-f]{16}\.\w+|\.[a-z]+\.\d+\.tmp")
_MAX_TRIES = 100


def encode_int8(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors as int8: the largest value of each row becomes 127. No scale is stored, since the length is known:
    [`decode_int8`] gives unit vectors again, at a cosine above 0.999 to the original."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return np.round(vectors * (127 / np.abs(vectors).max(axis=-1, keepdims=True))).astype(np.int8)


def decode_int8(codes: np.ndarray) -> np.ndarray:
    """Unit vectors in float32 of rows of int8."""
    vectors = np.asarray(codes, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Int8Embeddings:
    """Embeddings that are stored as int8 and read as unit vectors in float32; `dtype` is that of the file.

    Args:
        codes (`np.ndarray` of shape `(rows, dimension)`): int8, may be memory-mapped.
    """

    ndim = 2

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes
        self.shape, self.dtype, self.nbytes = codes.shape, codes.dtype, codes.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: Any) -> np.ndarray:
        return decode_int8(self.codes[row])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype, copy=False)


class CaptionRecords(Sequence):
    """The records of JSON lines, parsed when they are asked for: opening a million of them costs nothing.

    Args:
        data: the lines, as bytes or a memory map.
        bounds (`np.ndarray` of shape `(rows, 2)`): first byte of each line and the byte after it.
        path: the file, for messages and for pickling; `None` for lines in memory.
    """

    def __init__(self, data: Any, bounds: np.ndarray, path: str | None) -> None:
        # Slices of a memoryview cost a tenth of those of an array.
        self._bytes, self._bounds, self.path = memoryview(data), bounds, path

    @classmethod
    def open(cls, path: Path, count: int) -> CaptionRecords:
        """Maps a file of `count` lines; a `ValueError` if it has another number of lines."""
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)
        # In blocks: the mask of a large file is not held as a whole.
        step = 1 << 24
        ends = [np.flatnonzero(data[at : at + step] == 10) + at + 1 for at in range(0, len(data), step)]
        ends = np.concatenate([[0], *ends]).astype(np.int64)
        if len(ends) != count + 1 or ends[-1] != len(data):
            raise ValueError(f"{path}: has {len(ends) - 1} lines, expected {count} captions.")
        return cls(data, np.stack([ends[:-1], ends[1:]], axis=1), str(path))

    def __len__(self) -> int:
        return len(self._bounds)

    def line(self, row: int) -> bytes:
        """The bytes of a row's line."""
        start, end = self._bounds[row]
        return self._bytes[start:end].tobytes()

    def lines(self, rows: Iterable[int] | None = None) -> Iterator[bytes]:
        """The lines of some rows, by default of all."""
        return map(self.line, range(len(self)) if rows is None else rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        line = self.line(row)
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path}, line {row + 1}: not JSON ({error}).") from error
        if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
            raise ValueError(f"{self.path}, line {row + 1}: expected a JSON object with a caption, got {line!r:.80}.")
        return record

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None

    def __deepcopy__(self, memo: Any) -> CaptionRecords:
        # They never change.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return CaptionRecords, (self._bytes.tobytes(), self._bounds, None)
        return CaptionRecords.open, (Path(self.path).absolute(), len(self))


# ------------------------------------------------------------------ reading


Opened = tuple[CaptionRecords, Any, Any, dict[str, Any]]


def open_files(folder: Path, verify: bool = True) -> Opened:
    """Opens the datastore in a folder. Where a writer replaces it meanwhile, the newer one is opened.

    Args:
        folder: holds a `datastore.json`.
        verify: compare every file with its checksum.

    Returns:
        Records, embeddings of shape `(rows, dimension)`, the index or `None`, and the contents of the manifest.

    Raises:
        `OSError`: if a file is missing. `ValueError`: if one is damaged, tampered with or of a newer format.
    """
    for _ in range(_MAX_TRIES):
        text = _read_manifest_text(folder)
        try:
            return _open_once(folder, text, verify)
        except FileNotFoundError:
            # The file was there when the manifest was written: a writer has replaced it, or it is lost.
            if _read_manifest_text(folder) == text:
                raise
    raise OSError(f"{folder}: the datastore was replaced {_MAX_TRIES} times while it was being opened. Try again.")


def _open_once(folder: Path, text: str, verify: bool) -> Opened:
    path = folder / MANIFEST_NAME
    manifest = parse_manifest(path, text)
    for name, expected in manifest["files"].items():
        check_file(folder / name, expected, verify)
    if manifest["checksum"] is not None and manifest["checksum"] != manifest_checksum(json.loads(text)):
        raise ValueError(f"{path}: the checksum differs, the description was changed or damaged after it was written.")
    segments = manifest.pop("segments", None)
    if segments is None:
        records, embeddings = _open_pair(path, manifest, manifest, manifest["num_captions"])
    else:
        records, embeddings = _join_segments(path, manifest, segments)
    embeddings = Int8Embeddings(embeddings) if embeddings.dtype == np.int8 else embeddings
    return records, embeddings, open_index(folder, manifest), manifest


def _open_pair(path: Path, manifest: Mapping[str, Any], names: Any, count: int) -> tuple[Any, np.ndarray]:
    """Records and embeddings, `count` of each, in the files that `names` gives."""
    array, shape = load_array(path.parent / names["embeddings"]), (count, manifest["dimension"])
    try:
        records = CaptionRecords.open(path.parent / names["captions"], count)
    except ValueError as error:
        raise ValueError(f"{path}: announces {count} captions, but {error}") from error
    if array.shape != shape or array.dtype != np.dtype(manifest["dtype"]):
        raise ValueError(
            f"{path}: announces {count} captions of dimension {shape[1]} in {manifest['dtype']}, but there are "
            f"embeddings of shape {array.shape} in {array.dtype}."
        )
    return records, array


def _join_segments(path: Path, manifest: dict[str, Any], segments: Sequence[Any]) -> tuple[Any, np.ndarray]:
    """Records and embeddings of format 2, which kept them in segments and listed removed rows. Several segments, or
    one with removed rows, are copied into memory; its index is left out, since it counts removed rows."""
    parts = [_open_pair(path, manifest, segment, segment["num_captions"]) for segment in segments]
    kept = [np.ones(len(records), dtype=bool) for records, _ in parts]
    for segment, mask in zip(segments, kept, strict=True):
        if segment["deleted"] is not None:
            name = path.parent / segment["deleted"]
            rows = np.asarray(load_array(name))
            fits = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) > 0 and (np.diff(rows) > 0).all()
            if not fits or rows[0] < 0 or rows[-1] >= len(mask):
                raise ValueError(f"{name}: expected ascending rows below {len(mask)} in int64.")
            mask[rows] = False
    if sum(mask.sum() for mask in kept) != manifest["num_captions"]:
        raise ValueError(
            f"{path}: announces {manifest['num_captions']} captions, but there are {sum(mask.sum() for mask in kept)}."
        )
    if len(parts) == 1 and kept[0].all():
        manifest |= {kind: segments[0][kind] for kind in ("captions", "embeddings")}
        return parts[0]
    logger.warning("%s: of an earlier format, it is read into memory. `recap datastore index` rewrites it.", path)
    manifest["index"] = None
    lines = [records.line(row) for (records, _), mask in zip(parts, kept, strict=True) for row in np.flatnonzero(mask)]
    ends = np.cumsum([0, *map(len, lines)])
    records = CaptionRecords(b"".join(lines), np.stack([ends[:-1], ends[1:]], axis=1), None)
    return records, np.concatenate([array[mask] for (_, array), mask in zip(parts, kept, strict=True)])


def read_reference(path: Path) -> dict[str, str] | None:
    """Repository and revision of the datastore that a manifest only refers to, or `None` if it describes its own."""
    try:
        reference = json.loads(path.read_text(encoding="utf-8")).get("reference")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError):
        # No description of a datastore at all: the reading of the manifest says so.
        return None
    if reference is None:
        return None
    try:
        return {"repo_id": str(reference["repo_id"]), "revision": str(reference["revision"])}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the reference to a datastore must name 'repo_id' and 'revision', got {reference!r:.200}."
        ) from error


def open_embeddings(path: Path) -> Any:
    """The embeddings in a file, memory-mapped; those of int8 are read as unit vectors in float32."""
    array = load_array(path)
    return Int8Embeddings(array) if array.dtype == np.int8 else array


def load_array(path: Path) -> np.ndarray:
    """A memory-mapped NumPy file, or a `ValueError`: pickled objects are refused."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path}: not a NumPy array ({error}).") from error


def check_file(path: Path, expected: Mapping[str, Any], verify: bool = True) -> None:
    """Refuses a file that is missing, or has another size or, with `verify`, another checksum than expected."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, the datastore is incomplete.")
    size, whole = path.stat().st_size, expected["bytes"]
    if size != whole:
        raise ValueError(f"{path}: has {size} bytes, expected {whole}: truncated or not of this datastore.")
    if verify and sha256(path) != expected["sha256"]:
        raise ValueError(f"{path}: the checksum differs, the file was changed or damaged after it was written.")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest_text(folder: Path) -> str:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not a datastore, it has no {MANIFEST_NAME}. Write one with CaptionDatastore.save_pretrained "
            "or `recap datastore build`."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not the description of a caption datastore ({error!r}).") from error


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Hash over all contents of a manifest but the hash itself."""
    contents = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def parse_manifest(path: Path, text: str) -> dict[str, Any]:
    """The contents of a manifest, its types and names checked. Formats 1 and 2 keep their `segments`.

    Raises:
        `ValueError`: naming `path` and what is wrong.
    """
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{path}: the datastore has format version {version}, this package reads up to {FORMAT_VERSION}. "
                "Update it: pip install -U recap-hf"
            )
        if version == 1:
            pair = {"captions": "captions.jsonl", "embeddings": "embeddings.npy", "deleted": None}
            segments = [{**pair, "num_captions": manifest["num_captions"]}]
            manifest = {**manifest, "dtype": "float32", "segments": segments, "checksum": None}
        defaults = {"index": None, "report": None, "generation": 0, "keys": TEXT_KEYS}
        manifest = {**defaults, **manifest, "checksum": manifest["checksum"]}
        if manifest["keys"] not in KEYS:
            raise ValueError(f"{path}: the keys of a datastore are 'text' or 'audio', got {manifest['keys']!r}.")
        manifest["num_captions"], manifest["dimension"] = int(manifest["num_captions"]), int(manifest["dimension"])
        if manifest["dtype"] not in EMBEDDING_TYPES or manifest["dimension"] < 1:
            raise ValueError(f"{path}: expected embeddings in {' or '.join(EMBEDDING_TYPES)} of a positive dimension.")
        _check_names(path, manifest)
        fingerprint = manifest["fingerprint"]
        if fingerprint is not None and np.asarray(fingerprint, dtype=np.float32).shape[1:] != (manifest["dimension"],):
            raise ValueError(f"{path}: the fingerprint does not have {manifest['dimension']} dimensions.")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not the description of a caption datastore ({error!r}).") from error
    return manifest


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    """Every file that is used is listed with its checksum, and is in the folder of the manifest."""
    if manifest["format_version"] < 3:
        if not manifest["segments"]:
            raise ValueError(f"{path}: the datastore has no segment.")
        used = [(kind, each[kind]) for each in manifest["segments"] for kind in ("captions", "embeddings", "deleted")]
        for segment in manifest["segments"]:
            segment["num_captions"] = int(segment["num_captions"])
    else:
        manifest.pop("segments", None)
        used = [(kind, manifest[kind]) for kind in ("captions", "embeddings")]
    if manifest["index"] is not None:
        used.append(("index", manifest["index"]["file"]))
    used = [(kind, name) for kind, name in used if name is not None]
    for kind, name in used:
        if not isinstance(name, str) or not _FILE_NAMES[kind].fullmatch(name):
            raise ValueError(f"{path}: {name!r} cannot be the name of a datastore's {kind}.")
    if {name for _, name in used} != set(manifest["files"]):
        raise ValueError(f"{path}: the files that are used and those that have a checksum differ.")
    manifest["files"] = {
        name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in manifest["files"].items()
    }


# ------------------------------------------------------------------ writing


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
    records = records.lines() if isinstance(records, CaptionRecords) else records
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
    return {name for name in names if any(known.fullmatch(name) for known in _FILE_NAMES.values())}, generation


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


__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "open_files", "publish", "read_reference"]
