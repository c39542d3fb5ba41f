"""Clips and captions for the contrastive training of a CLAP. Everything random is keyed by seed, epoch and clip."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text

from ..data import Clip
from ..features import FeatureStore, mel_identity, mel_windows, weights_hash
from ..task import Key
from .caption_classes import CaptionClasses, agreement

# Streams of random numbers that differ from those of prompts.
DRAW = 11


class StoredAudio:
    """What is stored of a clip, `audio` `(windows, ..., ...)` fp16: its mel windows, or the outputs of a frozen audio
    tower; see `features.store_features`.

    Args:
        feature_extractor: makes the windows.
        clap: whose audio tower is frozen, or None.
        device: of the computation.
    """

    def __init__(self, feature_extractor: Any, clap: Any = None, device: Any = "cpu") -> None:
        self.feature_extractor, self._clap, self._device = feature_extractor, clap, device
        self.identity = mel_identity(feature_extractor) | {"stored": "mel windows" if clap is None else "features"}
        if clap is not None:
            self.identity["weights"] = weights_hash(clap, "audio_model")

    @torch.no_grad()
    def encode(self, waveforms: list[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        inputs = mel_windows(self.feature_extractor, waveforms, self._device)
        mask = inputs["input_features_mask"].bool()
        windows = inputs["input_features"][mask]
        if self._clap is not None:
            windows = self._clap.audio_features(windows[:, None])
        for own in windows.half().cpu().split(mask.sum(dim=1).tolist()):
            yield {"audio": own.numpy()}


@dataclass
class PairedClip:
    """A clip with its captions as tokens, and what makes a caption right for it.

    Args:
        key: of the feature store.
        tokens: token ids of each caption.
        texts: a number for each caption; captions with the same text after normalisation have the same one.
        group: a number; the same recording in two datasets has the same one.
        number: of the clip.
    """

    key: str
    tokens: list[list[int]]
    texts: np.ndarray
    group: int
    number: int


def paired_clips(clips: Sequence[Clip], tokenizer: Any, max_length: int) -> tuple[list[PairedClip], list[str]]:
    """Clips with their captions as at most `max_length` tokens, and the texts by their numbers.

    Numbers of texts and groups are unique in one call.
    """
    flat = [text for clip in clips for text in clip.captions]
    tokens = iter(tokenizer(flat, truncation=True, max_length=max_length)["input_ids"])
    texts: dict[str, int] = {}
    groups: dict[str, int] = {}
    paired = []
    for clip in clips:
        numbers = [texts.setdefault(normalize_text(text), len(texts)) for text in clip.captions]
        group = groups.setdefault(normalize_clip_id(clip.clip_id), len(groups))
        own = [next(tokens) for _ in clip.captions]
        paired.append(PairedClip(clip.key, own, np.array(numbers), group, len(paired)))
    return paired, list(texts)


class SoftTargets:
    """How well captions fit clips by the classes of both; see `caption_classes`.

    Args:
        classes: the classes.
        clips: the clips, with scores of them.
        texts: the captions by their numbers.
    """

    def __init__(self, classes: CaptionClasses, clips: Sequence[Clip], texts: Sequence[str]) -> None:
        self.scores = classes.scores(clip.classes for clip in clips)
        self._named, self._covered = classes.named(texts)

    def __call__(self, clips: Sequence[PairedClip], captions: Sequence[tuple[PairedClip, int]]) -> np.ndarray:
        """`(clips, captions)` float32 from 0 to 1; for the arguments see `positives`."""
        texts = [clip.texts[number] for clip, number in captions]
        scores = self.scores[[clip.number for clip in clips]]
        return agreement(scores, self._named[texts], self._covered[texts])


def positives(clips: Sequence[PairedClip], captions: Sequence[tuple[PairedClip, int]]) -> np.ndarray:
    """`(clips, captions)` bool: the caption is one of the clip's, by recording or by text."""
    texts = np.array([clip.texts[number] for clip, number in captions])
    groups = np.array([clip.group for clip, _ in captions])
    return np.stack([(groups == clip.group) | np.isin(texts, clip.texts) for clip in clips])


@dataclass(frozen=True)
class Variation:
    """What is varied from epoch to epoch.

    Args:
        captions: captions of a clip.
        crop: a random window of a longer clip, else its first.
        gain_db: change of the level, at most, in dB.
        mask_frames, mask_bins: frames and mel bins in a row that are hidden, at most.
        seed: of the draws.
        silence, decibel: see `RecapFeatureExtractor.silence_level` and `decibel`.
    """

    captions: int = 1
    crop: bool = False
    gain_db: float = 0.0
    mask_frames: int = 0
    mask_bins: int = 0
    seed: int = 0
    silence: float = -100.0
    decibel: float = 1.0


class PairedClips(Dataset):
    """Audio and captions of clips, indexed by `Key` of a clip's number.

    Args:
        clips: the clips.
        store: their audio.
        variation: what is varied.
    """

    def __init__(self, clips: Sequence[PairedClip], store: FeatureStore, variation: Variation) -> None:
        self.clips, self.store, self.variation = clips, store, variation

    def __getitem__(self, key: Key) -> tuple[np.ndarray, list[list[int]]]:
        """(a window `(frames, bins)`, token ids of each caption of the epoch)."""
        tokens = self.clips[key.example].tokens
        return self.audio(key.example, key.epoch), [tokens[number] for number in self.captions(key.example, key.epoch)]

    def captions(self, clip: int, epoch: int) -> list[int]:
        """Numbers of a clip's captions in an epoch."""
        order = self._rng(epoch, clip, 0).permutation(len(self.clips[clip].tokens))
        return order[: self.variation.captions].tolist()

    def windows(self, clip: int) -> np.ndarray:
        """What is stored of a clip, `(windows, ..., ...)` fp16."""
        return self.store.read(self.clips[clip].key, "audio")

    def audio(self, clip: int, epoch: int) -> np.ndarray:
        """A window of a clip, `(frames, bins)` float32, varied by the epoch."""
        rng, variation, windows = self._rng(epoch, clip, 1), self.variation, self.windows(clip)
        window = windows[rng.integers(len(windows)) if variation.crop else 0].astype(np.float32)
        if variation.gain_db:
            gain = rng.uniform(-variation.gain_db, variation.gain_db) * variation.decibel
            # Digital silence, rounded to fp16, has no level.
            sounds = window > variation.silence + 0.01
            window[sounds] = np.maximum(window[sounds] + gain, variation.silence)
        for axis, limit in ((0, variation.mask_frames), (1, variation.mask_bins)):
            if limit:
                width = int(rng.integers(limit + 1))
                start = int(rng.integers(max(1, window.shape[axis] - width + 1)))
                window[(slice(None),) * axis + (slice(start, start + width),)] = variation.silence
        return window

    def _rng(self, epoch: int, clip: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.variation.seed, DRAW, epoch, clip, stream])


@dataclass(frozen=True)
class PairCollator:
    """Makes (windows `(n, frames, bins)` float32, token ids and mask `(m, length)`) of `PairedClips` examples.

    Args:
        pad_token_id: of the tokenizer.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[tuple[np.ndarray, list[list[int]]]]) -> tuple[torch.Tensor, ...]:
        windows = torch.from_numpy(np.stack([window for window, _ in examples]))
        return windows, *self.pad([ids for _, tokens in examples for ids in tokens])

    def pad(self, tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, `(texts, length)`, padded on the right."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(own) for own in tokens], batch_first=True, padding_value=self.pad_token_id)
        return ids, pad([torch.ones(len(own), dtype=torch.long) for own in tokens], batch_first=True)
