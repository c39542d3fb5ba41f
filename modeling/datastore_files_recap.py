"""The files of a caption datastore: a manifest, and segments of captions and embeddings that never change.

A folder holds `datastore.json` (the manifest) and, for every segment, captions (JSON lines) and embeddings (NumPy).
An edit writes new files under names that tell their content, then replaces the manifest at once: a reader sees the
datastore before the edit or after it. Removed captions stay in their segment and are listed in a file of tombstones.
All names in the manifest are plain file names, all files are checked against their checksums, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 2
MANIFEST_NAME = "datastore.json"
CAPTIONS_NAME = "captions.jsonl"
EMBEDDINGS_NAME = "embeddings.npy"
EMBEDDING_TYPES = ("float32", "float16", "int8")
FILE_KINDS = {"captions": "jsonl", "embeddings": "npy", "deleted": "npy", "index": "faiss"}
_MAX_TRIES = 100
# What the embeddings of a datastore are of: its captions, or the recordings that they describe.
TEXT_KEYS, AUDIO_KEYS = KEYS = ("text", "audio")


def check_keys(keys: Any) -> str:
    """`keys`, if it is "text" or "audio"; a `ValueError` otherwise."""
    if keys not in KEYS:
        raise ValueError(f"The keys of a datastore are 'text' or 'audio', got {keys!r}.")
    return keys


def encode_int8(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors as int8: the largest value of each row becomes 127. No scale is stored, since the length is known:
    [`decode_int8`] gives unit vectors again, at a cosine above 0.999 to what they were."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return np.round(vectors * (127 / np.abs(vectors).max(axis=-1, keepdims=True))).astype(np.int8)


def decode_int8(codes: np.ndarray) -> np.ndarray:
    """Unit vectors in float32 of rows of int8."""
    vectors = np.asarray(codes, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Int8Embeddings:
    """Embeddings that are stored as int8, read as unit vectors in float32; `dtype` is that of the file.

    Args:
        codes (`np.ndarray` of shape `(rows, dimension)`): int8, may be memory-mapped.
    """

    ndim = 2

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes
        self.shape, self.dtype, self.nbytes = codes.shape, codes.dtype, codes.nbytes
        self._codes = np.asarray(codes)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, row: Any) -> np.ndarray:
        return decode_int8(self._codes[row])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype, copy=False)


class CaptionRecords(Sequence):
    """The records of a file of JSON lines, read when they are asked for: opening a million of them costs nothing.

    Args:
        path: the file, which must not change.
        count: how many lines it has.

    Raises:
        `ValueError`: if the file has another number of lines; on access, if a line is no record with a caption.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = str(path)
        contents = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        self._ends = _line_ends(contents)
        # Slices of it cost a tenth of those of the array.
        self._bytes = memoryview(np.asarray(contents))
        if len(self._ends) != count or (count and self._ends[-1] != len(contents)):
            raise ValueError(f"{path}: has {len(self._ends)} lines, expected {count} captions.")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        line = self._bytes[self._ends[row - 1] if row else 0 : self._ends[row]].tobytes()
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path}, line {row + 1}: not JSON ({error}).") from error
        if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
            raise ValueError(f"{self.path}, line {row + 1}: expected a JSON object with a caption, got {line!r:.80}.")
        return record

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None


class LiveRows(Sequence):
    """Sequences after one another as one, without the rows that are removed.

    Args:
        parts: sequences of records, or arrays of embeddings of one width and type.
        live (`np.ndarray` of shape `(num_live,)`, *optional*): positions over all parts that are left, ascending.
    """

    def __init__(self, parts: Sequence[Any], live: np.ndarray | None = None) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.live = live

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.live is None else len(self.live)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        position = row if self.live is None else int(self.live[row])
        part = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.parts[part][position - int(self.starts[part])]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None


