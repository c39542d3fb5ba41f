"""The data of a captioner's training: clips with encoded audio, and the datastores that their prompts come from."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..collator import PromptedCaptions, PromptedClip, PromptOptions, tokenize_targets
from ..data import Clip, DataSummary, load_encoded, load_splits
from ..encoding import AudioTower
from ..features import FeatureStore
from ..neighbours import Neighbours, Query, find_neighbours

if TYPE_CHECKING:
    from .captioner import CaptionerTrainingConfig

logger = logging.getLogger(__name__)

# Names of `--datastore`: the training captions, found by their text or by the audio of their clips.
TRAINING, TRAINING_BY_AUDIO = "training", "training-audio"


@dataclass
class HeldOut:
    """Events that no training caption names, and the validation clips that name one.

    Args:
        examples: those clips; their prompts come from all captions, events included.
        expressions: event -> compiled expression.
    """

    examples: PromptedCaptions
    expressions: dict[str, re.Pattern]

    def scores(self, captions: Sequence[str]) -> dict[str, float]:
        """Precision, recall and F1 of naming the events, for one caption per clip."""
        right = named = wanted = 0
        for caption, clip in zip(captions, self.examples.clips, strict=True):
            events = set.union(*(_named(text, self.expressions) for text in clip.captions))
            found = _named(caption, self.expressions)
            right, named, wanted = right + len(found & events), named + len(found), wanted + len(events)
        f1 = 2 * right / (named + wanted) if right else 0.0
        precision, recall = right / max(1, named), right / max(1, wanted)
        return {"held_out_precision": precision, "held_out_recall": recall, "held_out_f1": f1}


@dataclass
class Corpus:
    """Everything that a run reads.

    Args:
        train, validation: examples; `validation` is None without such clips.
        held_out: examples for `--held-out-events`, or None.
        datastore: is saved with the captioner; None without retrieval.
        summary: counts, sources, problems.
    """

    train: PromptedCaptions
    validation: PromptedCaptions | None
    held_out: HeldOut | None
    datastore: Any
    summary: DataSummary


def build_corpus(config: CaptionerTrainingConfig, model: Any, processor: Any) -> Corpus:
    """Load, encode and search everything; what is in the caches is not computed again."""
    from accelerate import PartialState

    with PartialState().main_process_first():
        splits = load_splits(config)
    clips, store, summary = load_encoded(config, AudioTower(model, processor), splits)
    train, records = clips["train"], [record for clip in clips["train"] for record in clip.records()]
    expressions = _read_expressions(config.held_out_events)
    kept = records
    if expressions:
        train = _without_events(train, expressions)
        kept = [record for record in records if not _named(record["caption"], expressions)]
        logger.info("Held-out events: %d of %d training captions are left out", len(records) - len(kept), len(records))
    # Keyed by the audio of their clips, if a datastore is to be.
    keys = {clip.clip_id: clip.key for clip in clips["train"]}
    sources = _Datastores(config, model, processor, store, keys)
    datastores = [sources.open(name, kept) for name in config.datastore] if config.num_retrieved else []

    def examples(own: Sequence[Clip], searched: Sequence[Any], options: PromptOptions) -> PromptedCaptions:
        prompted = _prompted(own, processor, config.max_caption_tokens)
        tables = [sources.search(datastore, prompted, options.draw_from or options.k) for datastore in searched]
        return PromptedCaptions(prompted, store, processor, tables, options)

    plain = PromptOptions(config.num_retrieved)
    drawn = PromptOptions(
        config.num_retrieved, config.draw_from, config.shuffle_prompt, config.audio_dropout, seed=config.seed
    )
    corpus = Corpus(examples(train, datastores, drawn), None, None, datastores[0] if datastores else None, summary)
    if "validation" in clips:
        corpus.validation = examples(clips["validation"], datastores, plain)
        if expressions:
            named = [clip for clip in clips["validation"] if any(_named(text, expressions) for text in clip.captions)]
            if not named:
                raise ValueError("--held-out-events: no validation clip's references name one of the events")
            everything = [sources.of_training(records)] if plain.k else []
            corpus.held_out = HeldOut(examples(named, everything, plain), expressions)
    return corpus


def _prompted(clips: Sequence[Clip], processor: Any, max_caption_tokens: int) -> list[PromptedClip]:
    flat = [text for clip in clips for text in clip.captions]
    targets = iter(tokenize_targets(flat, processor, max_caption_tokens))
    return [
        PromptedClip(clip.key, clip.clip_id, clip.captions, [next(targets) for _ in clip.captions]) for clip in clips
    ]


class _Datastores:
    """Opens, makes and searches the datastores of a run.

    Args:
        config, model, processor: of the run.
        store: encoded audio.
        keys: clip id -> key of a training clip's audio in it.
    """

    def __init__(
        self,
        config: CaptionerTrainingConfig,
        model: Any,
        processor: Any,
        store: FeatureStore,
        keys: dict[str, str],
    ) -> None:
        self.model, self.processor, self.store, self.keys = model, processor, store, keys
        self.cache, self.by_audio = config.cache_folder(), TRAINING_BY_AUDIO in config.datastore

    def open(self, name: str, records: list[dict[str, Any]]) -> Any:
        """The datastore of that name; `training` and `training-audio` hold `records`."""
        from recap_hf import open_datastore

        if name in (TRAINING, TRAINING_BY_AUDIO):
            return self.of_training(records)
        datastore = open_datastore(name, self.model, self.processor)
        datastore.check_encoder(self.model.embed_fingerprint(self.processor))
        return datastore

    def of_training(self, records: list[dict[str, Any]]) -> Any:
        """A datastore of training captions, found as `--datastore` says."""
        from recap_hf import CaptionDatastore

        if not self.by_audio:
            return self._of_texts(records)
        from recap_hf.modeling.audio_keys_recap import clip_keys

        clip_ids = {record["clip_id"] for record in records}
        keys = {clip_id: clip_keys(self.store.audio_embeds(self.keys[clip_id])[None])[0] for clip_id in clip_ids}
        embeddings = np.stack([keys[record["clip_id"]] for record in records])
        fingerprint = self.model.embed_fingerprint(self.processor)
        return CaptionDatastore.from_embeddings(records, embeddings, fingerprint, keys="audio")

    def _of_texts(self, records: list[dict[str, Any]]) -> Any:
        """A datastore of captions by their text embeddings, made once for all processes and later runs."""
        from accelerate import PartialState

        from recap_hf import CaptionDatastore

        fingerprint = np.round(self.model.embed_fingerprint(self.processor), 4).astype(np.float32)
        digest = hashlib.blake2b(fingerprint.tobytes(), digest_size=8)
        digest.update(json.dumps(records, sort_keys=True).encode())
        folder, state = self.cache / f"datastore-{digest.hexdigest()}", PartialState()
        if state.is_main_process and not (folder / "datastore.json").is_file():
            logger.info("Embedding %d captions for the datastore", len(records))
            CaptionDatastore.from_captions(records, self.model, self.processor).save_pretrained(folder)
        state.wait_for_everyone()
        return CaptionDatastore.from_pretrained(folder)

    def search(self, datastore: Any, clips: Sequence[PromptedClip], top: int) -> Neighbours:
        """The captions nearest to each clip, without its own."""
        queries = [Query(self.store.audio_embeds(clip.key), clip.clip_id, tuple(clip.captions)) for clip in clips]
        return find_neighbours(datastore, queries, top, self.cache)


def _read_expressions(path: str) -> dict[str, re.Pattern]:
    if not path:
        return {}
    events = json.loads(Path(path).read_text(encoding="utf-8"))
    events = events.get("events", events) if isinstance(events, dict) else events
    if not isinstance(events, dict) or not events or not all(isinstance(value, str) for value in events.values()):
        raise ValueError(f"--held-out-events {path}: expected a JSON object of event names and regular expressions")
    try:
        return {event: re.compile(expression, re.IGNORECASE) for event, expression in events.items()}
    except re.error as error:
        raise ValueError(f"--held-out-events {path}: {error}") from error


def _named(caption: str, expressions: dict[str, re.Pattern]) -> set[str]:
    return {event for event, expression in expressions.items() if expression.search(caption)}


def _without_events(clips: Sequence[Clip], expressions: dict[str, re.Pattern]) -> list[Clip]:
    kept = []
    for clip in clips:
        captions = [text for text in clip.captions if not _named(text, expressions)]
        if captions:
            kept.append(Clip(clip.clip_id, captions, clip.source, clip.licence, clip.key))
    if not kept:
        raise ValueError("--held-out-events leaves no training caption")
    return kept
