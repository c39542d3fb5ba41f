"""Training without audio: the CLAP embedding of a caption, with noise, stands for the recording.

CLAP puts captions near the recordings that they describe, but not in the same place: Gaussian noise of the width of
this gap teaches the captioner to describe what lies around a caption's embedding (Nukrai et al., "Text-Only Training
for Image Captioning using Noise-Injected CLIP", 2022; Deshmukh et al., arXiv 2309.07372; Kouzelis and Katsouros, arXiv
2309.12242). What of the gap is the same for all pairs is no noise, but a shift (Zhang et al., "Connect, Collapse,
Corrupt", arXiv 2401.08567).
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recap_hf.data import load_captions
from recap_hf.data.schema import column_mapping
from recap_hf.datastore import clip_keys
from recap_hf.datastore.audio_keys import encode_recordings
from recap_hf.datastore.sources import SourceOptions, read_sources
from recap_hf.modeling.encoder_recap import embedding_states

from .collator import with_noise
from .config import TrainingConfig
from .data import Clip, held_out

logger = logging.getLogger(__name__)

# The variance of Nukrai et al. and the code of Kouzelis and Katsouros: 0.016.
PUBLISHED_NOISE = 0.016**0.5
# A stream of random numbers beside those of `plans`.
_QUERIES = 2


@dataclass
class Gap:
    """The gap between embeddings of captions and those of recordings.

    Args:
        noise: see `with_noise`.
        shift: `(P,)`, what is added to embeddings of captions before the noise; 0 if it is not known.
    """

    noise: float = PUBLISHED_NOISE
    shift: np.ndarray | float = 0.0


@dataclass
class TextStore:
    """Embeddings of captions in the place of a `FeatureStore`. A clip's key is its row.

    Args:
        embeds: float32 of shape `(clips, P)`, unit vectors, shifted: what the decoder is conditioned on.
        queries: the same with one draw of the noise: what captions are retrieved with, as far from the clip's own
            captions as a recording is.
        fingerprint: of the encoder and the captions.
    """

    embeds: np.ndarray
    queries: np.ndarray
    fingerprint: str

    def read(self, key: str, name: str) -> np.ndarray:
        """`embeds` `(1, P)` or `states` `(1, 1, P)` fp16 of a clip, as of a recording of one window."""
        row = slice(int(key), int(key) + 1)
        return self.queries[row] if name == "embeds" else embedding_states(self.embeds[row])[None].astype(np.float16)


def text_clips(config: TrainingConfig, sources: list[str], share_prompts: bool) -> dict[str, list[Clip]]:
    """Clips of caption sources, by split: `train`, and `validation` where a share is held out.

    Args:
        config: settings of the run.
        sources: see [`read_sources`].
        share_prompts: keep the captions of a clip together; else each one is a clip with the id of its own.

    Raises:
        OSError, ValueError: if a source does not read, or holds no captions.
    """
    clips: dict[tuple[str, str], Clip] = {}
    options = SourceOptions(columns=column_mapping(config.columns))
    for name, records in read_sources(sources, options):
        for number, record in enumerate(records):
            text, source = " ".join(record["caption"].split()), str(record.get("source") or name)
            clip_id = str(record.get("clip_id") or f"{name}-{number}")
            if text:
                clip = clips.setdefault((source, clip_id), Clip(clip_id, [], source, record.get("licence")))
                clip.captions.append(text)
    if not clips:
        raise ValueError(f"--text-only {' '.join(sources)}: no caption there")
    every = list(clips.values())
    numbers = held_out(len(every), config) if config.validation_share else {"train": range(len(every))}
    limits = {"train": config.max_train_clips, "validation": config.max_validation_clips}
    splits = {split: [every[row] for row in rows][: limits[split] or None] for split, rows in numbers.items()}
    if share_prompts:
        return splits
    return {
        split: [replace(clip, captions=[text]) for clip in own for text in clip.captions]
        for split, own in splits.items()
    }


def text_store(splits: dict[str, list[Clip]], stores: dict[str, Any], gap: Gap, seed: int) -> TextStore:
    """The stand-ins of all clips, whose keys are set.

    Args:
        splits: clips of each split.
        stores: for each split the datastore of its captions, a row for each caption in order.
        gap: between captions and recordings.
        seed: of the queries' noise.
    """
    embeds = []
    for split, clips in splits.items():
        first = 0
        for clip in clips:
            rows, clip.key = slice(first, first + len(clip.captions)), str(len(embeds))
            # Several captions of a clip: their mean.
            embeds.append(clip_keys(np.asarray(stores[split].embeddings[rows], dtype=np.float32)[None])[0])
            first = rows.stop
    embeds = clip_keys((np.stack(embeds) + gap.shift)[:, None])
    queries = with_noise(embeds, gap.noise, np.random.default_rng([seed, _QUERIES]))
    return TextStore(embeds, queries, stores["train"].manifest["checksum"][:16])


def measured_gap(folder: str, model: Any, processor: Any) -> Gap:
    """The gap between some recordings and their captions.

    The shift is the mean difference. The noise moves a shifted caption as far as recordings are from it: with their
    mean cosine c, and embeddings of P dimensions, it is sqrt((1 / c^2 - 1) / P); then c is the cosine of an embedding
    with and without noise.

    Args:
        folder: an `audiofolder`.
        model, processor: the captioner.

    Raises:
        ValueError, OSError: if nothing can be read, or captions do not fit their recordings at all.
    """
    audio, text = [], []
    for clip in load_captions("audiofolder", folder).dataset:
        key = clip_keys(encode_recordings([clip["audio"]], model, processor))[0]
        audio += [key] * len(clip["captions"])
        text.append(np.asarray(model.embed_captions(clip["captions"], processor), dtype=np.float32))
    audio, text = np.stack(audio), np.concatenate(text)
    before = float((audio * text).sum(1).mean())
    if before <= 0:
        raise ValueError(f"--gap-pairs {folder}: recordings and their captions have a mean cosine of {before:.3f}")
    shift = (audio - text).mean(0)
    after = float((audio * clip_keys((text + shift)[:, None])).sum(1).mean())
    noise = (max(0.0, 1 / after**2 - 1) / audio.shape[1]) ** 0.5
    logger.info(
        "%d pairs have a mean cosine of %.3f, shifted %.3f: noise of width %.4f", len(audio), before, after, noise
    )
    return Gap(noise, shift)
