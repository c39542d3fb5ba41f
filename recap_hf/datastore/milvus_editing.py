"""Adding to and removing from captions in Milvus, as it is done in files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS
from recap_hf.modeling.datastore_milvus_recap import MilvusCaptionDatastore, is_milvus_name

from .filters import CaptionFilter, FilterOptions

_CHUNK_CAPTIONS = 8192


def refuse_milvus(folder: str | Path) -> None:
    """Refuses the name of a collection where a folder is needed.

    Raises:
        ValueError: for `milvus:...`.
    """
    if is_milvus_name(folder):
        raise ValueError(
            f"{folder} is in Milvus, where captions are added and removed, searched and exported. For this export "
            "them into a file, build a datastore of it, change that, and export it to Milvus with --overwrite"
        )


def add_to_milvus(
    name: str, records: Iterable[dict[str, Any]], embedder: Any, filter_options: FilterOptions | None = None
) -> dict[str, Any]:
    """Adds captions to a collection; see `add_captions`."""
    store = MilvusCaptionDatastore.from_pretrained(name)
    if store.keys == AUDIO_KEYS:
        raise ValueError(f"{name}: captions cannot be added to a datastore keyed by audio")
    store.check_encoder(embedder.fingerprint)
    options = filter_options or FilterOptions()
    known = store.records if options.duplicates != "keep" else ()
    caption_filter = CaptionFilter(options, embedder.count_tokens, known)
    kept = list(caption_filter.filter(records))
    for start in range(0, len(kept), _CHUNK_CAPTIONS):
        chunk = kept[start : start + _CHUNK_CAPTIONS]
        store.add(chunk, embedder.embed([record["caption"] for record in chunk]))
    return caption_filter.report() | {"added": len(kept)}


def remove_from_milvus(name: str, selection: Any) -> int:
    """Removes captions from a collection, and returns how many; see `remove_captions`."""
    store = MilvusCaptionDatastore.from_pretrained(name)
    matches = selection.matcher(len(store))
    rows = [row for row, record in enumerate(store.records) if matches(row, record)]
    if rows and len(rows) == len(store):
        raise ValueError(f"{name}: the edit would leave no caption; drop the collection instead")
    if rows:
        store.remove(rows)
    return len(rows)


__all__ = ["add_to_milvus", "refuse_milvus", "remove_from_milvus"]
