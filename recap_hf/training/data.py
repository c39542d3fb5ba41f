"""The clips of a run: the datasets that its settings name, by split, and the encoded audio of their clips."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import PartialState

from recap_hf.data import CaptionData, join, load_captions
from recap_hf.data.schema import Problem, column_mapping

from .config import AudioTrainingConfig, TrainingConfig
from .features import FeatureStore, store_features

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
        found: dict[tuple, dict[str, Any]] = {}
        for clip in clips if split == "train" else []:
            empty = {"name": clip.source, "licence": clip.licence, "clips": 0, "captions": 0}
            entry = found.setdefault((clip.source, clip.licence), empty)
            entry["clips"] += 1
            entry["captions"] += len(clip.captions)
        self.sources += found.values()

    def log(self) -> None:
        """Write counts and problems to the log."""
        for split, numbers in self.counts.items():
            named = (f"{count} {name.replace('_', ' ')}" for name, count in numbers.items())
            logger.info("%s: %s", split, ", ".join(named))
        for split, problem in self.problems:
            logger.warning("left out (%s, %s): %s", split, problem.kind, problem.detail)


def load_splits(config: TrainingConfig) -> dict[str, CaptionData]:
    """`train` and, unless turned off, `validation`, with all datasets of the settings joined.

    Tasks without audio get the captions alone.

    Raises:
        ValueError, OSError: if a split is not there, or has no clips to train on.
    """
    audio = isinstance(config, AudioTrainingConfig)
    options = {"columns": column_mapping(config.columns) or None, "needs_audio": audio}
    options |= {"allow_missing": audio and config.allow_missing}

    def load(split: str) -> CaptionData:
        return join(
            load_captions(name, folder, split=split, audio_dir=audio_dir, **options)
            for name, folder, audio_dir in config.sources()
        )

    splits, share = {"train": load(config.train_split)}, config.validation_share
    if share:
        whole, count = splits["train"], len(splits["train"].dataset)
        rows = held_out(count, config)
        splits = {"train": CaptionData(whole.dataset.select(rows["train"]), whole.problems)}
        splits["validation"] = CaptionData(whole.dataset.select(rows["validation"]))
    elif config.validation_split != "none":
        try:
            splits["validation"] = load(config.validation_split)
        except (OSError, ValueError) as error:
            hint = "give --validation-share 0.05; to train without validation give --validation-split none"
            raise type(error)(f"{error} (validation: to validate on a share of the training clips {hint})") from error
    limits = {"train": config.max_train_clips, "validation": config.max_validation_clips}
    for split, data in splits.items():
        if limits[split]:
            data.dataset = data.dataset.take(min(limits[split], len(data.dataset)))
    return splits


def held_out(count: int, config: TrainingConfig) -> dict[str, np.ndarray]:
    """Which of `count` clips are in `train` and in `validation`, with `validation_share`; the same in every run."""
    order = np.random.default_rng([config.seed, 2]).permutation(count)
    held = max(1, round(config.validation_share * count))
    if held >= count:
        raise ValueError(f"--validation-share {config.validation_share} of {count} clips leaves none to train on")
    return {"train": np.sort(order[held:]), "validation": np.sort(order[:held])}


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
    config: AudioTrainingConfig, encoder: Any, splits: dict[str, CaptionData]
) -> tuple[dict[str, list[Clip]], FeatureStore, DataSummary]:
    """Clips of every split with their audio encoded (see `store_features`); the cache is not computed again.

    Raises:
        ValueError: if no clip of a split can be encoded.
    """
    clips, summary = {}, DataSummary()
    options = {"batch_size": config.encode_batch_size, "workers": config.workers(PartialState().device)}
    for split, data in splits.items():
        encoded = store_features(data.dataset, encoder, config.cache_folder(), **options)
        clips[split] = clips_of(data, encoded.keys)
        if not clips[split]:
            raise ValueError(f"no clip of the {split} split could be encoded: {encoded.problems[0].detail}")
        counts = {"clips_reused": encoded.reused, "clips_encoded": encoded.encoded}
        summary.add(split, clips[split], (*data.problems, *encoded.problems), **counts)
    return clips, encoded.store, summary
