"""Caption datastores in their folders: built from any source, edited while they are read, indexed, inspected."""

from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .audio_keys import build_audio_datastore, clip_keys, datastore_from_clips
from .building import BuildOptions, build_datastore
from .editing import (
    Selection,
    add_captions,
    filter_datastore,
    index_datastore,
    merge_datastores,
    reembed_datastore,
    remove_captions,
)
from .embedding import CaptionEmbedder
from .exporting import export_datastore
from .filters import FilterOptions, LeakGuard, read_blacklist
from .indexing import StoredIndex, build_index
from .milvus import MilvusCaptionDatastore
from .sources import SourceOptions, read_source, read_sources
from .summary import describe, verify_datastore

__all__ = [
    "BuildOptions",
    "CaptionDatastore",
    "CaptionEmbedder",
    "FilterOptions",
    "LeakGuard",
    "MilvusCaptionDatastore",
    "Selection",
    "SourceOptions",
    "StoredIndex",
    "add_captions",
    "build_audio_datastore",
    "build_datastore",
    "build_index",
    "clip_keys",
    "datastore_from_clips",
    "describe",
    "export_datastore",
    "filter_datastore",
    "index_datastore",
    "merge_datastores",
    "read_blacklist",
    "read_source",
    "read_sources",
    "reembed_datastore",
    "remove_captions",
    "verify_datastore",
]