class LiveEmbeddings(LiveRows):
    """The embeddings of several segments, or with removed rows, used like one array of shape `(rows, dimension)`."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.parts[0].shape[1]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __getitem__(self, row: Any) -> np.ndarray:
        if isinstance(row, slice):
            row = np.arange(*row.indices(len(self)))
        elif isinstance(row, (int, np.integer)):
            return super().__getitem__(int(row))
        rows = np.asarray(row)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"row out of range: the datastore has {len(self)} rows")
        rows = np.where(rows < 0, rows + len(self), rows).astype(np.int64)
        return self.at(rows if self.live is None else self.live[rows])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Embeddings at positions over all parts, removed rows counted."""
        dtype = np.float32 if self.dtype == np.int8 else self.dtype
        found = np.empty((len(positions), self.shape[1]), dtype=dtype)
        owners = np.searchsorted(self.starts, positions, side="right") - 1
        for part in np.unique(owners):
            chosen = owners == part
            found[chosen] = self.parts[part][positions[chosen] - self.starts[part]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype, copy=False)


@dataclass
class OpenedFiles:
    """A datastore's files, opened and checked.

    Args:
        folder: where they lie.
        manifest: what `datastore.json` says, in the words of the newest format.
        records: one per caption that is not removed.
        embeddings: one row per record: an array, or [`LiveEmbeddings`] where there are several segments.
        live: positions over all segments that are left, or `None` where nothing is removed.
        index: the search index, where there is one and it was asked for.
    """

    folder: Path
    manifest: dict[str, Any]
    records: Sequence[dict[str, Any]]
    embeddings: Any
    live: np.ndarray | None
    index: Any = None


def _same(one: Any, other: Any) -> bool:
    return one == other


def _line_ends(data: np.ndarray) -> np.ndarray:
    """Where the lines end, each just behind its newline; in blocks, so that a large file is not held as a mask."""
    step = 1 << 24
    ends = [np.flatnonzero(data[start : start + step] == 10) + start + 1 for start in range(0, len(data), step)]
    return np.concatenate(ends) if ends else np.empty(0, np.int64)


# ------------------------------------------------------------------ reading


def open_files(
    folder: Path, verify: bool = True, open_index: Callable[[Path, dict[str, Any]], Any] | None = None
) -> OpenedFiles:
    """Opens the datastore in a folder; where a writer replaces it meanwhile, the newer one is opened.

    Args:
        folder: holds a `datastore.json`.
        verify: compare every file with its checksum.
        open_index: opens the index, given the folder and the manifest.

    Raises:
        `OSError`: if a file is missing. `ValueError`: if one is damaged, tampered with or of a newer format.
    """
    for _ in range(_MAX_TRIES):
        text = _read_manifest_text(folder)
        try:
            opened = _open_once(folder, text, verify)
            opened.index = None if open_index is None else open_index(folder, opened.manifest)
            return opened
        except FileNotFoundError:
            # The file was there when the manifest was written, so either a writer has moved on, or it is lost.
            if _read_manifest_text(folder) == text:
                raise
    raise OSError(f"{folder}: the datastore was replaced {_MAX_TRIES} times while it was being opened. Try again.")


def _open_once(folder: Path, text: str, verify: bool) -> OpenedFiles:
    path = folder / MANIFEST_NAME
    manifest = parse_manifest(path, text)
    for name, expected in manifest["files"].items():
        check_file(folder / name, expected, verify)
    records, embeddings, deleted = [], [], []
    dtype = np.dtype(manifest["dtype"])
    for segment in manifest["segments"]:
        expected = (segment["num_captions"], manifest["dimension"])
        array = load_array(folder / segment["embeddings"])
        try:
            records.append(CaptionRecords(folder / segment["captions"], expected[0]))
        except ValueError as error:
            raise ValueError(f"{path}: announces {expected[0]} captions, but {error}") from error
        if array.shape != expected or array.dtype != dtype:
            raise ValueError(
                f"{path}: announces {expected[0]} captions of dimension {expected[1]} in {dtype}, but there are "
                f"embeddings of shape {array.shape} in {array.dtype}."
            )
        embeddings.append(Int8Embeddings(array) if dtype == np.int8 else array)
        deleted.append(_load_deleted(folder, segment))
    live = _live(deleted, [len(part) for part in records])
    num_live = len(live) if live is not None else sum(map(len, records))
    if num_live != manifest["num_captions"]:
        raise ValueError(f"{path}: announces {manifest['num_captions']} captions, but there are {num_live}.")
    if manifest["checksum"] is not None and manifest["checksum"] != manifest_checksum(json.loads(text)):
        raise ValueError(f"{path}: the checksum differs, the description was changed or damaged after it was written.")
    if len(records) == 1 and live is None:
        return OpenedFiles(folder, manifest, records[0], embeddings[0], None)
    return OpenedFiles(folder, manifest, LiveRows(records, live), LiveEmbeddings(embeddings, live), live)


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


