"""Edits of a datastore in its folder: atomic, one writer at a time, at the cost of what changes.

New captions become a segment of their own; only segments at most twice as large are merged with it, so that adding
one caption a thousand times leaves a dozen segments and rewrites each caption about ten times. Removed captions become
tombstones, and leave the disk when their segment is rewritten (`purge` does it at once).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.data.clip_ids import normalize_clip_id, normalize_text
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS, LiveEmbeddings, LiveRows, OpenedFiles, open_files
from recap_hf.modeling.datastore_milvus_recap import is_milvus_name
from recap_hf.modeling.datastore_writing_recap import (
    add_file,
    delete_leftovers,
    locked,
    write_manifest,
    write_segment,
)
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, EXACT_UP_TO, build_index
from .milvus_editing import add_to_milvus, refuse_milvus, remove_from_milvus

# Captions beside the index are searched exactly; when they are more than this share of it, it is made again.
_UNINDEXED_SHARE = 0.2
_LOCK_TIMEOUT_S = 10.0
_CHUNK_CAPTIONS = 8192


@dataclass(frozen=True)
class Selection:
    """Captions to remove: those that any of the conditions names.

    Args:
        clip_ids: of these clips, however the ids are spelt.
        texts: with one of these texts, case and punctuation folded.
        sources, licences, splits: with these values.
        rows: at these places of the datastore as it is.
    """

    clip_ids: Sequence[str] = ()
    texts: Sequence[str] = ()
    sources: Sequence[str] = ()
    licences: Sequence[str] = ()
    splits: Sequence[str] = ()
    rows: Sequence[int] = ()

    def matcher(self, num_rows: int) -> Callable[[int, dict[str, Any]], bool]:
        """Whether a row with its record is named.

        Raises:
            ValueError: if no condition is given, or a row is not there.
        """
        if not any(vars(self).values()):
            raise ValueError("Nothing says which captions to remove: give clip ids, texts, sources, ..., or rows")
        wrong = [row for row in self.rows if not 0 <= row < num_rows]
        if wrong:
            raise ValueError(f"There is no row {wrong[0]}: the datastore has {num_rows}, counted from 0")
        clip_ids = {normalize_clip_id(each) for each in self.clip_ids}
        texts = {normalize_text(each) for each in self.texts}
        values = {"source": set(self.sources), "licence": set(self.licences), "split": set(self.splits)}
        rows = set(self.rows)

        def matches(row: int, record: dict[str, Any]) -> bool:
            clip_id = record.get("clip_id")
            return (
                row in rows
                or (bool(clip_ids) and clip_id is not None and normalize_clip_id(clip_id) in clip_ids)
                or (bool(texts) and normalize_text(record["caption"]) in texts)
                or any(record.get(key) in wanted for key, wanted in values.items() if wanted)
            )

        return matches


class Edit:
    """A datastore while its one writer changes it; nothing is seen before `commit`."""

    def __init__(self, folder: Path, opened: OpenedFiles) -> None:
        self.folder = folder
        self.opened = opened
        self.manifest = opened.manifest
        self.segments: list[dict[str, Any]] = list(self.manifest["segments"])
        self.files: dict[str, Any] = dict(self.manifest["files"])
        self.index = self.manifest["index"]

    def parts(self, number: int) -> tuple[Any, Any]:
        """Records and embeddings of one of the opened segments, removed ones left out."""
        several = isinstance(self.opened.embeddings, LiveEmbeddings)
        if not several:
            return self.opened.records, self.opened.embeddings
        start, end = self.opened.embeddings.starts[number : number + 2]
        live = None
        if self.opened.live is not None:
            live = self.opened.live[(self.opened.live >= start) & (self.opened.live < end)] - start
        parts = self.opened.records.parts[number], self.opened.embeddings.parts[number]
        return LiveRows([parts[0]], live), LiveEmbeddings([parts[1]], live)

    @property
    def num_indexed(self) -> int:
        return self.index["num_rows"] if self.index else 0

    def append(self, records: Sequence[dict[str, Any]], embeddings: Any) -> None:
        """Adds a segment; small ones before it are merged into it."""
        gathered = [(records, embeddings)]
        size = len(records)
        ends = np.cumsum([segment["num_captions"] for segment in self.segments])
        while self.segments and ends[len(self.segments) - 1] > self.num_indexed:
            part = self.parts(len(self.segments) - 1)
            if len(part[0]) > 2 * size:
                break
            gathered.insert(0, part)
            size += len(part[0])
            self.segments.pop()
        self.write([part for part in gathered if len(part[0])])

    def write(self, parts: Sequence[tuple[Any, Any]]) -> None:
        """Writes records and embeddings as one segment, the last."""
        records = LiveRows([part[0] for part in parts])
        embeddings = LiveEmbeddings([part[1] for part in parts])
        self.segments.append(write_segment(self.folder, records, embeddings, self.files, self.manifest["dtype"]))

    def delete(self, positions: np.ndarray) -> None:
        """Marks positions, counted over all segments, as removed; a segment that is half empty is written again."""
        ends = np.cumsum([segment["num_captions"] for segment in self.segments])
        kept = []
        for number, (segment, end) in enumerate(zip(self.segments, ends, strict=True)):
            start = int(end) - segment["num_captions"]
            rows = positions[(positions >= start) & (positions < end)] - start
            if not len(rows):
                kept.append(segment)
                continue
            live = records_live(self.parts(number)[0])
            left = np.setdiff1d(np.arange(segment["num_captions"]) if live is None else live, rows)
            if start < self.num_indexed or 2 * len(left) >= segment["num_captions"]:
                gone = np.setdiff1d(np.arange(segment["num_captions"]), left).astype(np.int64)
                kept.append({**segment, "deleted": self._write_tombstones(gone)})
            elif len(left):
                records, embeddings = self._whole(number)
                parts = LiveRows([records], left), LiveEmbeddings([embeddings], left)
                kept.append(write_segment(self.folder, *parts, self.files, self.manifest["dtype"]))
        self.segments = kept

    def _whole(self, number: int) -> tuple[Any, Any]:
        if isinstance(self.opened.embeddings, LiveEmbeddings):
            return self.opened.records.parts[number], self.opened.embeddings.parts[number]
        return self.opened.records, self.opened.embeddings

    def _write_tombstones(self, rows: np.ndarray) -> str:
        temporary = self.folder / f".deleted.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, rows, allow_pickle=False)
        return add_file(self.folder, "deleted", temporary, self.files)

    def commit(self, num_captions: int, **changes: Any) -> None:
        """Makes the edit visible, at once."""
        if not num_captions:
            raise ValueError(f"{self.folder}: the edit would leave no caption; delete the folder instead")
        used = {segment[kind] for segment in self.segments for kind in ("captions", "embeddings", "deleted")}
        used |= {self.index["file"]} if self.index else set()
        write_manifest(
            self.folder,
            {
                **self.manifest,
                "num_captions": num_captions,
                "segments": self.segments,
                "index": self.index,
                **changes,
                "files": {name: entry for name, entry in self.files.items() if name in used},
            },
        )


def records_live(records: Any) -> np.ndarray | None:
    """Positions in a segment that are left, `None` for all."""
    return records.live if isinstance(records, LiveRows) else None


@contextmanager
def editing(folder: str | Path) -> Iterator[Edit]:
    """Holds the datastore's lock, and clears away what an edit that was cut off has left.

    Raises:
        OSError: there is no datastore, or another process is writing it. ValueError: it is damaged.
    """
    refuse_milvus(folder)
    folder = Path(folder)
    open_files(folder, verify=False)
    with locked(folder, _LOCK_TIMEOUT_S):
        opened = open_files(folder, verify=False)
        delete_leftovers(folder, opened.manifest["files"])
        yield Edit(folder, opened)


def add_captions(
    folder: str | Path,
    records: Iterable[dict[str, Any]],
    embedder: Any,
    filter_options: FilterOptions | None = None,
    index: str = "auto",
) -> dict[str, Any]:
    """Adds captions; what is there already is neither embedded nor written again.

    Args:
        folder: of the datastore, or `milvus:URI#COLLECTION`.
        records: with a `caption` and what else is known (see [`read_source`]).
        embedder ([`CaptionEmbedder`]): of the encoder that made the datastore.
        filter_options: which are left out; duplicates are told from the datastore's captions too.
        index: "auto" makes the index again when much is not in it, "keep" never.

    Returns:
        The report of the filter, with `added`.
    """
    if is_milvus_name(folder):
        return add_to_milvus(str(folder), records, embedder, filter_options)
    options = filter_options or FilterOptions()
    with editing(folder) as edit:
        _require_text_keys(edit, "captions cannot be added to a datastore keyed by audio")
        check_fingerprint(edit.opened, embedder.fingerprint)
        known = edit.opened.records if options.duplicates != "keep" else ()
        caption_filter = CaptionFilter(options, embedder.count_tokens, known)
        kept = list(caption_filter.filter(records))
        report = caption_filter.report() | {"added": len(kept)}
        if kept:
            edit.append(kept, embedder.embed([record["caption"] for record in kept]))
            edit.commit(edit.manifest["num_captions"] + len(kept))
    if kept and index == "auto":
        refresh_index(folder)
    return report


def _require_text_keys(edit: Edit, problem: str) -> None:
    if edit.manifest["keys"] == AUDIO_KEYS:
        raise ValueError(
            f"{edit.folder}: {problem}: it finds captions by the audio of their clips, and a text has no such key. "
            "Build it again from the recordings: recap datastore build --keys audio"
        )


def check_fingerprint(opened: OpenedFiles, fingerprint: np.ndarray | None) -> None:
    """Refuses embeddings of another encoder than the opened datastore's."""
    if fingerprint is None:
        if opened.manifest["fingerprint"] is not None:
            raise ValueError(f"{opened.folder}: it says which encoder made it, what is to be added does not")
        return
    probe = CaptionDatastore.from_embeddings(
        ["probe"], np.ones((1, opened.manifest["dimension"])), opened.manifest["fingerprint"]
    )
    probe.check_encoder(np.asarray(fingerprint, dtype=np.float32))


