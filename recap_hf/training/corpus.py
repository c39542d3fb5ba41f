"""The clips of a run: loaded, joined, encoded, with their datastores searched."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.data import CaptionData, join, load_captions
from recap_hf.data.schema import Problem

from .arguments import TrainingConfig
from .batches import BatchBuilder, Clip, PromptOptions, tokenize_targets
from .encoding import EncodedDataset, encode_dataset
from .features import FeatureStore
from .neighbours import Neighbours, Query, find_neighbours
from .options import AudioConfig, RunConfig

logger = logging.getLogger(__name__)

# Names of `--datastore`: the training captions, found by what they say or by the audio of their clips.
TRAINING, TRAINING_BY_AUDIO = "training", "training-audio"


@dataclass
class Corpus:
    """Everything that a run reads.

    Args:
        train, validation: batches of the training and validation clips; `validation` is None without such clips.
        held_out: batches of the validation clips that name a held-out event, prompted from all captions.
        datastore: the one that is saved with the captioner.
        problems: what was left out, by split.
        counts: clips and captions, by split.
    """

    train: BatchBuilder
    validation: BatchBuilder | None
    held_out: HeldOut | None
    datastore: Any
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    features: FeatureStore | None = None


@dataclass
class HeldOut:
    """Events that no training caption names, and the clips to look for them in.

    Args:
        builder: batches of those clips; their datastore does have captions of the events.
        expressions: event -> compiled expression.
        events: for each clip, the events that its references name.
    """

    builder: BatchBuilder
    expressions: dict[str, re.Pattern]
    events: list[set[str]]


def load_splits(config: RunConfig) -> tuple[CaptionData, CaptionData | None]:
    """Training and validation data as the configuration names them, all datasets joined; captions alone for a run
    that hears nothing."""
    options: dict[str, Any] = {"columns": config.column_mapping() or None}
    hears = isinstance(config, AudioConfig)
    options |= {"allow_missing": config.allow_missing} if hears else {"needs_audio": False}

    def load(split: str) -> CaptionData:
        return join(
            load_captions(name, folder, split=split, audio_dir=audio, **options)
            for name, folder, audio in config.sources()
        )

    train = load(config.train_split)
    if config.validation_share:
        train, validation = _share(train, config.validation_share, config.seed)
    elif config.validation_split == "none":
        validation = None
    else:
        try:
            validation = load(config.validation_split)
        except (OSError, ValueError) as error:
            raise type(error)(
                f"{error} (validation: to validate on a share of the training clips give --validation-share 0.05, to "
                "do without give --validation-split none)"
            ) from error
    return _first(train, config.max_train_clips), validation and _first(validation, config.max_validation_clips)


def _share(data: CaptionData, share: float, seed: int) -> tuple[CaptionData, CaptionData]:
    order = np.random.default_rng([seed, 2]).permutation(len(data.dataset))
    held = max(1, round(share * len(order)))
    if held >= len(order):
        raise ValueError(f"--validation-share {share} of {len(order)} clips leaves none to train on")
    validation, train = np.sort(order[:held]), np.sort(order[held:])
    return CaptionData(data.dataset.select(train), data.problems), CaptionData(data.dataset.select(validation))


def _first(data: CaptionData, limit: int) -> CaptionData:
    if limit and limit < len(data.dataset):
        return CaptionData(data.dataset.select(range(limit)), data.problems)
    return data


def build_corpus(config: TrainingConfig, model: Any, processor: Any) -> Corpus:
    """Load, encode and search everything; what is in the caches is not computed again."""
    from accelerate import PartialState

    with PartialState().main_process_first():
        train, validation = load_splits(config)
    cache, options = config.cache_folder(), config.encoding_options()
    expressions = _expressions(config.held_out_events)
    splits = {"train": train} | ({"validation": validation} if validation else {})
    clips: dict[str, list[Clip]] = {}
    store: FeatureStore | None = None
    problems, counts = [], {}
    for split, data in splits.items():
        encoded = encode_dataset(data.dataset, model, processor, options)
        store = encoded.store
        clips[split] = _clips(data, encoded, processor, config.max_caption_tokens)
        if not clips[split]:
            raise ValueError(f"no clip of the {split} split could be encoded: {encoded.problems[0].detail}")
        problems += [(split, problem) for problem in (*data.problems, *encoded.problems)]
        counts[split] = {"clips": len(clips[split]), "captions": sum(len(clip.captions) for clip in clips[split])}
        counts[split] |= {"clips_reused": encoded.reused, "clips_encoded": encoded.encoded}
    records = caption_records(train, {clip.clip_id for clip in clips["train"]})
    training_records, training_clips = records, clips["train"]
    if expressions:
        training_records = [record for record in records if not _named(record["caption"], expressions)]
        training_clips = _without_events(clips["train"], expressions)
        logger.info(
            "Held-out events: %d of %d training captions are left out",
            len(records) - len(training_records),
            len(records),
        )
    keys = {clip.clip_id: clip.key for clip in clips["train"]}
    search = _Search(config, model, processor, store, cache, training_records, keys)
    train_tables, datastores = search.tables(training_clips, config.draw_from or config.num_retrieved)
    drawn = PromptOptions(
        config.num_retrieved,
        draw_from=config.draw_from,
        shuffle=config.shuffle_prompt,
        audio_dropout=config.audio_dropout,
        seed=config.seed,
    )
    plain = PromptOptions(config.num_retrieved)
    corpus = Corpus(
        train=BatchBuilder(training_clips, store, processor, train_tables, drawn),
        validation=None,
        held_out=None,
        datastore=datastores[0] if datastores else None,
        problems=problems,
        counts=counts,
        sources=data_sources(train),
        features=store,
    )
    if "validation" in clips:
        tables, _ = search.tables(clips["validation"], config.num_retrieved)
        corpus.validation = BatchBuilder(clips["validation"], store, processor, tables, plain)
        if expressions:
            corpus.held_out = _held_out(clips["validation"], expressions, search, records, plain)
    return corpus


class _Search:
    """The datastores of a run and their searches."""

    def __init__(
        self,
        config: TrainingConfig,
        model: Any,
        processor: Any,
        store: FeatureStore,
        cache: Path,
        records: list[dict],
        keys: dict[str, str],
    ) -> None:
        self.config, self.model, self.processor = config, model, processor
        # Where the features of a training clip lie, by its id.
        self.store, self.cache, self._keys = store, cache, keys
        self._records = records
        self._datastores: list[Any] | None = None

    def datastores(self) -> list[Any]:
        """Those of `--datastore`, opened once; 'training' and 'training-audio' are made of the training captions."""
        from recap_hf import open_datastore

        if self._datastores is None:
            self._datastores = []
            for name in self.config.datastore if self.config.num_retrieved else []:
                if name in (TRAINING, TRAINING_BY_AUDIO):
                    self._datastores.append(self.of(self._records))
                else:
                    datastore = open_datastore(name, self.model, self.processor)
                    datastore.check_encoder(self.model.embed_fingerprint(self.processor))
                    self._datastores.append(datastore)
        return self._datastores

    def of(self, records: list[dict]) -> Any:
        """A datastore of some training captions, keyed as `--datastore` says."""
        return self.key_by_audio(records) if TRAINING_BY_AUDIO in self.config.datastore else self.embed(records)

    def embed(self, records: list[dict]) -> Any:
        """A datastore of some captions; every text once, embedded once for all processes."""
        from accelerate import PartialState

        from recap_hf import CaptionDatastore

        folder = self.cache / f"datastore-{_records_key(records, self.model.embed_fingerprint(self.processor))}"
        state = PartialState()
        if state.is_main_process and not (folder / "datastore.json").is_file():
            logger.info("Embedding %d captions for the datastore", len(records))
            CaptionDatastore.from_captions(records, self.model, self.processor).save_pretrained(folder)
        state.wait_for_everyone()
        return CaptionDatastore.from_pretrained(folder)

    def key_by_audio(self, records: list[dict]) -> Any:
        """A datastore of some captions that is keyed by the audio of their clips, which is encoded already."""
        from recap_hf import CaptionDatastore
        from recap_hf.modeling.audio_keys_recap import clip_keys

        keys = {
            clip_id: clip_keys(self.store.audio_embeds(self._keys[clip_id])[None])[0]
            for clip_id in {record["clip_id"] for record in records}
        }
        return CaptionDatastore.from_embeddings(
            records,
            np.stack([keys[record["clip_id"]] for record in records]),
            self.model.embed_fingerprint(self.processor),
            keys="audio",
        )

    def tables(self, clips: Sequence[Clip], top: int) -> tuple[list[Neighbours], list[Any]]:
        """Neighbours of the clips in every datastore."""
        datastores = self.datastores()
        return [self.table(datastore, clips, top) for datastore in datastores], datastores

    def table(self, datastore: Any, clips: Sequence[Clip], top: int) -> Neighbours:
        """Neighbours of the clips in one datastore."""
        queries = [Query(clip.key, clip.clip_id, tuple(clip.captions)) for clip in clips]
        return find_neighbours(datastore, self.store, queries, top, self.cache)


def _clips(data: CaptionData, encoded: EncodedDataset, processor: Any, max_caption_tokens: int) -> list[Clip]:
    captions, clip_ids = data.dataset["captions"][:], data.dataset["clip_id"][:]
    rows = [row for row, key in enumerate(encoded.keys) if key is not None]
    flat = tokenize_targets([text for row in rows for text in captions[row]], processor, max_caption_tokens)
    clips, start = [], 0
    for row in rows:
        count = len(captions[row])
        clips.append(Clip(encoded.keys[row], clip_ids[row], list(captions[row]), flat[start : start + count]))
        start += count
    return clips


def caption_records(data: CaptionData, usable: set[str]) -> list[dict[str, Any]]:
    """The captions of the usable clips for a datastore, with what they come from."""
    columns = (data.dataset[name][:] for name in ("clip_id", "captions", "source", "licence"))
    return [
        {"caption": caption, "clip_id": clip_id, "source": source} | ({"licence": licence} if licence else {})
        for clip_id, captions, source, licence in zip(*columns, strict=True)
        if clip_id in usable
        for caption in captions
    ]


def _records_key(records: list[dict[str, Any]], fingerprint: np.ndarray) -> str:
    import hashlib

    digest = hashlib.blake2b(np.round(fingerprint, 4).astype(np.float32).tobytes(), digest_size=8)
    digest.update(json.dumps(records, sort_keys=True).encode())
    return digest.hexdigest()


def data_sources(data: CaptionData) -> list[dict[str, Any]]:
    """Name, licence, clips and captions of each joined dataset."""
    found: dict[tuple, dict[str, Any]] = {}
    columns = (data.dataset[name][:] for name in ("source", "licence", "captions"))
    for source, licence, captions in zip(*columns, strict=True):
        entry = found.setdefault((source, licence), {"name": source, "licence": licence, "clips": 0, "captions": 0})
        entry["clips"] += 1
        entry["captions"] += len(captions)
    return list(found.values())


def _expressions(path: str) -> dict[str, re.Pattern]:
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
        pairs = [pair for pair in zip(clip.captions, clip.targets, strict=True) if not _named(pair[0], expressions)]
        if pairs:
            kept.append(Clip(clip.key, clip.clip_id, [text for text, _ in pairs], [ids for _, ids in pairs]))
    if not kept:
        raise ValueError("--held-out-events leaves no training caption")
    return kept


def _held_out(
    clips: Sequence[Clip],
    expressions: dict[str, re.Pattern],
    search: _Search,
    records: list[dict[str, Any]],
    options: PromptOptions,
) -> HeldOut:
    events = [set.union(*(_named(text, expressions) for text in clip.captions)) for clip in clips]
    chosen = [number for number, names in enumerate(events) if names]
    if not chosen:
        raise ValueError("--held-out-events: no validation clip's references name one of the events")
    clips = [clips[number] for number in chosen]
    tables = [search.table(search.of(records), clips, options.k)] if options.k else []
    builder = BatchBuilder(clips, search.store, search.processor, tables, options)
    return HeldOut(builder, expressions, [events[number] for number in chosen])
