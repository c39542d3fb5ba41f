"""Edits of a datastore in its folder: one writer at a time, and no moment at which a reader finds half of an edit.

An edit writes new files of captions and embeddings, in blocks, and switches the manifest. Rows that stay keep their
embeddings, and an index keeps what it has learnt. A reader that has opened the datastore before keeps its files, which
are deleted from the folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS, open_embeddings
from recap_hf.modeling.retrieval_recap import CaptionDatastore, normalize_clip_id, normalize_text

from .files import array_blocks, fingerprint_entry, locked, publish, write_new
from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, EXACT_UP_TO, build_index
from .milvus import MilvusCaptionDatastore, is_milvus_name, refuse_milvus

# An index that has grown or shrunk by this share since it was trained is trained again.
_RETRAINED_SHARE = 0.2
_LOCK_TIMEOUT_S = 10.0
_CHUNK_CAPTIONS = 8192


@dataclass(frozen=True)
class Selection:
    """Captions to remove: those that any of the conditions names.

    Args:
        clip_ids: of these clips, in any spelling of the ids.
        texts: with one of these texts, case and punctuation ignored.
        sources, licences, splits: with these values.
        rows: these rows.
    """

    clip_ids: Sequence[str] = ()
    texts: Sequence[str] = ()
    sources: Sequence[str] = ()
    licences: Sequence[str] = ()
    splits: Sequence[str] = ()
    rows: Sequence[int] = ()

    def find(self, records: Sequence[dict[str, Any]]) -> np.ndarray:
        """The rows that are named, ascending.

        Raises:
            ValueError: if no condition is given, or a row is not there.
        """
        if not any(len(each) for each in vars(self).values()):
            raise ValueError("Nothing says which captions to remove: give clip ids, texts, sources, ..., or rows")
        wrong = [row for row in self.rows if not 0 <= row < len(records)]
        if wrong:
            raise ValueError(f"There is no row {wrong[0]}: the datastore has {len(records)}, counted from 0")
        clip_ids = {normalize_clip_id(each) for each in self.clip_ids}
        texts = {normalize_text(each) for each in self.texts}
        values = {"source": self.sources, "licence": self.licences, "split": self.splits}

        def is_named(record: dict[str, Any]) -> bool:
            clip_id = record.get("clip_id")
            return (
                bool(clip_ids and clip_id is not None and normalize_clip_id(clip_id) in clip_ids)
                or bool(texts and normalize_text(record["caption"]) in texts)
                or any(record.get(key) in wanted for key, wanted in values.items() if wanted)
            )

        named = {row for row, record in enumerate(records) if is_named(record)}
        return np.array(sorted(named.union(self.rows)), dtype=np.int64)


@dataclass
class Edit:
    """A datastore while its one writer changes it; nothing is seen before `commit`. `store`: as it is."""

    folder: Path
    store: CaptionDatastore

    def commit(
        self, kept: np.ndarray | None = None, added: Sequence = (), index: str = "auto", **changes: Any
    ) -> None:
        """Makes the edit visible, at once.

        Args:
            kept: rows that stay, ascending; all by default.
            added: pairs of records and embeddings, put behind them.
            index: "auto" trains an index again where the size has changed much, "keep" never.
            changes: of the manifest.
        """
        store, manifest = self.store, self.store.manifest
        total = (len(store) if kept is None else len(kept)) + sum(len(part) for part, _ in added)
        dtype = manifest["dtype"]
        records = chain(store.records.lines(kept), *(part for part, _ in added))
        blocks = chain(array_blocks(store.embeddings, rows=kept), *(array_blocks(each, dtype) for _, each in added))
        new = write_new(self.folder, records, blocks, (total, store.dimension), dtype)
        search_index = self._changed_index(open_embeddings(new["embeddings"]), kept is None, index)
        publish(self.folder, {**manifest, "index": None, **changes, "num_captions": total}, new, search_index)

    def _changed_index(self, embeddings: Any, appended: bool, wanted: str) -> Any:
        index, about = self.store.search_index, self.store.index
        if about is None:
            exact = wanted == "keep" or _is_exact(self.store)
            return None if exact or len(embeddings) <= EXACT_UP_TO else build_index(embeddings)
        trained = about.get("trained_rows", index.num_rows)
        if wanted == "auto" and abs(len(embeddings) - trained) > max(EXACT_UP_TO, _RETRAINED_SHARE * trained):
            kind, recall = about.get("wanted_kind", about["kind"]), about.get("wanted_recall", DEFAULT_RECALL)
            return build_index(embeddings, kind, recall)
        index.refill(embeddings, appended)
        return index


def _is_exact(store: CaptionDatastore) -> bool:
    """Whether a datastore is to be searched exactly, whatever its size."""
    return bool((store.manifest["report"] or {}).get("exact_search"))


@contextmanager
def editing(folder: str | Path) -> Iterator[Edit]:
    """Holds the lock of a datastore while it is edited.

    Raises:
        OSError: there is no datastore, or another process is writing it. ValueError: it is damaged.
    """
    refuse_milvus(folder)
    folder = Path(folder)
    CaptionDatastore.open_folder(folder, verify=False)
    with locked(folder, _LOCK_TIMEOUT_S):
        yield Edit(folder, CaptionDatastore.open_folder(folder, verify=False))


def add_captions(
    folder: str | Path,
    records: Iterable[dict[str, Any]],
    embedder: Any,
    filter_options: FilterOptions | None = None,
    index: str = "auto",
) -> dict[str, Any]:
    """Adds captions; those that are there are not embedded again.

    Args:
        folder: of the datastore, or `milvus:URI#COLLECTION`.
        records: with a `caption` and what else is known (see [`read_source`]).
        embedder ([`CaptionEmbedder`]): of the encoder that made the datastore.
        filter_options: which are left out; duplicates are told from the datastore's captions too.
        index: "auto" trains an index again when the datastore has grown much, "keep" never.

    Returns:
        The report of the filter, with `added`.
    """
    options, milvus = filter_options or FilterOptions(), is_milvus_name(folder)
    with nullcontext() if milvus else editing(folder) as edit:
        store = MilvusCaptionDatastore.from_pretrained(folder) if milvus else edit.store
        _require_text_keys(folder, store, "captions cannot be added to a datastore keyed by audio")
        _check_fingerprint(folder, store, embedder.fingerprint)
        known = store.records if options.duplicates != "keep" else ()
        caption_filter = CaptionFilter(options, embedder.count_tokens, known)
        kept = list(caption_filter.filter(records))
        embeddings = embedder.embed([record["caption"] for record in kept]) if kept else None
        if kept and milvus:
            store.add(kept, embeddings)
        elif kept:
            edit.commit(added=[(kept, embeddings)], index=index)
    return caption_filter.report() | {"added": len(kept)}


def _require_text_keys(folder: str | Path, store: CaptionDatastore, problem: str) -> None:
    if store.keys == AUDIO_KEYS:
        reason = "it finds captions by the audio of their clips, and a text has no such key"
        hint = "Build it again from the recordings: recap datastore build --keys audio"
        raise ValueError(f"{folder}: {problem}: {reason}. {hint}")


def _check_fingerprint(folder: str | Path, store: CaptionDatastore, fingerprint: np.ndarray | None) -> None:
    """Refuses embeddings of another encoder than the datastore's."""
    if fingerprint is not None:
        store.check_encoder(fingerprint)
    elif store.fingerprint is not None:
        raise ValueError(f"{folder}: it states which encoder made it, the captions that are to be added do not")


