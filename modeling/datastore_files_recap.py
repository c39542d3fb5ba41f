"""The files of a caption datastore, read: records, embeddings and the manifest; and their download from the Hub.

A folder holds `datastore.json` (the manifest), captions (JSON lines), embeddings (NumPy) and perhaps an index. No file
is ever changed: a writer adds new files, replaces the manifest at once and deletes the old files. A reader opens the
datastore before the edit or after it, and one that has the old files open keeps them. All names in the manifest are
plain file names, all files are compared with their checksums, nothing is unpickled.

The package `recap_hf` writes datastores, and reads formats 1 and 2.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

from .index_recap import from_package, open_index

FORMAT_VERSION = 3
MANIFEST_NAME = "datastore.json"
EMBEDDING_TYPES = ("float32", "float16", "int8")
# What the embeddings of a datastore are of: its captions, or the recordings that they describe.
TEXT_KEYS, AUDIO_KEYS = KEYS = ("text", "audio")
# Names without a hash are those of a first version in its folder; only earlier formats have `deleted`.
_SUFFIXES = {"captions": "jsonl", "embeddings": "npy", "deleted": "npy", "index": "(faiss|bin|npy)"}
FILE_NAMES = {kind: re.compile(rf"{kind}(-[0-9a-f]{{16}})?\.{suffix}") for kind, suffix in _SUFFIXES.items()}
_MAX_TRIES = 100
# Audio, and the features that published lists name in its place.
_AUDIO_SUFFIX = re.compile(r"\.(wav|flac|mp3|ogg|opus|m4a|webm|mp4|mkv|aiff?|au|caf|wma|aac|npy)$", re.IGNORECASE)
# AudioSet releases put a Y before the 11 characters of a YouTube id.
_YOUTUBE_PREFIX = re.compile(r"^Y(?=[A-Za-z0-9_-]{11}$)")


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


def decode_int8(codes: np.ndarray) -> np.ndarray:
    """Unit vectors in float32 of rows of int8."""
    vectors = np.asarray(codes, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


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


def normalize_text(text: str) -> str:
    """A caption without case, punctuation and repeated white space, for comparison ("a dog barks")."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if char.isalnum() else " " for char in folded).split())


def normalize_clip_id(clip_id: Any) -> str:
    """A clip id without folder, audio suffix, AudioSet's Y, case and punctuation, for comparison.

    >>> normalize_clip_id("development/Santa Motor.wav") == normalize_clip_id("Santa_Motor")
    True
    """
    name = str(clip_id).replace("\\", "/").rpartition("/")[2]
    return normalize_text(_YOUTUBE_PREFIX.sub("", _AUDIO_SUFFIX.sub("", name))) or name


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
        `ImportError`: for a datastore of format 1 or 2 where `recap_hf` is not installed.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not a datastore, it has no {MANIFEST_NAME}. Write one with CaptionDatastore.save_pretrained "
            "or `recap datastore build`."
        )
    for _ in range(_MAX_TRIES):
        data = path.read_bytes()
        try:
            return _open_once(path, data, verify)
        except FileNotFoundError:
            # The file was there when the manifest was written: a writer has replaced it, or it is lost.
            if path.read_bytes() == data:
                raise
    raise OSError(f"{folder}: the datastore was replaced {_MAX_TRIES} times while it was being opened. Try again.")


def _open_once(path: Path, data: bytes, verify: bool) -> Opened:
    try:
        manifest = json.loads(data.decode("utf-8"))
        version = manifest["format_version"]
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            known = f"this package reads up to {FORMAT_VERSION}. Update it: pip install -U recap-hf"
            raise ValueError(f"{path}: the datastore has format version {version}, {known}")
        if version < FORMAT_VERSION:
            what = f"{path}: a datastore of format {version}"
            return from_package("datastore.earlier_formats", what).open_earlier(path, manifest, verify)
        used = [(kind, manifest[kind]) for kind in ("captions", "embeddings")]
        manifest = check_manifest(path, manifest, used)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: not the description of a caption datastore ({error!r}).") from error
    check_files(path, manifest, json.loads(data), verify)
    records, embeddings = open_pair(path, manifest, manifest, manifest["num_captions"])
    return records, embeddings, open_index(path.parent, manifest), manifest


