"""Datastores of formats 1 and 2, which kept captions in segments and listed removed rows. Any edit writes format 3."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_files_recap import (
    CaptionRecords,
    Int8Embeddings,
    Opened,
    check_files,
    check_manifest,
    load_array,
    open_pair,
)
from recap_hf.modeling.index_recap import open_index

logger = logging.getLogger(__name__)


def open_earlier(path: Path, written: Mapping[str, Any], verify: bool) -> Opened:
    """Opens a datastore of format 1 or 2; see `open_files`.

    Several segments, or one with removed rows, are copied into memory. Their index is left out, since it counts
    removed rows.

    Args:
        path: of the manifest.
        written: its contents.
        verify: compare every file with its checksum.

    Raises:
        OSError: a file is missing. ValueError: one is damaged.
    """
    manifest = dict(written)
    if manifest["format_version"] == 1:
        pair = {"captions": "captions.jsonl", "embeddings": "embeddings.npy", "deleted": None}
        segments = [{**pair, "num_captions": manifest["num_captions"]}]
        manifest |= {"dtype": "float32", "segments": segments, "checksum": None}
    segments = [{**each, "num_captions": int(each["num_captions"])} for each in manifest.pop("segments")]
    if not segments:
        raise ValueError(f"{path}: the datastore has no segment.")
    used = [(kind, each[kind]) for each in segments for kind in ("captions", "embeddings", "deleted")]
    manifest = check_manifest(path, manifest, [(kind, name) for kind, name in used if name is not None])
    check_files(path, manifest, written, verify)
    records, embeddings = _join(path, manifest, segments)
    return records, embeddings, open_index(path.parent, manifest), manifest


def _join(path: Path, manifest: dict[str, Any], segments: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """Records and embeddings of all segments."""
    parts = [open_pair(path, manifest, segment, segment["num_captions"]) for segment in segments]
    kept = [_kept_rows(path.parent, segment) for segment in segments]
    total = sum(int(mask.sum()) for mask in kept)
    if total != manifest["num_captions"]:
        raise ValueError(f"{path}: announces {manifest['num_captions']} captions, but there are {total}.")
    if len(parts) == 1 and kept[0].all():
        manifest |= {kind: segments[0][kind] for kind in ("captions", "embeddings")}
        return parts[0]
    logger.warning("%s: of an earlier format, it is read into memory. `recap datastore index` rewrites it.", path)
    manifest["index"] = None
    lines = [records.line(row) for (records, _), mask in zip(parts, kept, strict=True) for row in np.flatnonzero(mask)]
    ends = np.cumsum([0, *map(len, lines)])
    records = CaptionRecords(b"".join(lines), np.stack([ends[:-1], ends[1:]], axis=1), None)
    arrays = [getattr(array, "codes", array)[mask] for (_, array), mask in zip(parts, kept, strict=True)]
    joined = np.concatenate(arrays)
    return records, Int8Embeddings(joined) if joined.dtype == np.int8 else joined


def _kept_rows(folder: Path, segment: Mapping[str, Any]) -> np.ndarray:
    """Which rows of a segment were not removed: a mask."""
    mask = np.ones(segment["num_captions"], dtype=bool)
    if segment["deleted"] is not None:
        name = folder / segment["deleted"]
        rows = np.asarray(load_array(name))
        fits = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) > 0 and (np.diff(rows) > 0).all()
        if not fits or rows[0] < 0 or rows[-1] >= len(mask):
            raise ValueError(f"{name}: expected ascending rows below {len(mask)} in int64.")
        mask[rows] = False
    return mask
