"""Training of a GPT-2 on retrieval prompts and captions: `recap pretrain language-model`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.options_recap import PAPER_PROMPT

from ..collator import PromptedCaptions, with_targets
from ..config import AT_LEAST_1, NOT_NEGATIVE, SHARE, TrainingConfig, option, other_default, require
from ..data import Clip, DataSummary, clips_of, divide, load_splits
from ..loss import CaptionLoss, checkpoint_activations, fuse_activations
from ..neighbours import Neighbours, Query, find_neighbours
from .bases import BaseTrainingConfig, load_clap, load_gpt2, set_dropout, train_tokenizer
from .prompted import PromptConfig, PromptedTask

logger = logging.getLogger(__name__)

_DEFAULT_VALIDATION_SHARE = 0.05


@dataclass
class LanguageModelTrainingConfig(BaseTrainingConfig, PromptConfig):
    """Every setting of a GPT-2's training, from scratch or from an existing one."""

    decoder: str = option(
        "model",
        "",
        "GPT-2 or RECAP checkpoint to continue the GPT-2 of ('embedded': the default's); without it, from scratch",
    )
    num_layers: int = option("model", 4, "from scratch: layers", check=AT_LEAST_1)
    width: int = option("model", 192, "from scratch: width of the hidden states", check=AT_LEAST_1)
    num_heads: int = option("model", 4, "from scratch: heads", check=AT_LEAST_1)
    max_positions: int = option("model", 512, "from scratch: longest text in tokens")

    datastore: str = option(
        "prompts",
        "",
        "folder, Hub id or caption file: prompts hold the captions nearest to the target; without --dataset it is the "
        "corpus, too",
    )
    clap: str = option(
        "prompts",
        "",
        "CLAP checkpoint that embeds the captions, for prompts of nearest captions: those of --datastore, or the "
        "training captions. Without both, prompts hold the other captions of the same clip",
    )
    prompt_dropout: float = option("prompts", 0.1, "share of examples without captions in their prompt", check=SHARE)
    prompt_weight: float = option(
        "prompts", 0.1, "weight of a prompt's token in the loss; a caption's is 1", check=NOT_NEGATIVE
    )

    learning_rate: float = other_default(TrainingConfig, "learning_rate", 5e-4)
    num_train_epochs: float = other_default(TrainingConfig, "num_train_epochs", 10.0)
    metric_for_best_model: str = other_default(
        TrainingConfig, "metric_for_best_model", "perplexity", choices=["perplexity"]
    )

    @property
    def needs_dataset(self) -> bool:
        return not self.datastore

    def check(self) -> None:
        super().check()
        require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of --num-heads ({self.num_heads})")
        smallest = 2 * self.max_caption_tokens
        require(self.max_positions >= smallest, "max_positions", self.max_positions, f"at least {smallest}")

    def build_task(self, accelerator: Any) -> LanguageModelTask:
        from recap_hf import RecapFeatureExtractor, RecapProcessor

        with accelerator.main_process_first():
            splits, summary = _load_texts(self) if self.dataset else _texts_of_datastore(self)
        model, tokenizer = self._start(splits["train"], accelerator)
        room = model.config.n_positions - self.max_caption_tokens - 1
        # Only for its prompts.
        processor = RecapProcessor(RecapFeatureExtractor(), tokenizer, tokenizer, max_prompt_tokens=room)
        tables, examples = _nearest_captions(self, splits, model, processor), {}
        for split, clips in splits.items():
            # Every caption has its own prompt.
            single = [replace(clip, captions=[text]) for clip in clips for text in clip.captions]
            targets = with_targets(single, processor, self.max_caption_tokens)
            options = self.prompt_options(split, prompt_dropout=self.prompt_dropout)
            examples[split] = PromptedCaptions(targets, None, processor, tables[split], options)
        set_dropout(model, self.dropout)
        fuse_activations(model)
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        model.to(accelerator.device)
        data = (examples["train"], examples.get("validation"), summary)
        return LanguageModelTask(self, accelerator, model, CaptionLoss(model), *data, self.prompt_weight)

    def _start(self, clips: list[Clip], accelerator: Any) -> tuple[Any, Any]:
        """The GPT-2 to train and its tokenizer."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(self.seed)
        if self.decoder:
            return load_gpt2(self.decoder)
        corpus = (
            PAPER_PROMPT.build([text]) + PAPER_PROMPT.target_prefix + text for clip in clips for text in clip.captions
        )
        folder = Path(self.output_dir) / "tokenizer"
        tokenizer = train_tokenizer(corpus, "gpt2", self.vocab_size, self.max_positions, folder, accelerator)
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        sizes = {"n_positions": self.max_positions, "n_embd": self.width, "n_layer": self.num_layers}
        config = GPT2Config(vocab_size=len(tokenizer), n_head=self.num_heads, **sizes, **tokens)
        return GPT2LMHeadModel(config), tokenizer


class LanguageModelTask(PromptedTask):
    """Training of a GPT-2; the arguments are those of `PromptedTask`."""

    kind = "language-model"
    loss_name = "cross-entropy per token"

    def validate(self, before_training: bool = False) -> dict[str, float]:
        """Perplexity of captions behind their prompts, and behind prompts without captions."""
        if self.validation is None:
            return {}
        loss = self.mean_loss(self.validation)
        figures = {"loss": loss, "perplexity": _perplexity(loss)}
        if self.validation.neighbours:
            bare = self.mean_loss(self.validation.without_captions())
            figures["perplexity_without_captions"] = _perplexity(bare)
        return figures

    def save(self, folder: Path) -> None:
        """A folder that `GPT2LMHeadModel` and `AutoTokenizer` load."""
        self.model.save_pretrained(folder)
        self.examples.processor.tokenizer.save_pretrained(folder)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _load_texts(config: LanguageModelTrainingConfig) -> tuple[dict[str, list[Clip]], DataSummary]:
    splits, summary = {}, DataSummary()
    for split, data in load_splits(config).items():
        splits[split] = clips_of(data)
        summary.add(split, splits[split], data.problems)
    return splits, summary


def _texts_of_datastore(config: LanguageModelTrainingConfig) -> tuple[dict[str, list[Clip]], DataSummary]:
    """The captions of a datastore or caption file as the corpus, divided by clip."""
    from recap_hf import CaptionDatastore, read_captions

    path = Path(config.datastore)
    records = read_captions(path) if path.is_file() else CaptionDatastore.from_pretrained(config.datastore).records
    clips: dict[str, Clip] = {}
    for number, record in enumerate(records):
        # A caption without a clip is a clip on its own.
        clip_id = record.get("clip_id") or f"caption-{number}"
        empty = Clip(clip_id, [], record.get("source") or path.name, record.get("licence"))
        clips.setdefault(clip_id, empty).captions.append(record["caption"])
    chosen = {"train": range(len(clips))}
    if config.validation_split != "none":
        share = config.validation_share or _DEFAULT_VALIDATION_SHARE
        chosen = dict(zip(("train", "validation"), divide(len(clips), share, config.seed), strict=True))
    limits = {"train": config.max_train_clips, "validation": config.max_validation_clips}
    splits, summary, everything = {}, DataSummary(), list(clips.values())
    for split, numbers in chosen.items():
        splits[split] = [everything[number] for number in numbers[: limits[split] or None]]
        summary.add(split, splits[split])
    return splits, summary


def _nearest_captions(
    config: LanguageModelTrainingConfig, splits: dict[str, list[Clip]], model: Any, processor: Any
) -> dict[str, list[Neighbours]]:
    """For each caption of a split the captions that its prompt may hold: one table, or none without retrieval."""
    if not config.num_retrieved:
        return {split: [] for split in splits}
    if not config.datastore and not config.clap:
        return {split: [_same_clip(clips)] for split, clips in splits.items()}
    store, embed = _open_store(config, splits["train"], model, processor)
    cache, top = Path(config.output_dir) / "neighbours", config.draw_from or config.num_retrieved
    tables = {}
    for split, clips in splits.items():
        embeddings = iter(embed([text for clip in clips for text in clip.captions]))
        queries = [
            Query(next(embeddings)[None], clip.clip_id, tuple(clip.captions)) for clip in clips for _ in clip.captions
        ]
        tables[split] = [find_neighbours(store, queries, top, cache)]
    return tables


def _open_store(
    config: LanguageModelTrainingConfig, train: list[Clip], model: Any, processor: Any
) -> tuple[Any, Callable[[list[str]], np.ndarray]]:
    """The datastore to search, of the settings or of the training captions, and what embeds captions for it."""
    from recap_hf import CaptionDatastore, RecapForConditionalGeneration, RecapProcessor, open_datastore

    if not config.clap:
        if Path(config.datastore).is_file():
            raise ValueError(f"--datastore {config.datastore} holds captions without embeddings: give --clap, too")
        store = CaptionDatastore.from_pretrained(config.datastore)
        return store, partial(_stored_embeddings, config.datastore, store)
    clap, clap_tokenizer, extractor = load_clap(config.clap)
    captioner = RecapForConditionalGeneration.from_clap_gpt2_pretrained(clap, model)
    parts = (captioner.config, processor.tokenizer, clap_tokenizer)
    embedder = captioner, RecapProcessor.from_config(*parts, feature_extractor=extractor)
    if config.datastore:
        store = open_datastore(config.datastore, *embedder)
        store.check_encoder(captioner.embed_fingerprint(embedder[1]))
    else:
        records = [record for clip in train for record in clip.records()]
        logger.info("Embedding %d captions", len(records))
        store = CaptionDatastore.from_captions(records, *embedder)
    return store, partial(captioner.embed_captions, processor=embedder[1])


def _stored_embeddings(name: str, store: Any, captions: list[str]) -> np.ndarray:
    rows = {caption: row for row, caption in enumerate(store.captions)}
    missing = next((caption for caption in captions if caption not in rows), None)
    if missing is not None:
        raise ValueError(
            f"--datastore {name} holds no embedding of {missing!r}: captions from elsewhere need a text tower. Give "
            "--clap, the model that embedded it"
        )
    return np.asarray(store.embeddings, dtype=np.float32)[[rows[caption] for caption in captions]]


def _same_clip(clips: list[Clip]) -> Neighbours:
    """The other captions of each caption's clip, from the next one on, so that no caption is always the first."""
    captions = [text for clip in clips for text in clip.captions]
    rows: list[list[int]] = []
    for clip in clips:
        numbers = list(range(len(rows), len(rows) + len(clip.captions)))
        for place, number in enumerate(numbers):
            others = numbers[place + 1 :] + numbers[:place]
            rows.append([other for other in others if captions[other] != captions[number]])
    alone = sum(not row for row in rows)
    if alone:
        logger.warning(
            "%d of %d captions are the only ones of their clip, and their prompts empty: with --clap or --datastore "
            "prompts hold the nearest captions",
            alone, len(rows),
        )  # fmt: skip
    table = np.full((len(rows), max(1, *map(len, rows))), -1, dtype=np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return Neighbours(table, captions)