def remove_captions(folder: str | Path, selection: Selection) -> int:
    """Removes captions, with their texts and embeddings on the disk, and returns how many.

    Args:
        folder: of the datastore, or `milvus:URI#COLLECTION`.
        selection: which.
    """
    if is_milvus_name(folder):
        store = MilvusCaptionDatastore.from_pretrained(folder)
        rows = selection.find(store.records)
        if len(rows) == len(store):
            raise ValueError(f"{folder}: the edit would leave no caption; drop the collection instead")
        store.remove(rows.tolist())
        return len(rows)
    with editing(folder) as edit:
        return _remove_rows(edit, selection.find(edit.store.records))


def _remove_rows(edit: Edit, rows: np.ndarray) -> int:
    if len(rows) == len(edit.store):
        raise ValueError(f"{edit.folder}: the edit would leave no caption; delete the folder instead")
    if len(rows):
        edit.commit(np.delete(np.arange(len(edit.store)), rows))
    return len(rows)


def filter_datastore(
    folder: str | Path, options: FilterOptions, count_tokens: Callable[[list[str]], Sequence[int]] | None = None
) -> dict[str, Any]:
    """Removes what the filters leave out, and returns their report with `removed`."""
    with editing(folder) as edit:
        caption_filter = CaptionFilter(options, count_tokens)
        numbered = ({**record, "__row": row} for row, record in enumerate(edit.store.records))
        kept = [record["__row"] for record in caption_filter.filter(numbered)]
        removed = _remove_rows(edit, np.delete(np.arange(len(edit.store)), kept))
        return caption_filter.report() | {"removed": removed}