def load_array(path: Path) -> np.ndarray:
    """A memory-mapped NumPy file, or a `ValueError`: pickled objects are refused."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a NumPy array ({error}).") from error


def _load_deleted(folder: Path, segment: Mapping[str, Any]) -> np.ndarray:
    if segment["deleted"] is None:
        return np.empty(0, np.int64)
    path = folder / segment["deleted"]
    rows = np.asarray(load_array(path))
    limit = segment["num_captions"]
    fits = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) > 0 and (np.diff(rows) > 0).all()
    if not fits or rows[0] < 0 or rows[-1] >= limit:
        raise ValueError(f"{path}: expected ascending rows below {limit} in int64.")
    return rows


def _live(deleted: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray | None:
    if not any(len(rows) for rows in deleted):
        return None
    kept = np.ones(sum(sizes), dtype=bool)
    start = 0
    for rows, size in zip(deleted, sizes, strict=True):
        kept[start + rows] = False
        start += size
    return np.flatnonzero(kept)


def check_file(path: Path, expected: Mapping[str, Any], verify: bool = True) -> None:
    """Refuses a file that is missing, or has another size or, with `verify`, another checksum than expected."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, the datastore is incomplete.")
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(
            f"{path}: has {path.stat().st_size} bytes, expected {expected['bytes']}: truncated or not of this "
            "datastore."
        )
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
    """Hash over all that a manifest says but the hash itself."""
    contents = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def parse_manifest(path: Path, text: str) -> dict[str, Any]:
    """What a manifest says, its types and names checked, version 1 in the words of version 2.

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
            manifest = _from_version_1(manifest)
        defaults = {"index": None, "report": None, "generation": 0, "keys": TEXT_KEYS}
        manifest = {**defaults, **manifest, "checksum": manifest["checksum"]}
        check_keys(manifest["keys"])
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
    """Every file that is used is listed with its checksum, and lies in this very folder."""
    if not manifest["segments"]:
        raise ValueError(f"{path}: the datastore has no segment.")
    used = []
    for segment in manifest["segments"]:
        segment["num_captions"] = int(segment["num_captions"])
        used += [(kind, segment[kind]) for kind in ("captions", "embeddings", "deleted")]
    if manifest["index"] is not None:
        used.append(("index", manifest["index"]["file"]))
    used = [(kind, name) for kind, name in used if name is not None]
    for kind, name in used:
        if not isinstance(name, str) or not re.fullmatch(rf"{kind}(-[0-9a-f]{{16}})?\.{FILE_KINDS[kind]}", name):
            raise ValueError(f"{path}: {name!r} cannot be the name of a datastore's {kind}.")
    if {name for _, name in used} != set(manifest["files"]):
        raise ValueError(f"{path}: the files that are used and those that have a checksum differ.")
    manifest["files"] = {
        name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in manifest["files"].items()
    }


def _from_version_1(manifest: Mapping[str, Any]) -> dict[str, Any]:
    segment = {
        "captions": CAPTIONS_NAME,
        "embeddings": EMBEDDINGS_NAME,
        "num_captions": manifest["num_captions"],
        "deleted": None,
    }
    return {**manifest, "dtype": "float32", "segments": [segment], "checksum": None}


__all__ = ["CaptionRecords", "LiveEmbeddings", "LiveRows", "OpenedFiles", "open_files", "read_reference"]
