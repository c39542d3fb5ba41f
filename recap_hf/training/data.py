"""The clips of a run: the datasets that its settings name, by split, and the encoded audio of their clips."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recap_hf.data import CaptionData, join, load_captions
from recap_hf.data.schema import Problem

from .config import AudioTrainingConfig, TrainingConfig
from .features import Encoder, FeatureStore, store_features

logger = logging.getLogger(__name__)


@dataclass
class Clip:
    """A clip with its captions.

    Args:
        clip_id: its id in the dataset.
        captions: the texts.
        source, licence: of the dataset.
        key: of its encoded audio; empty for text alone.
        targets: token ids of each caption, as far as they are known.
        classes: names and scores of sounds that a tagger or labels tell.
    """

    clip_id: str
    captions: list[str]
    source: str = ""
    licence: str | None = None
    key: str = ""
    targets: list[list[int]] = field(default_factory=list)
    classes: dict[str, float] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """Records for a datastore, one per caption."""
        known = {"clip_id": self.clip_id, "source": self.source} | ({"licence": self.licence} if self.licence else {})
        return [{"caption": caption, **known} for caption in self.captions]


@dataclass
class DataSummary:
    """What a run was given.

    Args:
        counts: clips and captions, by split.
        sources: name, licence, clips and captions of each training dataset.
        problems: (split, what was left out and why).
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)

    def add(self, split: str, clips: list[Clip], problems: Iterable[Problem] = (), **counts: int) -> None:
        """Count the clips of a split; the sources are those of the training split."""
        captions = sum(len(clip.captions) for clip in clips)
        self.counts[split] = {"clips": len(clips), "captions": captions, **counts}
        self.problems += [(split, problem) for problem in problems]
        if split == "train":
            self.sources = _sources(clips)

    def log(self) -> None:
        """Write counts and problems to the log."""
        for split, numbers in self.counts.items():
            named = (f"{count} {name.replace('_', ' ')}" for name, count in numbers.items())
            logger.info("%s: %s", split, ", ".join(named))
        for split, problem in self.problems:
            logger.warning("left out (%s, %s): %s", split, problem.kind, problem.detail)


def _sources(clips: list[Clip]) -> list[dict[str, Any]]:
    found: dict[tuple, dict[str, Any]] = {}
    for clip in clips:
        empty = {"name": clip.source, "licence": clip.licence, "clips": 0, "captions": 0}
        entry = found.setdefault((clip.source, clip.licence), empty)
        entry["clips"] += 1
        entry["captions"] += len(clip.captions)
    return list(found.values())


def load_splits(config: TrainingConfig) -> dict[str, CaptionData]:
    """`train` and, unless turned off, `validation`, with all datasets of the settings joined.

    Tasks without audio get the captions alone.
    """
    options: dict[str, Any] = {"columns": config.column_mapping() or None}
    audio = isinstance(config, AudioTrainingConfig)
    options |= {"allow_missing": config.allow_missing} if audio else {"needs_audio": False}

    def load(split: str) -> CaptionData:
        return join(
            load_captions(name, folder, split=split, audio_dir=audio_dir, **options)
            for name, folder, audio_dir in config.sources()
        )

    splits = {"train": load(config.train_split)}
    if config.validation_share:
        splits = _divide(splits["train"], config.validation_share, config.seed)
    elif config.validation_split != "none":
        try:
            splits["validation"] = load(config.validation_split)
        except (OSError, ValueError) as error:
            raise type(error)(
                f"{error} (validation: to validate on a share of the training clips give --validation-share 0.05; to "
                "train without validation give --validation-split none)"
            ) from error
    limits = {"train": config.max_train_clips, "validation": config.max_validation_clips}
    for split, data in splits.items():
        if 0 < limits[split] < len(data.dataset):
            splits[split] = CaptionData(data.dataset.select(range(limits[split])), data.problems)
    return splits


def divide(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the items to train on and to validate on, each in order.

    Raises:
        ValueError: if none is left to train on.
    """
    order = np.random.default_rng([seed, 2]).permutation(count)
    held = max(1, round(share * count))
    if held >= count:
        raise ValueError(f"--validation-share {share} of {count} clips leaves none to train on")
    return np.sort(order[held:]), np.sort(order[:held])


def _divide(data: CaptionData, share: float, seed: int) -> dict[str, CaptionData]:
    train, validation = divide(len(data.dataset), share, seed)
    return {
        "train": CaptionData(data.dataset.select(train), data.problems),
        "validation": CaptionData(data.dataset.select(validation)),
    }


def clips_of(data: CaptionData, keys: list[str | None] | None = None) -> list[Clip]:
    """The clips of a table; with `keys` (one per row), those that have one."""
    table = data.dataset
    names = ("clip_id", "captions", "source", "licence", "classes", "class_scores")
    rows = zip(*(table[name][:] for name in names), keys or [""] * len(table), strict=True)
    return [
        Clip(*row[:4], key, classes=dict(zip(classes, scores, strict=True)))
        for *row, classes, scores, key in rows
        if key is not None
    ]


def load_encoded(
    config: AudioTrainingConfig, encoder: Encoder, splits: dict[str, CaptionData]
) -> tuple[dict[str, list[Clip]], FeatureStore, DataSummary]:
    """Clips of every split with their audio encoded; what is in the cache is not computed again.

    Raises:
        ValueError: if no clip of a split can be encoded.
    """
    from accelerate import PartialState

    clips, summary = {}, DataSummary()
    options = {"batch_windows": config.encode_batch_size, "workers": config.workers(PartialState().device)}
    for split, data in splits.items():
        encoded = store_features(data.dataset, encoder, config.cache_folder(), **options)
        clips[split] = clips_of(data, encoded.keys)
        if not clips[split]:
            raise ValueError(f"no clip of the {split} split could be encoded: {encoded.problems[0].detail}")
        counts = {"clips_reused": encoded.reused, "clips_encoded": encoded.encoded}
        summary.add(split, clips[split], (*data.problems, *encoded.problems), **counts)
    return clips, encoded.store, summary