def merge_datastores(folder: str | Path, others: Sequence[str | Path], index: str = "auto") -> int:
    """Adds the captions of other datastores of the same encoder, with their embeddings; returns how many."""
    for each in others:
        refuse_milvus(each)
    stores = [CaptionDatastore.from_pretrained(other) for other in others]
    with editing(folder) as edit:
        own = edit.store
        for other, store in zip(others, stores, strict=True):
            if store.dimension != own.dimension:
                hint = "different encoders made them. Move one to the other's by `recap datastore reembed`"
                sizes = f"{other} has embeddings of dimension {store.dimension}, {folder} of {own.dimension}"
                raise ValueError(f"{sizes}: {hint}")
            if store.keys != own.keys:
                keys = f"{other} is keyed by {store.keys}, {folder} by {own.keys}"
                raise ValueError(f"{keys}: keys of two kinds cannot be searched together")
            _check_fingerprint(folder, own, store.fingerprint)
        edit.commit(added=[(store.records, store.embeddings) for store in stores], index=index)
    return sum(map(len, stores))


def reembed_datastore(folder: str | Path, embedder: Any, progress: Callable[[str], None] = lambda _: None) -> None:
    """Moves a datastore to another encoder: the same captions, embedded again, and an index of the size's kind."""
    with editing(folder) as edit:
        store, manifest = edit.store, edit.store.manifest
        _require_text_keys(folder, store, "audio keys cannot be moved to another encoder without its recordings")
        shape = (len(store), embedder.fingerprint.shape[1])

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, shape[0], _CHUNK_CAPTIONS):
                captions = [record["caption"] for record in store.records[start : start + _CHUNK_CAPTIONS]]
                yield embedder.embed(captions)
                progress(f"Embedded {start + len(captions)} of {shape[0]} captions")

        new = write_new(edit.folder, store.records, blocks(), shape, manifest["dtype"])
        kind = "exact" if _is_exact(store) else "auto"
        dimension, fingerprint = shape[1], fingerprint_entry(embedder.fingerprint)
        contents = {**manifest, "index": None, "dimension": dimension, "fingerprint": fingerprint}
        publish(edit.folder, contents, new, build_index(open_embeddings(new["embeddings"]), kind))


def index_datastore(folder: str | Path, kind: str = "auto", recall: float = DEFAULT_RECALL) -> dict[str, Any] | None:
    """Makes the index of a datastore anew, or removes it (`exact`); returns its description.

    Args:
        kind, recall: see [`build_index`].
    """
    with editing(folder) as edit:
        if "captions" not in edit.store.manifest:
            # Segments of an earlier format.
            edit.commit(index="keep")
            edit.store = CaptionDatastore.open_folder(edit.folder, verify=False)
        search_index = build_index(edit.store.embeddings, kind, recall)
        report = {**(edit.store.manifest["report"] or {}), "exact_search": kind == "exact"}
        publish(edit.folder, {**edit.store.manifest, "index": None, "report": report}, {}, search_index)
        return None if search_index is None else search_index.description
