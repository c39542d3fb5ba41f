"""Retrieval by similar audio: a datastore whose captions are found by the recordings that they describe.

The system closest to RECAP, Koizumi et al., "Audio Captioning using Pre-Trained Large-Scale Language Model Guided by
Audio-based Similar Caption Retrieval", 2020 (the paper's [7]), prompts with captions of similar audio where RECAP
looks for similar text; it needs recordings beside the captions. A datastore keyed by audio is that retrieval on CLAP:
the row of a caption holds the embedding of its clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .audio_recap import load_audio, resample, to_mono


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


@torch.no_grad()
def embed_recordings(recordings: Sequence[Any], model: Any, processor: Any) -> np.ndarray:
    """Keys of recordings in one pass of the audio tower, `(num_recordings, dimension)`.

    Args:
        recordings (`Sequence`): anything that `load_audio` takes, or `(waveform, sampling_rate)`.
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the encoder and its features.
    """
    rate = processor.feature_extractor.sampling_rate
    waveforms = []
    for recording in recordings:
        waveform, own_rate = recording if isinstance(recording, tuple) else load_audio(recording)
        waveforms.append(resample(to_mono(np.asarray(waveform)), own_rate, rate))
    inputs = processor(audio=waveforms, sampling_rate=rate, return_tensors="pt")
    return clip_keys(model.encode_audio(**inputs.to(model.device)).audio_embeds)


def embed_clips(
    clips: Sequence[Mapping[str, Any]], model: Any, processor: Any, batch_size: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Records and embeddings of clips with their captions, a row for each caption; see `from_clips`."""
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    for number, clip in enumerate(clips):
        captions = clip.get("captions", clip.get("caption"))
        captions = [captions] if isinstance(captions, str) else captions
        if not captions or clip.get("audio") is None:
            raise ValueError(f"Clip {number} needs 'audio' and 'captions', got the keys {', '.join(map(str, clip))}.")
        rest = {key: value for key, value in clip.items() if key not in ("audio", "caption", "captions")}
        # What tells the clip from others: only one of its captions stands in a prompt.
        rest = {"clip_id": f"clip {number}"} | {key: value for key, value in rest.items() if value is not None}
        records += [{"caption": caption, **rest} for caption in captions]
        rows += [number] * len(captions)
    keys = [
        embed_recordings([clip["audio"] for clip in clips[start : start + batch_size]], model, processor)
        for start in range(0, len(clips), batch_size)
    ]
    if not keys:
        raise ValueError("A datastore keyed by audio needs at least one clip.")
    return records, np.concatenate(keys)[rows]


__all__ = ["clip_keys", "embed_clips", "embed_recordings"]