def remove_captions(folder: str | Path, selection: Selection, purge: bool = False) -> int:
    """Removes captions, and returns how many.

    Args:
        folder: of the datastore, or `milvus:URI#COLLECTION`.
        selection: which.
        purge: delete their texts and embeddings from the disk too, now: the datastore is written again as one
            segment, and an index made again.
    """
    if is_milvus_name(folder):
        return remove_from_milvus(str(folder), selection)
    with editing(folder) as edit:
        matches = selection.matcher(len(edit.opened.records))
        rows = np.array(
            [row for row, record in enumerate(edit.opened.records) if matches(row, record)], dtype=np.int64
        )
        removed = _remove_rows(edit, np.array(rows, dtype=np.int64))
    if removed and purge:
        compact(folder)
    return removed


def _remove_rows(edit: Edit, rows: np.ndarray) -> int:
    if len(rows):
        live = edit.opened.live
        edit.delete(rows if live is None else live[rows])
        edit.commit(edit.manifest["num_captions"] - len(rows))
    return len(rows)


def filter_datastore(
    folder: str | Path, options: FilterOptions, count_tokens: Callable[[list[str]], Sequence[int]] | None = None
) -> dict[str, Any]:
    """Removes what the filters leave out, and returns their report with `removed`."""
    with editing(folder) as edit:
        caption_filter = CaptionFilter(options, count_tokens)
        numbered = ({**record, "__row": row} for row, record in enumerate(edit.opened.records))
        kept = np.array([record["__row"] for record in caption_filter.filter(numbered)], dtype=np.int64)
        rows = np.setdiff1d(np.arange(len(edit.opened.records)), kept)
        return caption_filter.report() | {"removed": _remove_rows(edit, rows)}


