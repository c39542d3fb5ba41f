"""Training of a GPT-2 on retrieval prompts and captions: `recap pretrain language-model`."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.prompt_recap import PAPER_PROMPT
from recap_hf.training.batches import BatchBuilder, Clip, PromptOptions, plan_epoch, tokenize_targets
from recap_hf.training.corpus import data_sources, load_splits
from recap_hf.training.loop import RowLoop, Step, global_batch_size
from recap_hf.training.main import log_data, open_run
from recap_hf.training.neighbours import Neighbours, Query, find_neighbours
from recap_hf.training.step import CaptionLoss, checkpoint_activations, fuse_activations
from recap_hf.training.validation import validation_loss

from .arguments import LanguageModelConfig
from .bases import load_clap, load_gpt2, new_gpt2, set_dropout, train_tokenizer
from .report import finish_base

logger = logging.getLogger(__name__)

_DEFAULT_VALIDATION_SHARE = 0.05


def pretrain_language_model(config: LanguageModelConfig) -> dict[str, Any]:
    """Train a GPT-2 and write it to `config.output_dir`, with its tokenizer.

    Returns:
        The report, on every process.

    Raises:
        ValueError, OSError, RuntimeError: with what to change.
    """
    run = open_run(config)
    started = time.monotonic()
    with run.accelerator.main_process_first():
        splits, problems, sources = _texts(config)
    model, tokenizer = _start(config, splits["train"], run.accelerator)
    processor = _processor(config, model, tokenizer)
    tables = _prompts(config, splits, model, processor)
    builders = {
        name: _builder(config, texts, tables[name], processor, name == "train") for name, texts in splits.items()
    }
    counts = {name: {"clips": len(texts.groups()), "captions": len(texts.captions)} for name, texts in splits.items()}
    log_data(counts, problems)
    set_dropout(model, config.dropout)
    fuse_activations(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    model.to(run.accelerator.device)
    loop = LanguageModelLoop(config, model, builders["train"], builders.get("validation"), run.accelerator)
    prepared = time.monotonic() - started
    progress = run.go(loop)
    data = _Described(problems, counts, sources)
    report = finish_base(config, "language-model", data, loop, progress, prepared, _Saved(model, tokenizer))
    run.accelerator.end_training()
    return report


@dataclass
class Texts:
    """Captions of a split: their texts, the clip that each belongs to, and their embeddings where they have some."""

    captions: list[str]
    clip_ids: list[str]
    embeddings: np.ndarray | None = None

    def groups(self) -> dict[str, list[int]]:
        """Captions of each clip."""
        groups: dict[str, list[int]] = {}
        for number, clip_id in enumerate(self.clip_ids):
            groups.setdefault(clip_id, []).append(number)
        return groups

    def select(self, chosen: Sequence[int]) -> Texts:
        """Some of them."""
        embeddings = None if self.embeddings is None else self.embeddings[np.asarray(chosen, dtype=int)]
        return Texts([self.captions[n] for n in chosen], [self.clip_ids[n] for n in chosen], embeddings)


@dataclass
class _Described:
    problems: list[Any]
    counts: dict[str, dict[str, int]]
    sources: list[dict[str, Any]]


class _Saved:
    """The trained GPT-2 as a folder that `GPT2LMHeadModel` and `AutoTokenizer` load."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._parts = (model, tokenizer)

    def save_pretrained(self, folder: Path) -> None:
        """Write both."""
        for part in self._parts:
            part.save_pretrained(folder)


# ------------------------------------------------------------------------- corpus


def _texts(config: LanguageModelConfig) -> tuple[dict[str, Texts], list[Any], list[dict[str, Any]]]:
    """Captions by split, what was left out, and where they come from."""
    if not config.dataset:
        return _texts_of_datastore(config)
    train, validation = load_splits(config)
    splits, problems = {}, []
    for name, data in (("train", train), ("validation", validation)):
        if data is None:
            continue
        ids, captions = data.dataset["clip_id"][:], data.dataset["captions"][:]
        pairs = [(text, clip) for clip, own in zip(ids, captions, strict=True) for text in own]
        splits[name] = Texts([text for text, _ in pairs], [clip for _, clip in pairs])
        problems += [(name, problem) for problem in data.problems]
    return splits, problems, data_sources(train)


