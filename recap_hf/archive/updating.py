"""Bringing a sound index up to date: what changed is encoded, and saved every few seconds in one step each."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.datastore.editing import Edit, editing, index_datastore
from recap_hf.datastore.files import fingerprint_entry, locked, publish, write_new
from recap_hf.datastore.indexing import EXACT_UP_TO
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS, MANIFEST_NAME, sha256
from recap_hf.modeling.retrieval_recap import CaptionDatastore
from recap_hf.recordings import expand_inputs, reason_of

from .encoder import Places, SoundEncoder

# An update is saved after this many seconds, and no more often than the share of its time that saving may take.
_SAVED_EVERY_S, _SAVING_SHARE = 10.0, 0.05
# Up to here exact search of vectors of 256 dimensions takes half a millisecond.
_SEARCHED_EXACTLY = 10_000
# What the system refuses, or an absent package, may be there the next time.
_PASSING = (OSError, ImportError)
_NEVER = (-1, -1)
SILENCE = "silence"

# How many recordings of how many are done, the path of the last, and why it could not be read (else `None`).
Progress = Callable[[int, int, str, str | None], None]
# From what `SoundEncoder.of` takes to an encoder.
Loader = Callable[[Any], SoundEncoder]
# Size in bytes and time of change in ns.
Stat = tuple[int, int]


@dataclass(frozen=True)
class _Recorded:
    """A recording in the index: its rows, and its file as it was."""

    rows: range
    stat: Stat
    sha256: str


def update_index(
    root: Path, path: Path, source: Any, overwrite: bool, progress: Progress, loader: Loader
) -> tuple[dict[str, int], Any]:
    """See [`SoundIndex.update`]; the second result is the encoder, or what stands for it where none was needed."""
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: no such folder; a sound index is one of a folder of recordings")
    found = {Path(name).relative_to(root).as_posix(): _stat(name) for name in expand_inputs([str(root)])}
    exists = (path / MANIFEST_NAME).is_file()
    made_by = None
    if exists:
        store = CaptionDatastore.open_folder(path, verify=False)
        made_by = encoder_of(path, store)
        if not overwrite:
            check_folder(store, path, root)
    if overwrite or not exists:
        source = loader(made_by if source is None else source)
        _create(path, source)
    with editing(path) as edit:
        update = _Update(root, edit, found)
        source = made_by if source is None else source
        pending = update.reuse()
        if pending:
            source = loader(source)
            check_encoder(edit.store, source)
            update.encode(pending, source, progress)
        done = update.report()
    _index_if_large(path, done["places"])
    return done, source


def encoder_of(path: Path, store: CaptionDatastore) -> str:
    """The model that made the index at `path`. Raises `ValueError` for a datastore that is none."""
    report = store.manifest["report"]
    if not isinstance(report, dict) or not {"left_out", "model"} <= set(report):
        raise ValueError(f"{path}: holds a datastore of captions, not a sound index; give another folder")
    return report["model"]


def check_folder(store: CaptionDatastore, path: Path, root: Path) -> None:
    """Refuses an index that another folder has: an update would drop its recordings, a search name files that are not
    there. A folder that was moved has most of them, and one that holds its index is the index's.

    Raises:
        `ValueError`
    """
    made_of = store.manifest["report"].get("folder")
    inside = path.resolve().is_relative_to(root.resolve())
    if inside or made_of in (None, str(root.resolve())):
        return
    names = {record["caption"] for record in store.records}
    if 2 * sum((root / name).is_file() for name in names) < len(names):
        hint = f"Give {root} an --index of its own, or --overwrite this one"
        raise ValueError(f"{path}: is the sound index of {made_of}, whose recordings are not in {root}. {hint}")


def _stat(name: str) -> Stat:
    try:
        found = os.stat(name)
    except OSError:
        return _NEVER
    return found.st_size, found.st_mtime_ns


def _create(path: Path, encoder: SoundEncoder) -> None:
    """An index without recordings."""
    path.mkdir(parents=True, exist_ok=True)
    shape = (0, encoder.fingerprint.shape[1])
    with locked(path):
        contents = {
            "num_captions": 0,
            "dimension": shape[1],
            "keys": AUDIO_KEYS,
            "dtype": "float32",
            "fingerprint": fingerprint_entry(encoder.fingerprint),
            "report": {"model": encoder.name, "left_out": {}},
        }
        publish(path, contents, write_new(path, [], [], shape, "float32"))


def check_encoder(store: CaptionDatastore, encoder: SoundEncoder) -> None:
    """Refuses an encoder that did not make an index.

    Raises:
        `ValueError`
    """
    try:
        store.check_encoder(encoder.fingerprint)
    except ValueError as error:
        made = store.manifest["report"]["model"] or "the one in the package"
        hint = "give that one, or make the index again by recap index --overwrite"
        raise ValueError(f"Another CLAP made this sound index ({made}): {hint}") from error


def _index_if_large(path: Path, places: int) -> None:
    """An approximate index where there are many places, trained again when a fifth was added or went."""
    about = CaptionDatastore.open_folder(path, verify=False).index
    trained = (about or {}).get("trained_rows", 0)
    if places > _SEARCHED_EXACTLY and abs(places - trained) > 0.2 * trained:
        index_datastore(path, "auto" if places > EXACT_UP_TO else "ivf_sq8")


class _Update:
    """An update of an index that is being edited.

    Args:
        root: the archive.
        edit: of its index.
        found: the recordings that the archive has, by name.
    """

    def __init__(self, root: Path, edit: Edit, found: dict[str, Stat]) -> None:
        self.root, self.edit, self.found = root, edit, found
        self.recorded = _recorded(edit.store)
        # Recordings without places: size, time and reason by name.
        left_out = edit.store.manifest["report"]["left_out"]
        self.left_out = {name: entry for name, entry in left_out.items() if name in found}
        self.unchanged = [name for name, each in self.recorded.items() if found.get(name) == each.stat]
        self.removed = len(self.recorded.keys() - found.keys())
        self.reused = self.encoded = 0

    def reuse(self) -> list[str]:
        """Drops what is gone and takes over what is known by its contents; returns what must be encoded."""
        unchanged = set(self.unchanged)
        pending = [name for name in self.found if name not in unchanged and not self._is_left_out(name)]
        sizes = {each.stat[0] for each in self.recorded.values()}
        by_contents = {each.sha256: each for each in self.recorded.values()}
        left, lines, rows = [], [], []
        for name in pending:
            digest = _hash(self.root / name) if self.found[name][0] in sizes else None
            if digest not in by_contents:
                left.append(name)
                continue
            known = by_contents[digest]
            records = [self.edit.store.records[row] for row in known.rows]
            spans = [(record["start"], record["end"]) for record in records]
            lines += _lines(name, spans, self.found[name], digest)
            rows += known.rows
            self.left_out.pop(name, None)
            self.reused += 1
        kept = [row for name in self.unchanged for row in self.recorded[name].rows]
        vectors = self.edit.store.embeddings[np.array(rows, dtype=np.int64)]
        self._commit(None if len(kept) == len(self.edit.store) else np.array(kept, dtype=np.int64), lines, vectors)
        return left

    def _is_left_out(self, name: str) -> bool:
        entry = self.left_out.get(name)
        return entry is not None and tuple(entry[:2]) == self.found[name] != _NEVER

    def encode(self, names: list[str], encoder: SoundEncoder, progress: Progress) -> None:
        """Encodes recordings and adds them to the index, which is saved now and then and at the end."""
        lines, vectors = [], [np.zeros((0, encoder.fingerprint.shape[1]), np.float32)]
        saved, due = time.monotonic(), _SAVED_EVERY_S
        paths = [str(self.root / name) for name in names]
        for done, (path, places) in enumerate(encoder.embed_places(paths), 1):
            name = names[done - 1]
            added, problem = self._added(name, path, places)
            lines += added
            if added:
                vectors.append(places.vectors)
            progress(done, len(names), path, problem)
            if time.monotonic() - saved >= due or done == len(names):
                started = time.monotonic()
                self._commit(None, lines, np.concatenate(vectors))
                lines, vectors, saved = [], vectors[:1], time.monotonic()
                due = max(_SAVED_EVERY_S, (saved - started) / _SAVING_SHARE)

    def _added(self, name: str, path: str, places: Places | Exception) -> tuple[list[bytes], str | None]:
        """The lines of a recording, none where it has no places, and why it cannot be read."""
        stat, problem = self.found[name], places if isinstance(places, Exception) else None
        if problem is None and places.spans:
            try:
                lines = _lines(name, places.spans, stat, sha256(Path(path)))
            except OSError as error:
                problem = error
            else:
                self.left_out.pop(name, None)
                self.encoded += 1
                return lines, None
        reason = SILENCE if problem is None else reason_of(path, problem)
        self.left_out[name] = [*(_NEVER if isinstance(problem, _PASSING) else stat), reason]
        return [], None if problem is None else reason

    def _commit(self, kept: np.ndarray | None, lines: list[bytes], vectors: np.ndarray) -> None:
        before = self.edit.store.manifest["report"]
        if kept is None and not lines and self.left_out == before["left_out"]:
            return
        report = {**before, "left_out": self.left_out, "folder": str(self.root.resolve())}
        self.edit.commit(kept, [(lines, vectors)], "keep", report=report)
        self.edit.store = CaptionDatastore.open_folder(self.edit.folder, verify=False)

    def report(self) -> dict[str, int]:
        """What was done; see [`SoundIndex`]."""
        unchanged, unreadable = len(self.unchanged), sum(entry[2] != SILENCE for entry in self.left_out.values())
        return {
            "recordings": unchanged + self.reused + self.encoded,
            "places": len(self.edit.store),
            "encoded": self.encoded,
            "reused": self.reused,
            "unchanged": unchanged,
            "removed": self.removed,
            "unreadable": unreadable,
        }


def _recorded(store: CaptionDatastore) -> dict[str, _Recorded]:
    """The recordings of an index by name; the rows of each follow each other."""
    starts = [(row, record) for row, record in enumerate(store.records) if "sha256" in record]
    ends = [*(row for row, _ in starts[1:]), len(store)][: len(starts)]
    return {
        record["caption"]: _Recorded(range(row, end), (record["size"], record["mtime_ns"]), record["sha256"])
        for (row, record), end in zip(starts, ends, strict=True)
    }


def _lines(name: str, spans: Iterable[tuple[float, float]], stat: Stat, digest: str) -> list[bytes]:
    """The rows of a recording. In ASCII: the name of a file may be no UTF-8."""
    return [json.dumps(record).encode("ascii") + b"\n" for record in _records(name, spans, stat, digest)]


def _records(name: str, spans: Iterable[tuple[float, float]], stat: Stat, digest: str) -> Iterator[dict[str, Any]]:
    about = {"size": stat[0], "mtime_ns": stat[1], "sha256": digest}
    for start, end in spans:
        yield {"caption": name, "start": start, "end": end, **about}
        about = {}


def _hash(path: Path) -> str | None:
    """The hash of a file, `None` where it cannot be read: that is reported when it is to be encoded."""
    try:
        return sha256(path)
    except OSError:
        return None
