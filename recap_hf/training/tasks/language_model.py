"""Training of a GPT-2 on retrieval prompts and captions: `recap pretrain language-model`."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recap_hf import (
    CaptionDatastore,
    RecapFeatureExtractor,
    RecapForConditionalGeneration,
    RecapProcessor,
    open_datastore,
)
from recap_hf.modeling.options_recap import PAPER_PROMPT

from ..config import AT_LEAST_1, NOT_NEGATIVE, TrainingConfig, option, other_default, require
from ..data import Clip, DataSummary, clips_of, load_splits
from ..loss import CaptionLoss, checkpoint_activations, fuse_activations
from ..neighbours import Neighbours, Query, find_neighbours
from .bases import BaseTrainingConfig, load_clap, load_gpt2, set_dropout, train_tokenizer
from .prompted import PromptConfig, PromptedTask

logger = logging.getLogger(__name__)


@dataclass
class LanguageModelTrainingConfig(BaseTrainingConfig, PromptConfig):
    """Every setting of a GPT-2's training, from scratch or from an existing one."""

    decoder: str = option("model", "", "GPT-2 or RECAP checkpoint, or 'embedded', to continue; else from scratch")
    num_layers: int = option("model", 4, "from scratch: layers", check=AT_LEAST_1)
    width: int = option("model", 192, "from scratch: width of the hidden states", check=AT_LEAST_1)
    num_heads: int = option("model", 4, "from scratch: heads", check=AT_LEAST_1)
    max_positions: int = option("model", 512, "from scratch: longest text in tokens")

    clap: str = option("prompts", "", "CLAP: prompts hold the captions nearest to the target, else others of its clip")
    datastore: str = option("prompts", "", "with --clap: folder, Hub id or file to take the nearest captions from")
    prompt_dropout: float = other_default(PromptConfig, "prompt_dropout", 0.1)
    prompt_weight: float = option("prompts", 0.1, "loss of a prompt's token; a caption's is 1", check=NOT_NEGATIVE)

    learning_rate: float = other_default(TrainingConfig, "learning_rate", 5e-4)
    num_train_epochs: float = other_default(TrainingConfig, "num_train_epochs", 10.0)
    metric_for_best_model: str = other_default(
        TrainingConfig, "metric_for_best_model", "perplexity", choices=["perplexity"]
    )

    def check(self) -> None:
        super().check()
        require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of --num-heads ({self.num_heads})")
        smallest = 2 * self.max_caption_tokens
        require(self.max_positions >= smallest, "max_positions", self.max_positions, f"at least {smallest}")
        if self.datastore and not self.clap:
            raise ValueError("--datastore is searched by embeddings of captions: give --clap, too")

    def build_task(self, accelerator: Any) -> "LanguageModelTask":
        with accelerator.main_process_first():
            loaded = load_splits(self)
        splits, summary = {split: clips_of(data) for split, data in loaded.items()}, DataSummary()
        for split, clips in splits.items():
            summary.add(split, clips, loaded[split].problems)
        model, tokenizer = self._start(splits["train"], accelerator)
        room = model.config.n_positions - self.max_caption_tokens - 1
        # Only for its prompts.
        processor = RecapProcessor(RecapFeatureExtractor(), tokenizer, tokenizer, max_prompt_tokens=room)
        tables, examples = _nearest_captions(self, splits, model, processor), {}
        for split, clips in splits.items():
            # Every caption has its own prompt.
            single = [replace(clip, captions=[text]) for clip in clips for text in clip.captions]
            examples[split] = self.examples(split, single, processor, tables[split], None)
        set_dropout(model, self.dropout)
        fuse_activations(model)
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        model.to(accelerator.device)
        return LanguageModelTask(self, accelerator, model, CaptionLoss(model), examples, summary, self.prompt_weight)

    def _start(self, clips: list[Clip], accelerator: Any) -> tuple[Any, Any]:
        """The GPT-2 to train and its tokenizer."""
        torch.manual_seed(self.seed)
        if self.decoder:
            return load_gpt2(self.decoder)
        start = PAPER_PROMPT.target_prefix
        corpus = (PAPER_PROMPT.build([text]) + start + text for clip in clips for text in clip.captions)
        folder = Path(self.output_dir) / "tokenizer"
        tokenizer = train_tokenizer(corpus, "gpt2", self.vocab_size, self.max_positions, folder, accelerator)
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        sizes = {"n_positions": self.max_positions, "n_embd": self.width, "n_layer": self.num_layers}
        config = GPT2Config(vocab_size=len(tokenizer), n_head=self.num_heads, **sizes, **tokens)
        return GPT2LMHeadModel(config), tokenizer


class LanguageModelTask(PromptedTask):
    """Training of a GPT-2; the arguments are those of `PromptedTask`."""

    kind = "language-model"

    def validate(self) -> dict[str, float]:
        """Perplexity of captions behind their prompts, and behind prompts without captions."""
        if self.validation is None:
            return {}
        loss = self.mean_loss(self.validation)
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.validation.neighbours:
            bare = self.mean_loss(self.validation.without_captions())
            figures["perplexity_without_captions"] = math.exp(min(bare, 700.0))
        return figures

    def save(self, folder: Path) -> None:
        """A folder that `GPT2LMHeadModel` and `AutoTokenizer` load."""
        self.model.save_pretrained(folder)
        self.examples.processor.tokenizer.save_pretrained(folder)


def _nearest_captions(
    config: LanguageModelTrainingConfig, splits: dict[str, list[Clip]], model: Any, processor: Any
) -> dict[str, list[Neighbours]]:
    """For each caption of a split the captions that its prompt may hold: one table, or none without retrieval."""
    if not config.num_retrieved or not config.clap:
        return {split: [_same_clip(clips)] if config.num_retrieved else [] for split, clips in splits.items()}
    clap, clap_tokenizer, extractor = load_clap(config.clap, with_texts=True)
    captioner = RecapForConditionalGeneration.from_clap_gpt2_pretrained(clap, model)
    parts = (captioner.config, processor.tokenizer, clap_tokenizer)
    embedder = RecapProcessor.from_config(*parts, feature_extractor=extractor)
    if config.datastore:
        store = open_datastore(config.datastore, captioner, embedder)
        store.check_encoder(captioner.embed_fingerprint(embedder))
    else:
        records = [record for clip in splits["train"] for record in clip.records()]
        logger.info("Embedding %d captions", len(records))
        store = CaptionDatastore.from_captions(records, captioner, embedder)
    tables = {}
    for split, clips in splits.items():
        texts = [(clip, text) for clip in clips for text in clip.captions]
        embeds = captioner.embed_captions([text for _, text in texts], processor=embedder)
        pairs = zip(embeds, texts, strict=True)
        queries = [Query(own[None], clip.clip_id, tuple(clip.captions)) for own, (clip, _) in pairs]
        cache = Path(config.output_dir) / "neighbours"
        top = config.draw_from or config.num_retrieved
        tables[split] = [find_neighbours(store, queries, top, cache, config.retrieval_diversity)]
    return tables


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
            "%d of %d captions are the only ones of their clip, and their prompts empty: with --clap prompts hold the "
            "nearest captions",
            alone, len(rows),
        )  # fmt: skip
    width = max(1, *map(len, rows))
    return Neighbours(np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32), captions)