def _texts_of_datastore(config: LanguageModelConfig) -> tuple[dict[str, Texts], list[Any], list[dict[str, Any]]]:
    from recap_hf import CaptionDatastore

    path = Path(config.datastore)
    if path.is_file():
        from recap_hf import read_captions

        records, embeddings = read_captions(path), None
    else:
        store = CaptionDatastore.from_pretrained(config.datastore)
        records, embeddings = store.records, np.asarray(store.embeddings, dtype=np.float32)
    captions = [record["caption"] for record in records]
    # A caption without a clip is a clip of its own.
    ids = [record.get("clip_id") or f"caption-{number}" for number, record in enumerate(records)]
    everything = Texts(captions, ids, embeddings)
    named: dict[tuple, dict[str, Any]] = {}
    for record in records:
        source, licence = record.get("source") or path.name, record.get("licence")
        entry = named.setdefault((source, licence), {"name": source, "licence": licence, "clips": 0, "captions": 0})
        entry["captions"] += 1
    groups = list(everything.groups().values())
    order = np.random.default_rng([config.seed, 2]).permutation(len(groups))
    held = 0
    if config.validation_split != "none":
        share = config.validation_share or _DEFAULT_VALIDATION_SHARE
        held = max(1, round(share * len(groups)))
        if held >= len(groups):
            raise ValueError(
                f"{config.datastore} holds {len(groups)} clips: too few to keep {share:.0%} for validation"
            )
    parts = {"train": (order[held:], config.max_train_clips)}
    if held:
        parts["validation"] = (order[:held], config.max_validation_clips)
    splits = {
        name: everything.select([n for group in np.sort(part)[: limit or None] for n in groups[group]])
        for name, (part, limit) in parts.items()
    }
    return splits, [], list(named.values())


# -------------------------------------------------------------------------- model


def _start(config: LanguageModelConfig, texts: Texts, accelerator: Any) -> tuple[Any, Any]:
    """The GPT-2 to train and its tokenizer."""
    from transformers import AutoTokenizer

    torch.manual_seed(config.seed)
    if config.decoder:
        return load_gpt2(config.decoder)
    folder = Path(config.output_dir) / "tokenizer"
    if accelerator.is_main_process:
        corpus = (PAPER_PROMPT.build([text]) + PAPER_PROMPT.target_prefix + text for text in texts.captions)
        train_tokenizer(corpus, "gpt2", config.vocab_size, config.max_positions).save_pretrained(folder)
    accelerator.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return new_gpt2(tokenizer, config.num_layers, config.width, config.num_heads, config.max_positions), tokenizer


def _processor(config: LanguageModelConfig, model: Any, tokenizer: Any) -> Any:
    """A captioner's processor, for its prompts."""
    from recap_hf import RecapFeatureExtractor, RecapProcessor

    room = model.config.n_positions - config.max_caption_tokens - 1
    return RecapProcessor(
        RecapFeatureExtractor(),
        tokenizer,
        tokenizer,
        num_retrieved_captions=config.num_retrieved,
        max_prompt_tokens=room,
    )


# ------------------------------------------------------------------------ prompts


def _prompts(
    config: LanguageModelConfig, splits: dict[str, Texts], model: Any, processor: Any
) -> dict[str, Neighbours | None]:
    """For each caption the captions that its prompt may hold."""
    if not config.num_retrieved:
        return dict.fromkeys(splits)
    if not config.datastore and not config.clap:
        return {name: _same_clip(texts) for name, texts in splits.items()}
    captioner = _captioner(config, model, processor.tokenizer) if config.clap else None
    store = _store(config, splits, captioner)
    top = config.draw_from or config.num_retrieved
    cache = Path(config.output_dir) / "neighbours"
    tables = {}
    for name, texts in splits.items():
        embeddings = texts.embeddings
        if embeddings is None:
            embeddings = captioner[0].embed_captions(texts.captions, captioner[1])
        own = {clip: tuple(texts.captions[n] for n in numbers) for clip, numbers in texts.groups().items()}
        queries = [Query(str(number), clip, own[clip]) for number, clip in enumerate(texts.clip_ids)]
        tables[name] = find_neighbours(store, _TextQueries(embeddings), queries, top, cache)
    return tables


