"""Datastores keyed by audio: captions that are found by the recordings that they describe.

The system closest to RECAP, Koizumi et al., "Audio Captioning using Pre-Trained Large-Scale Language Model Guided by
Audio-based Similar Caption Retrieval", 2020 (the paper's [7]), prompts with captions of similar audio where RECAP
looks for similar text. A datastore keyed by audio is that retrieval on CLAP: the row of a caption holds the embedding
of its clip.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.data.loading import NAMED_DATASETS
from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .building import WORK_NAME, BuildOptions, check_output, publish_build
from .filters import CaptionFilter, FilterOptions
from .sources import SourceOptions, clip_records

_CLIPS_AT_ONCE = 256


def clip_keys(audio_embeds: Any) -> np.ndarray:
    """One key a clip: the mean of its windows' unit embeddings, scaled to unit length.

    Args:
        audio_embeds (array or tensor of shape `(num_clips, num_windows, dimension)`): zero rows are absent windows.

    Returns:
        `np.ndarray` of shape `(num_clips, dimension)`, float32.
    """
    embeds = audio_embeds.detach().float().cpu().numpy() if hasattr(audio_embeds, "detach") else audio_embeds
    # Absent windows add nothing, and the length does not matter.
    total = np.asarray(embeds, dtype=np.float64).sum(axis=1)
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def encode_recordings(recordings: Sequence[Any], model: Any, processor: Any) -> np.ndarray:
    """Unit vectors of the windows of recordings, float32 of shape `(num_recordings, num_windows, dimension)`.

    Args:
        recordings: what `load_audio` takes, or pairs of a waveform and its sampling rate.
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the encoder and its features.
    """
    import torch

    rate = processor.feature_extractor.sampling_rate
    waveforms = []
    for recording in recordings:
        waveform, own_rate = recording if isinstance(recording, tuple) else load_audio(recording)
        waveforms.append(resample(to_mono(np.asarray(waveform)), own_rate, rate))
    inputs = processor(audio=waveforms, sampling_rate=rate, return_tensors="pt")
    with torch.inference_mode():
        return model.encode_audio(**inputs.to(model.device)).audio_embeds.float().cpu().numpy()


def datastore_from_clips(
    clips: Sequence[Mapping[str, Any]], model: Any, processor: Any, batch_size: int = 16
) -> CaptionDatastore:
    """A datastore keyed by audio: a search finds the most similar recordings, and gives a caption of each.

    Args:
        clips: for each clip `audio` (what `load_audio` takes, or a waveform with its rate), `captions`, and where
            known `clip_id`, `source`, `licence` and other values.
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the encoder and its features.
        batch_size: recordings per forward pass.

    Raises:
        ValueError: if there is no clip, or one without audio or captions.
    """
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    for number, clip in enumerate(clips):
        captions = clip.get("captions", clip.get("caption"))
        captions = [captions] if isinstance(captions, str) else captions
        if not captions or clip.get("audio") is None:
            raise ValueError(f"Clip {number} needs 'audio' and 'captions', got the keys {', '.join(map(str, clip))}.")
        rest = {key: value for key, value in clip.items() if key not in ("audio", "caption", "captions")}
        # What tells the clip from others: only one of its captions is part of a prompt.
        rest = {"clip_id": f"clip {number}"} | {key: value for key, value in rest.items() if value is not None}
        records += [{"caption": caption, **rest} for caption in captions]
        rows += [number] * len(captions)
    if not rows:
        raise ValueError("A datastore keyed by audio needs at least one clip.")
    audio = [clip["audio"] for clip in clips]
    batches = (audio[start : start + batch_size] for start in range(0, len(audio), batch_size))
    keys = np.concatenate([clip_keys(encode_recordings(batch, model, processor)) for batch in batches])
    return CaptionDatastore(records, keys[rows], model.embed_fingerprint(processor), AUDIO_KEYS)


def build_audio_datastore(
    sources: Sequence[str],
    output: str | Path,
    embedder: Any,
    *,
    source_options: SourceOptions | None = None,
    filter_options: FilterOptions | None = None,
    options: BuildOptions | None = None,
    batch_size: int = 16,
) -> CaptionDatastore:
    """Builds a datastore keyed by audio from datasets with recordings.

    Recordings are embedded in chunks of 256 clips; a build that was cut off is continued by the same call. Those that
    do not decode are left out and named in the report.

    Args:
        sources: `NAME:FOLDER` of a dataset as published, or `hub:USER/NAME`; see [`read_source`].
        batch_size: recordings per forward pass.
        output, embedder, source_options, filter_options, options: see [`build_datastore`].

    Raises:
        FileExistsError: see [`build_datastore`]. FileNotFoundError: a clip has no recording. ValueError: a source has
            no recordings, or no caption is left.
    """
    folder, options = Path(output), options or BuildOptions()
    check_output(folder, options, embedder.fingerprint.shape[1])
    clips, records, report = _read(sources, source_options or SourceOptions(), filter_options, embedder, options)
    folder.mkdir(parents=True, exist_ok=True)
    keys = _embed(clips, embedder, batch_size, folder / WORK_NAME, options)
    readable = [(record, clip) for record, clip in records if clip in keys]
    report["unreadable_clips"] = [clip["clip_id"] for number, clip in enumerate(clips) if number not in keys]
    if not readable:
        raise ValueError(
            f"None of the {len(clips)} recordings could be read, the first: {report['unreadable_clips'][0]}"
        )
    embeddings = np.stack([keys[clip] for _, clip in readable])
    return publish_build(
        folder, [record for record, _ in readable], embeddings, embedder.fingerprint, report, options, AUDIO_KEYS
    )


def _read(
    sources: Sequence[str],
    source_options: SourceOptions,
    filter_options: FilterOptions | None,
    embedder: Any,
    options: BuildOptions,
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], int]], dict[str, Any]]:
    """Clips with audio, records of their captions with the clip's number, and the report of the filter."""
    from recap_hf.data import load_captions

    caption_filter = CaptionFilter(filter_options or FilterOptions(), embedder.count_tokens)
    clips: list[dict[str, Any]] = []
    records: list[tuple[dict[str, Any], int]] = []
    for source in sources:
        kind, _, rest = str(source).partition(":")
        if not rest or kind not in (*NAMED_DATASETS, "hub"):
            raise ValueError(
                f"{source}: keys of audio need recordings beside the captions: expected {NAMED_DATASETS[0]}:FOLDER, "
                f"another of {', '.join(NAMED_DATASETS[1:])}, or hub:USER/NAME"
            )
        options.progress(f"Reading {source}")
        name, folder = (rest, None) if kind == "hub" else (kind, rest)
        columns = dict(source_options.columns) or None
        table = load_captions(name, folder, split=source_options.split or "train", columns=columns).dataset
        for clip in table:
            kept = list(caption_filter.filter(clip_records(clip, source_options), Path(rest).name))
            records += [(record, len(clips)) for record in kept]
            clips += [dict(clip)] if kept else []
    report = caption_filter.report()
    if not records:
        raise ValueError(f"No caption is left of {report['read']} read: {report['dropped']}")
    return clips, records, report