def merge_datastores(folder: str | Path, others: Sequence[str | Path], index: str = "auto") -> int:
    """Adds the captions of other datastores of the same encoder, with their embeddings; returns how many."""
    for each in (folder, *others):
        refuse_milvus(each)
    opened = [open_files(Path(other)) for other in others]
    with editing(folder) as edit:
        for each in opened:
            if each.manifest["dimension"] != edit.manifest["dimension"]:
                raise ValueError(
                    f"{each.folder} has embeddings of dimension {each.manifest['dimension']}, {folder} of "
                    f"{edit.manifest['dimension']}: they were made by different encoders. Move one to the other's by "
                    "`recap datastore reembed`"
                )
            if each.manifest["keys"] != edit.manifest["keys"]:
                raise ValueError(
                    f"{each.folder} is keyed by {each.manifest['keys']}, {folder} by {edit.manifest['keys']}: keys of "
                    "two kinds cannot be searched together"
                )
            check_fingerprint(edit.opened, _array(each.manifest["fingerprint"]))
        # As one segment, so that all of them come in at once.
        edit.append(LiveRows([each.records for each in opened]), LiveEmbeddings([each.embeddings for each in opened]))
        added = sum(len(each.records) for each in opened)
        edit.commit(edit.manifest["num_captions"] + added)
    if index == "auto":
        refresh_index(folder)
    return added