def _same_clip(texts: Texts) -> Neighbours:
    """The other captions of each caption's clip, in an order that says nothing."""
    rows: list[list[int]] = [[] for _ in texts.captions]
    for numbers in texts.groups().values():
        for place, number in enumerate(numbers):
            # From the next caption on, around: the first of them is not the same one for all.
            others = numbers[place + 1 :] + numbers[:place]
            rows[number] = [n for n in others if texts.captions[n] != texts.captions[number]]
    alone = sum(not row for row in rows)
    if alone:
        logger.warning(
            "%d of %d captions are the only ones of their clip, and their prompts empty: --clap or --datastore make "
            "prompts of nearest captions",
            alone,
            len(rows),
        )
    table = np.full((len(rows), max(1, *map(len, rows))), -1, dtype=np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return Neighbours(table, texts.captions)


def _captioner(config: LanguageModelConfig, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Model and processor that embed captions."""
    from recap_hf import RecapForConditionalGeneration, RecapProcessor

    clap, clap_tokenizer, extractor = load_clap(config.clap)
    captioner = RecapForConditionalGeneration.from_clap_gpt2_pretrained(clap, model)
    return captioner, RecapProcessor.from_config(
        captioner.config, tokenizer, clap_tokenizer, feature_extractor=extractor
    )


def _store(config: LanguageModelConfig, splits: dict[str, Texts], captioner: Any) -> Any:
    """The datastore to search: a named one, or one of the training captions."""
    from recap_hf import CaptionDatastore, open_datastore

    train = splits["train"]
    if config.datastore and captioner is None:
        if train.embeddings is None:
            raise ValueError(
                f"--datastore {config.datastore} is searched by embeddings of captions, which need a text tower: give "
                "--clap, the model that embedded it"
            )
        return CaptionDatastore.from_pretrained(config.datastore)
    if config.datastore:
        store = open_datastore(config.datastore, *captioner)
        store.check_encoder(captioner[0].embed_fingerprint(captioner[1]))
        return store
    records = [{"caption": text, "clip_id": clip} for text, clip in zip(train.captions, train.clip_ids, strict=True)]
    logger.info("Embedding %d captions", len(records))
    return CaptionDatastore.from_captions(records, *captioner)


class _TextQueries:
    """Embeddings of captions in the place of a feature store's queries."""

    def __init__(self, embeddings: np.ndarray) -> None:
        self._embeddings = np.asarray(embeddings, dtype=np.float32)
        self.fingerprint = hashlib.blake2b(self._embeddings.tobytes(), digest_size=8).hexdigest()

    def audio_embeds(self, key: str) -> np.ndarray:
        """The one query of a caption, `(1, P)`."""
        return self._embeddings[int(key)][None]


def _builder(
    config: LanguageModelConfig, texts: Texts, table: Neighbours | None, processor: Any, training: bool
) -> BatchBuilder:
    targets = tokenize_targets(texts.captions, processor, config.max_caption_tokens)
    clips = [
        Clip(str(number), clip_id, [text], [target])
        for number, (text, clip_id, target) in enumerate(zip(texts.captions, texts.clip_ids, targets, strict=True))
    ]
    options = PromptOptions(config.num_retrieved)
    if training:
        options = PromptOptions(
            config.num_retrieved,
            config.draw_from,
            config.shuffle_prompt,
            prompt_dropout=config.prompt_dropout,
            seed=config.seed,
        )
    return BatchBuilder(clips, None, processor, [table] if table else [], options, prompt_targets=training)


# --------------------------------------------------------------------------- loop


class LanguageModelLoop(RowLoop):
    """One run of language-model training.

    Args:
        config: its settings.
        model: the GPT-2.
        train, validation: batches of captions, each behind its prompt; `validation` may be None.
        accelerator: Accelerate's.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        model: Any,
        train: BatchBuilder,
        validation: BatchBuilder | None,
        accelerator: Any,
    ) -> None:
        self._train, self._validation = train, validation
        size = global_batch_size(config, accelerator.num_processes)
        trained = dict(model.named_parameters())
        steps = math.ceil(len(train.clips) / size)
        super().__init__(config, model, CaptionLoss(model), trained, accelerator, size, steps)
        self._lengths = train.prompt_lengths()
        logger.info("Training %s parameters of GPT-2", f"{sum(p.numel() for p in trained.values()):,}")

    def _steps(self, epoch: int, first: int) -> Iterator[Step]:
        config = self.config
        plan = plan_epoch(
            self._train.clips,
            self._lengths,
            self.batch_size,
            config.seed,
            epoch,
            group_by_length=config.group_by_length,
        )
        yield from self._row_steps(plan[first:], self._train, epoch)

    def _weight(self, step: Step) -> float:
        """Weights of all tokens of the step: only the process that has built a prompt knows its length."""
        own = sum(share * float(self._token_weights(batch.target_captions).sum()) for share, batch in step.parts)
        total = torch.tensor(own, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(total, reduction="sum"))

    def _sum(self, losses: torch.Tensor, batch: Any) -> torch.Tensor:
        weights = self._token_weights(batch.target_captions.cpu().numpy())
        return (losses * torch.from_numpy(weights).to(losses)).sum()

    def _token_weights(self, target_captions: np.ndarray) -> np.ndarray:
        return np.where(target_captions < 0, self.config.prompt_weight, 1.0)

    def _validate(self) -> dict[str, float]:
        """Perplexity of captions behind their prompts, and behind none: what the prompt is worth."""
        if self._validation is None:
            return {}
        loss = self._loss(self._validation)
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self._validation.neighbours:
            bare = BatchBuilder(self._validation.clips, None, self._validation.processor, (), PromptOptions(0))
            figures["perplexity_without_captions"] = math.exp(min(self._loss(bare), 700.0))
        return figures

    def _loss(self, builder: BatchBuilder) -> float:
        return validation_loss(self.module, builder, self.config.eval_batch_size, self.accelerator, self.dtype)


__all__ = ["LanguageModelLoop", "Texts", "pretrain_language_model"]
