"""Clips and captions for the contrastive training: which are in which step, and the arrays that the towers read.

Everything random is keyed by seed, epoch and clip, as in the training of a captioner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recap_hf.data.clip_ids import normalize_clip_id, normalize_text
from recap_hf.training.encoding import extract
from recap_hf.training.features import FeatureStore, mel_identity

# Streams of random numbers that must not meet those of `recap_hf.training.batches`.
_ORDER, _DRAW = 10, 11
_FLOOR_DB = -100.0


class Mels:
    """What is stored of a clip for the training of a CLAP: its mel windows in fp16, and the frame that each begins at.

    Args:
        feature_extractor: makes the windows.
        device: where.
    """

    def __init__(self, feature_extractor: Any, device: Any = "cpu") -> None:
        self.feature_extractor, self._device = feature_extractor, device
        self.identity = mel_identity(feature_extractor) | {"stored": "mel windows"}

    def encode(self, batch: list[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(key, mel (windows, frames, bins) in fp16, first frames (windows, 1)) per clip."""
        extractor = self.feature_extractor
        inputs = extract(extractor, batch, self._device)
        mels = inputs["input_features"].half().cpu().numpy()
        for row, (key, waveform) in enumerate(batch):
            starts = np.array(extractor.window_starts(len(waveform)), dtype=np.float32)
            yield key, mels[row, : len(starts)], np.round(starts / extractor.hop_length)[:, None]


@dataclass
class PairedClip:
    """A clip: where its mel is stored, its captions as token ids, and what makes a caption right for it.

    Args:
        key, clip_id: of the store, and of the dataset.
        tokens: token ids of each caption.
        texts: a number for each caption; captions with the same text after normalisation have the same one.
        group: a number; the same recording in two datasets has the same one.
    """

    key: str
    clip_id: str
    tokens: list[list[int]]
    texts: np.ndarray
    group: int


@dataclass(frozen=True)
class Variation:
    """What is varied from epoch to epoch; see `ClapPretrainingConfig`."""

    captions: int
    crop: bool
    gain_db: float
    mask_frames: int
    mask_bins: int
    seed: int


@dataclass
class ClapPass:
    """What one pass of one process computes: mels `(n, frames, bins)` float32, token ids and mask `(m, length)`."""

    mels: np.ndarray
    input_ids: np.ndarray
    attention_mask: np.ndarray


def paired_clips(ids: Sequence[str], keys: Sequence[str], captions: Sequence[Sequence[str]], tokens: Any) -> list:
    """`PairedClip`s; numbers of texts and groups are unique within one call.

    Args:
        ids, keys, captions: of each clip.
        tokens: an iterator over the token ids of all captions, in order.
    """
    texts: dict[str, int] = {}
    groups: dict[str, int] = {}
    clips = []
    for clip_id, key, own in zip(ids, keys, captions, strict=True):
        numbers = [texts.setdefault(normalize_text(text), len(texts)) for text in own]
        group = groups.setdefault(normalize_clip_id(clip_id), len(groups))
        clips.append(PairedClip(key, clip_id, [next(tokens) for _ in own], np.array(numbers), group))
    return clips


def positives(clips: Sequence[PairedClip], captions: Sequence[tuple[PairedClip, int]]) -> np.ndarray:
    """`(clips, captions)` bool: the caption is one of the clip's, by recording or by text."""
    texts = np.array([clip.texts[number] for clip, number in captions])
    groups = np.array([clip.group for clip, _ in captions])
    return np.stack([(groups == clip.group) | np.isin(texts, clip.texts) for clip in clips])


def plan_epoch(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Clips of each step: every step is full, so what is left over waits for another epoch's order."""
    order = np.random.default_rng([seed, _ORDER, epoch]).permutation(count)
    size = min(batch_size, count)
    return [order[start : start + size] for start in range(0, count - size + 1, size)]


class PairBuilder:
    """Makes passes of clips.

    Args:
        clips: the clips.
        store: their mels.
        variation: what is varied.
        pad_token_id: of the tokenizer.
    """

    def __init__(
        self, clips: Sequence[PairedClip], store: FeatureStore, variation: Variation, pad_token_id: int
    ) -> None:
        self.clips, self.store, self.variation, self.pad_token_id = clips, store, variation, pad_token_id

    def captions(self, clip: int, epoch: int) -> list[int]:
        """Which captions of a clip are in an epoch."""
        own = len(self.clips[clip].tokens)
        rng = self._rng(epoch, clip, 0)
        return rng.permutation(own)[: self.variation.captions].tolist()

    def build(self, chosen: Sequence[int], epoch: int) -> ClapPass:
        """The pass of some clips and their captions in an epoch."""
        mels = np.stack([self.mel(clip, epoch) for clip in chosen])
        tokens = [self.clips[clip].tokens[number] for clip in chosen for number in self.captions(clip, epoch)]
        return ClapPass(mels, *pad_tokens(tokens, self.pad_token_id))

    def mel(self, clip: int, epoch: int) -> np.ndarray:
        """A window of a clip, `(frames, bins)` float32 in dB, varied as the epoch has it."""
        rng, variation = self._rng(epoch, clip, 1), self.variation
        key = self.clips[clip].key
        starts = self.store.audio_embeds(key)[:, 0].astype(int)
        frames = self.store.hidden_states(key).reshape(len(starts), -1, self.store.hidden_states(key).shape[-1])
        mel = frames[0]
        if variation.crop and len(starts) > 1:
            mel = cut_window(frames, starts, int(rng.integers(starts[-1] + 1)))
        mel = mel.astype(np.float32)
        if variation.gain_db:
            mel = np.maximum(mel + rng.uniform(-variation.gain_db, variation.gain_db), _FLOOR_DB)
        for axis, limit in ((0, variation.mask_frames), (1, variation.mask_bins)):
            if limit:
                width = int(rng.integers(limit + 1))
                start = int(rng.integers(max(1, mel.shape[axis] - width + 1)))
                mel[(slice(None),) * axis + (slice(start, start + width),)] = _FLOOR_DB
        return mel

    def _rng(self, epoch: int, clip: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.variation.seed, _DRAW, epoch, clip, stream])


def cut_window(frames: np.ndarray, starts: np.ndarray, first: int) -> np.ndarray:
    """One window's length of frames from the frame `first` of a clip on.

    Windows follow one another without a gap; the last is aligned to the clip's end. The frame at the end of a window
    is the first of the next.

    Args:
        frames: `(windows, frames, bins)`.
        starts: the frame of the clip that each window begins at.
        first: at most the last window's start.
    """
    length = frames.shape[1]
    wanted = first + np.arange(length)
    window = np.minimum(wanted // (length - 1), len(starts) - 1)
    return frames[window, np.minimum(wanted - starts[window], length - 1)]


def pad_tokens(tokens: Sequence[Sequence[int]], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, `(texts, length)`, padded on the right."""
    length = max(map(len, tokens))
    ids = np.full((len(tokens), length), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, own in enumerate(tokens):
        ids[row, : len(own)] = own
        mask[row, : len(own)] = 1
    return ids, mask