def check_manifest(path: Path, manifest: Mapping[str, Any], used: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A manifest with its defaults; types and names are checked.

    Args:
        path: of the manifest, for messages.
        manifest: its contents.
        used: kind and name of the files with captions and embeddings.

    Raises:
        `ValueError`: naming `path` and what is wrong. `KeyError`, `TypeError`, `AttributeError`: if it is none.
    """
    defaults = {"index": None, "report": None, "generation": 0, "keys": TEXT_KEYS}
    manifest = {**defaults, **manifest, "checksum": manifest["checksum"]}
    if manifest["keys"] not in KEYS:
        raise ValueError(f"{path}: the keys of a datastore are 'text' or 'audio', got {manifest['keys']!r}.")
    manifest["num_captions"], manifest["dimension"] = int(manifest["num_captions"]), int(manifest["dimension"])
    if manifest["dtype"] not in EMBEDDING_TYPES or manifest["dimension"] < 1:
        raise ValueError(f"{path}: expected embeddings in {' or '.join(EMBEDDING_TYPES)} of a positive dimension.")
    if manifest["index"] is not None:
        used = [*used, ("index", manifest["index"]["file"])]
    for kind, name in used:
        if not isinstance(name, str) or not FILE_NAMES[kind].fullmatch(name):
            raise ValueError(f"{path}: {name!r} cannot be the name of a datastore's {kind}.")
    if {name for _, name in used} != set(manifest["files"]):
        raise ValueError(f"{path}: the files that are used and those that have a checksum differ.")
    files = manifest["files"].items()
    manifest["files"] = {name: {"bytes": int(one["bytes"]), "sha256": str(one["sha256"])} for name, one in files}
    if manifest["fingerprint"] is not None:
        units = np.asarray(manifest["fingerprint"], dtype=np.float64)
        if units.shape[1:] != (manifest["dimension"],) or not np.abs(units).max() <= 1.01:
            raise ValueError(f"{path}: the fingerprint is not of unit vectors of {manifest['dimension']} dimensions.")
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any], written: Mapping[str, Any], verify: bool) -> None:
    """Refuses a manifest that was changed, and files that are missing or have another size or, with `verify`, another
    checksum than `manifest` says; `written` is the manifest as it is in the file."""
    for name, expected in manifest["files"].items():
        file = path.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, the datastore is incomplete.")
        size, whole = file.stat().st_size, expected["bytes"]
        if size != whole:
            raise ValueError(f"{file}: has {size} bytes, expected {whole}: truncated or not of this datastore.")
        if verify and sha256(file) != expected["sha256"]:
            raise ValueError(f"{file}: the checksum differs, the file was changed or damaged after it was written.")
    if manifest["checksum"] is not None and manifest["checksum"] != manifest_checksum(written):
        raise ValueError(f"{path}: the checksum differs, the description was changed or damaged after it was written.")


def open_pair(path: Path, manifest: Mapping[str, Any], names: Any, count: int) -> tuple[CaptionRecords, Any]:
    """Records and embeddings, `count` of each, in the files that `names` gives."""
    embeddings, shape = open_embeddings(path.parent / names["embeddings"]), (count, manifest["dimension"])
    try:
        records = CaptionRecords.open(path.parent / names["captions"], count)
    except ValueError as error:
        raise ValueError(f"{path}: announces {count} captions, but {error}") from error
    if embeddings.shape != shape or embeddings.dtype != np.dtype(manifest["dtype"]):
        raise ValueError(
            f"{path}: announces {count} captions of dimension {shape[1]} in {manifest['dtype']}, but there are "
            f"embeddings of shape {embeddings.shape} in {embeddings.dtype}."
        )
    return records, embeddings


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
    except Exception as error:
        # Whatever Python's parser raises of a header.
        raise ValueError(f"{path}: not a NumPy array ({error}).") from error


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Hash over all contents of a manifest but the hash itself."""
    contents = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def copy_files(source: Path, target: Path) -> None:
    """Copies a datastore as it is, the manifest last."""
    text = (source / MANIFEST_NAME).read_text(encoding="utf-8")
    if not (target / MANIFEST_NAME).is_file() or (target / MANIFEST_NAME).read_text(encoding="utf-8") != text:
        target.mkdir(parents=True, exist_ok=True)
        for name in (*json.loads(text)["files"], MANIFEST_NAME):
            shutil.copyfile(source / name, target / f".{name}.tmp")
            os.replace(target / f".{name}.tmp", target / name)


def fetch_datastore(
    repo_id: str, *, repo_type: str | None = None, revision: str | None = None, subfolder: str = "", **kwargs: Any
) -> Path:
    """Downloads a datastore into the Hub's cache and returns its local folder.

    Args:
        repo_id: id of a dataset repository that is a datastore, or of a model repository that contains one.
        repo_type: "dataset" or "model"; None tries both, in this order.
        revision: branch, tag or commit id; default: main.
        subfolder: the folder inside; default: the root of a dataset, "datastore" of a model.
        kwargs: `token`, `cache_dir`, `local_files_only` and other arguments of `huggingface_hub.snapshot_download`.

    Raises:
        `OSError`: it cannot be downloaded; the message names repository, revision and what to do.
    """
    if Path(repo_id).is_file():
        raise NotADirectoryError(
            f"{repo_id}: a file, not the folder of a datastore. Make one of its captions: recap datastore build."
        )
    kinds = (repo_type,) if repo_type else ("dataset", "model")
    for kind in kinds:
        inside = subfolder or ("datastore" if kind == "model" else "")
        options = {"repo_type": kind, "allow_patterns": [f"{inside}/*"] if inside else None, **kwargs}
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

            # The Parquet files are for the viewer; the datastore does not read them.
            return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=["data/*"], **options), inside)
        except (OSError, ValueError) as error:
            absent = isinstance(error, (LocalEntryNotFoundError, RepositoryNotFoundError))
            if not absent or isinstance(error, GatedRepoError) or kind == kinds[-1]:
                place = f"{' or '.join(kinds)} repository {repo_id!r}, revision {revision or 'main'!r}"
                reason = " ".join(str(error).split())
                raise OSError(f"cannot load a datastore from the {place}: {reason}") from error
    raise AssertionError("unreachable: the last kind returns or raises")


def read_reference(path: Path) -> dict[str, str] | None:
    """Repository and revision of the datastore that a manifest only refers to, or `None` if it describes its own."""
    try:
        reference = json.loads(path.read_text(encoding="utf-8")).get("reference")
    except (OSError, ValueError, RecursionError, AttributeError):
        # No manifest: `open_files` says what is wrong with it.
        return None
    if reference is None:
        return None
    if not isinstance(reference, dict) or not {"repo_id", "revision"} <= reference.keys():
        raise ValueError(f"{path}: a reference must name 'repo_id' and 'revision', got {reference!r:.200}.")
    return {name: str(reference[name]) for name in ("repo_id", "revision")}


__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "fetch_datastore", "open_files", "read_reference"]