def _array(fingerprint: Any) -> np.ndarray | None:
    return None if fingerprint is None else np.asarray(fingerprint, dtype=np.float32)


def reembed_datastore(
    folder: str | Path, embedder: Any, progress: Callable[[str], None] = lambda message: None
) -> None:
    """Moves a datastore to another encoder: the same captions, embedded again, and an index of the size's kind."""
    with editing(folder) as edit:
        _require_text_keys(
            edit, "a datastore keyed by audio cannot be moved to another encoder without its recordings"
        )
        records = edit.opened.records
        path = Path(folder) / f".reembedded.{os.getpid()}.tmp"
        shape = (len(records), embedder.fingerprint.shape[1])
        embeddings = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, len(records), _CHUNK_CAPTIONS):
            captions = [record["caption"] for record in records[start : start + _CHUNK_CAPTIONS]]
            embeddings[start : start + len(captions)] = embedder.embed(captions)
            progress(f"Embedded {start + len(captions)} of {len(records)} captions")
        had_index = edit.index is not None
        edit.segments, edit.index = [], None
        edit.write([(records, embeddings)])
        search_index = build_index(embeddings) if had_index or len(records) > EXACT_UP_TO else None
        edit.index = None if search_index is None else search_index.write(edit.folder, edit.files)
        fingerprint = embedder.fingerprint.astype(float).round(7).tolist()
        edit.commit(len(records), dimension=shape[1], fingerprint=fingerprint)


def compact(folder: str | Path) -> None:
    """Writes what is left as one segment, and makes the index again where there was one."""
    with editing(folder) as edit:
        description = edit.index
        edit.segments, edit.index = [], None
        edit.write([(edit.opened.records, edit.opened.embeddings)])
        edit.commit(len(edit.opened.records))
    if description is not None:
        index_datastore(folder, **_as_wanted(description))


def index_datastore(
    folder: str | Path, kind: str = "auto", recall: float = DEFAULT_RECALL, checkpoint: Path | None = None
) -> dict[str, Any] | None:
    """Makes the index of a datastore anew, or removes it (`exact`); returns its description.

    Args:
        kind, recall, checkpoint: see [`build_index`].
    """
    with editing(folder) as edit:
        embeddings = edit.opened.embeddings
        if edit.opened.live is not None:
            # Positions of an index are those of the files.
            edit.segments = []
            edit.write([(edit.opened.records, embeddings)])
        search_index = build_index(embeddings, kind, recall, checkpoint=checkpoint)
        edit.index = None if search_index is None else search_index.write(edit.folder, edit.files)
        report = {**(edit.manifest["report"] or {}), "exact_search": kind == "exact"}
        edit.commit(len(edit.opened.records), report=report)
        return None if search_index is None else search_index.description


def refresh_index(folder: str | Path) -> None:
    """Makes the index again where many captions are not in it, or the datastore has outgrown the exact search."""
    manifest = open_files(Path(folder), verify=False).manifest
    description = manifest["index"]
    positions = sum(segment["num_captions"] for segment in manifest["segments"])
    if description is None:
        if positions > EXACT_UP_TO and not (manifest["report"] or {}).get("exact_search"):
            index_datastore(folder)
    elif positions - description["num_rows"] > max(EXACT_UP_TO, _UNINDEXED_SHARE * description["num_rows"]):
        index_datastore(folder, **_as_wanted(description))


def _as_wanted(description: dict[str, Any]) -> dict[str, Any]:
    """The kind and recall that an index was asked for."""
    return {
        "kind": description.get("wanted_kind", description["kind"]),
        "recall": description.get("wanted_recall", DEFAULT_RECALL),
    }


__all__ = [
    "Selection",
    "add_captions",
    "compact",
    "filter_datastore",
    "index_datastore",
    "merge_datastores",
    "reembed_datastore",
    "remove_captions",
]
