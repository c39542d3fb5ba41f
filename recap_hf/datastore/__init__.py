"""Caption datastores in their folders: built from any source, edited while they are read, indexed, inspected."""

from __future__ import annotations

from recap_hf.modeling.datastore_milvus_recap import MilvusCaptionDatastore

from .audio_keys import build_audio_datastore
from .building import build_datastore
from .editing import (
    Selection,
    add_captions,
    compact,
    filter_datastore,
    index_datastore,
    merge_datastores,
    reembed_datastore,
    remove_captions,
)
from .embedding import CaptionEmbedder
from .exporting import export_datastore
from .filters import FilterOptions, LeakGuard, read_blacklist
from .indexing import build_index
from .sources import SourceOptions, read_source
from .summary import describe, verify_datastore

__all__ = [
    "CaptionEmbedder",
    "FilterOptions",
    "LeakGuard",
    "MilvusCaptionDatastore",
    "Selection",
    "SourceOptions",
    "add_captions",
    "build_audio_datastore",
    "build_datastore",
    "build_index",
    "compact",
    "describe",
    "export_datastore",
    "filter_datastore",
    "index_datastore",
    "merge_datastores",
    "read_blacklist",
    "read_source",
    "reembed_datastore",
    "remove_captions",
    "verify_datastore",
]
