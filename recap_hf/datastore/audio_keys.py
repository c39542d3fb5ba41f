"""Building a datastore keyed by audio: captions that are found by the recordings that they describe."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.data.loading import NAMED_DATASETS
from recap_hf.modeling.audio_keys_recap import embed_recordings
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS, MANIFEST_NAME
from recap_hf.modeling.datastore_writing_recap import locked
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .building import DTYPES, WORK_NAME, Progress
from .editing import editing, index_datastore
from .filters import CaptionFilter, FilterOptions
from .indexing import DEFAULT_RECALL, EXACT_UP_TO
from .sources import SourceOptions

_CLIPS_AT_ONCE = 256
_READ_ERRORS = (ValueError, OSError)


def build_audio_datastore(
    sources: Sequence[str],
    output: str | Path,
    embedder: Any,
    *,
    source_options: SourceOptions | None = None,
    filter_options: FilterOptions | None = None,
    index: str = "auto",
    recall: float = DEFAULT_RECALL,
    dtype: str = "float32",
    overwrite: bool = False,
    batch_size: int = 16,
    progress: Progress = lambda message: None,
) -> CaptionDatastore:
    """Builds a datastore keyed by audio from datasets with recordings.

    Recordings are embedded in chunks of 256 clips; a build that was cut off is taken up again by the same call. Those
    that do not decode are left out and named in the report.

    Args:
        sources: `NAME:FOLDER` of a dataset as published, or `hub:USER/NAME`; see [`read_source`].
        batch_size: recordings per forward pass.
        output, embedder, source_options, filter_options, index, recall, dtype, overwrite, progress: see
            [`build_datastore`].

    Raises:
        FileExistsError: `output` holds a datastore. ValueError: a source has no recordings, or no caption is left.
        FileNotFoundError: a clip has no recording.
    """
    folder = Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (folder / MANIFEST_NAME).is_file() and not overwrite:
        raise FileExistsError(f"{folder} holds a datastore already; to replace it, give --overwrite")
    clips, records, report = _read(sources, source_options, filter_options, embedder, progress)
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / WORK_NAME
    with locked(folder):
        keys = _embed(clips, embedder, batch_size, work, progress)
    readable = [record for record in records if record["__clip"] in keys]
    report["unreadable_clips"] = [clip["clip_id"] for number, clip in enumerate(clips) if number not in keys]
    if not readable:
        raise ValueError(
            f"None of the {len(clips)} recordings could be read, the first: {report['unreadable_clips'][0]}"
        )
    embeddings = np.stack([keys[record["__clip"]] for record in readable]).astype(dtype)
    records = [{key: value for key, value in record.items() if key != "__clip"} for record in readable]
    CaptionDatastore(records, embeddings, embedder.fingerprint, AUDIO_KEYS).save_pretrained(folder)
    with editing(folder) as edit:
        edit.commit(len(records), report=report | {"exact_search": index == "exact"})
    if index not in ("auto", "exact") or (index == "auto" and len(records) > EXACT_UP_TO):
        progress("Index: trained and tuned")
        index_datastore(folder, index, recall)
    shutil.rmtree(work, ignore_errors=True)
    return CaptionDatastore.from_pretrained(folder)


def _read(
    sources: Sequence[str],
    source_options: SourceOptions | None,
    filter_options: FilterOptions | None,
    embedder: Any,
    progress: Progress,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Clips with their audio, records of their captions (`__clip` says of which), and the report of the filter."""
    from recap_hf.data import load_captions

    options, filter_options = source_options or SourceOptions(), filter_options or FilterOptions()
    caption_filter = CaptionFilter(filter_options, embedder.count_tokens)
    clips: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for source in sources:
        kind, _, rest = str(source).partition(":")
        if not rest or kind not in (*NAMED_DATASETS, "hub"):
            raise ValueError(
                f"{source}: keys of audio need recordings beside the captions: expected {NAMED_DATASETS[0]}:FOLDER, "
                f"another of {', '.join(NAMED_DATASETS[1:])}, or hub:USER/NAME"
            )
        progress(f"Reading {source}")
        name, folder = (rest, None) if kind == "hub" else (kind, rest)
        table = load_captions(
            name, folder, split=options.split or "train", columns=dict(options.columns) or None
        ).dataset
        start = len(clips)
        clips += [dict(row) for row in table]
        rows = (
            {"caption": text, **_known(clip, options), "__clip": number}
            for number, clip in enumerate(clips[start:], start)
            for text in clip["captions"]
        )
        records += caption_filter.filter(rows, Path(rest).name)
    report = caption_filter.report()
    if not records:
        raise ValueError(f"No caption is left of {report['read']} read: {report['dropped']}")
    wanted = {record["__clip"] for record in records}
    order = {number: place for place, number in enumerate(sorted(wanted))}
    for record in records:
        record["__clip"] = order[record["__clip"]]
    return [clips[number] for number in order], records, report


def _known(clip: dict[str, Any], options: SourceOptions) -> dict[str, Any]:
    known = {key: clip[key] for key in ("clip_id", "split", "source", "licence") if clip.get(key) is not None}
    return known | {key: value for key in ("source", "licence") if (value := getattr(options, key))}


def _embed(
    clips: list[dict[str, Any]], embedder: Any, batch_size: int, work: Path, progress: Progress
) -> dict[int, np.ndarray]:
    """Keys of the clips that can be read, by number; finished chunks lie in `work`."""
    keys: dict[int, np.ndarray] = {}
    for start in range(0, len(clips), _CLIPS_AT_ONCE):
        chunk = clips[start : start + _CLIPS_AT_ONCE]
        names = repr([(clip["clip_id"], (clip["audio"] or {}).get("path")) for clip in chunk])
        digest = hashlib.sha256(names.encode() + embedder.fingerprint.round(3).tobytes()).hexdigest()[:16]
        path = work / f"keys-{digest}.npy"
        if path.is_file():
            found = np.load(path, allow_pickle=False)
        else:
            found = _embed_chunk(chunk, embedder, batch_size, progress)
            work.mkdir(exist_ok=True)
            temporary = work / f".{path.name}.tmp"
            with open(temporary, "wb") as file:
                np.save(file, found, allow_pickle=False)
            temporary.replace(path)
        # A clip that cannot be read has no direction.
        keys |= {start + row: key for row, key in enumerate(found) if key.any()}
        progress(f"Embedded {min(start + _CLIPS_AT_ONCE, len(clips))} of {len(clips)} recordings")
    return keys


def _embed_chunk(chunk: list[dict[str, Any]], embedder: Any, batch_size: int, progress: Progress) -> np.ndarray:
    from recap_hf.modeling.audio_recap import load_audio

    found = np.zeros((len(chunk), embedder.fingerprint.shape[1]), dtype=np.float32)
    for start in range(0, len(chunk), batch_size):
        rows, recordings = [], []
        for row, clip in enumerate(chunk[start : start + batch_size], start):
            try:
                recordings.append(load_audio(clip["audio"]))
                rows.append(row)
            except _READ_ERRORS as error:
                progress(f"left out: {clip['clip_id']}: {error}")
        if rows:
            found[rows] = embed_recordings(recordings, embedder.model, embedder.processor)
    return found


__all__ = ["build_audio_datastore"]
