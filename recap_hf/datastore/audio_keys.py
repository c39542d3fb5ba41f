"""Datastores keyed by audio: captions that are found by the recordings that they describe.

Koizumi et al., "Audio Captioning using Pre-Trained Large-Scale Language Model Guided by Audio-based Similar Caption
Retrieval", 2020 (the paper's [7]), prompt with captions of similar audio. A datastore keyed by audio is that retrieval
on CLAP: the row of a caption holds the embedding of its clip.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.data import load_captions
from recap_hf.data.loading import NAMED_DATASETS
from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.captioning_recap import evaluation_mode
from recap_hf.modeling.datastore_files_recap import AUDIO_KEYS
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .building import BuildOptions, build_folder, chunk_path, publish_build, saved
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
    rate = processor.feature_extractor.sampling_rate
    waveforms = []
    for recording in recordings:
        waveform, own_rate = recording if isinstance(recording, tuple) else load_audio(recording)
        waveforms.append(resample(to_mono(waveform), own_rate, rate))
    inputs = processor(audio=waveforms, sampling_rate=rate, return_tensors="pt")
    with evaluation_mode(model), torch.inference_mode():
        return model.encode_audio(**inputs.to(model.device)).audio_embeds.float().cpu().numpy()


def datastore_from_clips(clips: Sequence, model: Any, processor: Any, batch_size: int = 16) -> CaptionDatastore:
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
    folder, options, fingerprint = Path(output), options or BuildOptions(), embedder.fingerprint
    caption_filter = CaptionFilter(filter_options or FilterOptions(), embedder.count_tokens)
    with build_folder(folder, options, fingerprint.shape[1]) as work:
        clips = list(_clips(sources, source_options or SourceOptions(), caption_filter, options.progress))
        report = caption_filter.report()
        if not clips:
            raise ValueError(f"No caption is left of {report['read']} read: {report['dropped']}")
        keys = []
        for start in range(0, len(clips), _CLIPS_AT_ONCE):
            chunk = [clip for clip, _ in clips[start : start + _CLIPS_AT_ONCE]]
            names = repr([(clip["clip_id"], (clip["audio"] or {}).get("path")) for clip in chunk])
            path = chunk_path(work, fingerprint, names.encode())
            keys.append(saved(path, partial(_embed, chunk, embedder, batch_size, options.progress)))
            options.progress(f"Embedded {start + len(chunk)} of {len(clips)} recordings")
        keys = np.concatenate(keys)
        # The key of a clip that cannot be read is zero.
        readable = keys.any(axis=1)
        unreadable = [clip["clip_id"] for (clip, _), fine in zip(clips, readable, strict=True) if not fine]
        if len(unreadable) == len(clips):
            raise ValueError(f"None of the {len(clips)} recordings could be read, the first: {unreadable[0]}")
        found = [(record, key) for (_, own), key in zip(clips, keys, strict=True) for record in own if key.any()]
        records, report["unreadable_clips"] = [record for record, _ in found], unreadable
        blocks = (key[None] for _, key in found)
        return publish_build(folder, records, blocks, fingerprint, report, options, AUDIO_KEYS)


def _clips(
    sources: Sequence[str], options: SourceOptions, caption_filter: CaptionFilter, progress: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Clips with audio, each with the records of its captions; those without a caption that stays are left out."""
    for source in sources:
        kind, _, rest = str(source).partition(":")
        if not rest or kind not in (*NAMED_DATASETS, "hub"):
            hint = f"expected {NAMED_DATASETS[0]}:FOLDER, another of {', '.join(NAMED_DATASETS[1:])}, or hub:USER/NAME"
            raise ValueError(f"{source}: keys of audio need recordings beside the captions: {hint}")
        progress(f"Reading {source}")
        name, folder = (rest, None) if kind == "hub" else (kind, rest)
        columns = dict(options.columns) or None
        for clip in load_captions(name, folder, split=options.split or "train", columns=columns).dataset:
            kept = list(caption_filter.filter(clip_records(clip, options), Path(rest).name))
            if kept:
                yield dict(clip), kept


def _embed(clips: Sequence[Mapping], embedder: Any, batch_size: int, progress: Callable[[str], None]) -> np.ndarray:
    """Keys of clips, of shape `(num_clips, dimension)`; zeros where a recording cannot be read."""
    found = np.zeros((len(clips), embedder.fingerprint.shape[1]), dtype=np.float32)
    for start in range(0, len(clips), batch_size):
        rows, recordings = [], []
        for row, clip in enumerate(clips[start : start + batch_size], start):
            try:
                recordings.append(load_audio(clip["audio"]))
                rows.append(row)
            except (ValueError, OSError) as error:
                progress(f"left out: {clip['clip_id']}: {error}")
        if rows:
            found[rows] = clip_keys(encode_recordings(recordings, embedder.model, embedder.processor))
    return found
