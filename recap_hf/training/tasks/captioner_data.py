"""The data of a captioner's training: clips with encoded audio, and the datastores that their prompts come from."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..collator import PromptedCaptions, with_targets
from ..data import Clip, DataSummary, load_encoded, load_splits
from ..features import AudioTower, FeatureStore
from ..neighbours import Query, find_neighbours

if TYPE_CHECKING:
    from .captioner import CaptionerTrainingConfig

logger = logging.getLogger(__name__)

# Names of `--datastore`: the training captions, found by their text or by the audio of their clips.
TRAINING, TRAINING_BY_AUDIO = "training", "training-audio"


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

    from recap_hf import open_datastore

    with PartialState().main_process_first():
        splits = load_splits(config)
    clips, store, summary = load_encoded(config, AudioTower(model, processor), splits)
    expressions = _read_expressions(config.held_out_events)
    train = _without_events(clips["train"], expressions) if expressions else clips["train"]
    cache, fingerprint = config.cache_folder(), model.embed_fingerprint(processor)

    def of_training(own: Sequence[Clip]) -> Any:
        if TRAINING_BY_AUDIO in config.datastore:
            return _store_by_audio(own, store, fingerprint)
        return _store_by_text(own, model, processor, fingerprint, cache)

    def examples(split: str, own: Sequence[Clip], searched: Sequence[Any]) -> PromptedCaptions:
        options = config.prompt_options(split, audio_dropout=config.audio_dropout)
        queries = [Query(store.read(clip.key, "embeds"), clip.clip_id, tuple(clip.captions)) for clip in own]
        top = options.draw_from or options.k
        tables = [find_neighbours(datastore, queries, top, cache) for datastore in searched]
        return PromptedCaptions(
            with_targets(own, processor, config.max_caption_tokens), store, processor, tables, options
        )

    datastores = []
    for name in config.datastore if config.num_retrieved else []:
        if name in (TRAINING, TRAINING_BY_AUDIO):
            datastores.append(of_training(train))
        else:
            datastores.append(open_datastore(name, model, processor))
            datastores[-1].check_encoder(fingerprint)
    corpus = Corpus(examples("train", train, datastores), None, None, datastores[0] if datastores else None, summary)
    if "validation" in clips:
        corpus.validation = examples("validation", clips["validation"], datastores)
        if expressions:
            named = [clip for clip in clips["validation"] if _events(clip.captions, expressions)]
            if not named:
                raise ValueError("--held-out-events: no validation clip's references name one of the events")
            everything = [of_training(clips["train"])] if config.num_retrieved else []
            corpus.held_out = HeldOut(examples("validation", named, everything), expressions)
    return corpus


def _store_by_text(clips: Sequence[Clip], model: Any, processor: Any, fingerprint: np.ndarray, cache: Path) -> Any:
    """A datastore of the clips' captions, embedded once for all processes and later runs."""
    from accelerate import PartialState

    from recap_hf import CaptionDatastore

    records, state = [record for clip in clips for record in clip.records()], PartialState()
    digest = hashlib.blake2b(np.round(fingerprint, 4).astype(np.float32).tobytes(), digest_size=8)
    digest.update(json.dumps(records, sort_keys=True).encode())
    folder = cache / f"datastore-{digest.hexdigest()}"
    if state.is_main_process and not (folder / "datastore.json").is_file():
        logger.info("Embedding %d captions for the datastore", len(records))
        CaptionDatastore.from_captions(records, model, processor).save_pretrained(folder)
    state.wait_for_everyone()
    return CaptionDatastore.from_pretrained(folder)


def _store_by_audio(clips: Sequence[Clip], store: FeatureStore, fingerprint: np.ndarray) -> Any:
    """A datastore of the clips' captions, found by the audio of their clips."""
    from recap_hf import CaptionDatastore
    from recap_hf.datastore import clip_keys

    records = [record for clip in clips for record in clip.records()]
    keys = [clip_keys(store.read(clip.key, "embeds")[None])[0] for clip in clips for _ in clip.captions]
    return CaptionDatastore.from_embeddings(records, np.stack(keys), fingerprint, keys="audio")


# ------------------------------------------------------------- held-out events


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
            found, events = _events([caption], self.expressions), _events(clip.captions, self.expressions)
            right, named, wanted = right + len(found & events), named + len(found), wanted + len(events)
        scores = {"precision": right / max(1, named), "recall": right / max(1, wanted)}
        scores["f1"] = 2 * right / max(1, named + wanted)
        return {f"held_out_{name}": value for name, value in scores.items()}


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


def _events(captions: Sequence[str], expressions: dict[str, re.Pattern]) -> set[str]:
    """The events that one of the captions names."""
    return {event for event, expression in expressions.items() if any(map(expression.search, captions))}


def _without_events(clips: Sequence[Clip], expressions: dict[str, re.Pattern]) -> list[Clip]:
    kept = [replace(c, captions=[t for t in c.captions if not _events([t], expressions)]) for c in clips]
    before, after = (sum(len(clip.captions) for clip in own) for own in (clips, kept))
    logger.info("Held-out events: %d of %d training captions are left out", before - after, before)
    if not after:
        raise ValueError("--held-out-events leaves no training caption")
    return [clip for clip in kept if clip.captions]