def _embed(
    clips: list[dict[str, Any]], embedder: Any, batch_size: int, work: Path, options: BuildOptions
) -> dict[int, np.ndarray]:
    """Keys of the clips that can be read, by number; finished chunks are kept in `work`."""
    keys: dict[int, np.ndarray] = {}
    for start in range(0, len(clips), _CLIPS_AT_ONCE):
        chunk = clips[start : start + _CLIPS_AT_ONCE]
        names = repr([(clip["clip_id"], (clip["audio"] or {}).get("path")) for clip in chunk])
        digest = hashlib.sha256(names.encode() + embedder.fingerprint.round(3).tobytes()).hexdigest()[:16]
        path = work / f"keys-{digest}.npy"
        if path.is_file():
            found = np.load(path, allow_pickle=False)
        else:
            found = np.zeros((len(chunk), embedder.fingerprint.shape[1]), dtype=np.float32)
            for first in range(0, len(chunk), batch_size):
                rows, recordings = [], []
                for row, clip in enumerate(chunk[first : first + batch_size], first):
                    try:
                        recordings.append(load_audio(clip["audio"]))
                        rows.append(row)
                    except (ValueError, OSError) as error:
                        options.progress(f"left out: {clip['clip_id']}: {error}")
                if rows:
                    found[rows] = clip_keys(encode_recordings(recordings, embedder.model, embedder.processor))
            work.mkdir(exist_ok=True)
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.save(file, found, allow_pickle=False)
            os.replace(path.with_suffix(".tmp"), path)
        # The key of a clip that cannot be read is zero.
        keys |= {start + row: key for row, key in enumerate(found) if key.any()}
        options.progress(f"Embedded {min(start + _CLIPS_AT_ONCE, len(clips))} of {len(clips)} recordings")
    return keys


__all__ = ["build_audio_datastore", "clip_keys", "datastore_from_clips"]
