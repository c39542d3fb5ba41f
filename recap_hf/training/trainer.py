"""Training a captioner: which rows stand in a step, and what its validation says."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from .arguments import TrainingConfig
from .batches import plan_epoch
from .corpus import Corpus
from .loop import RowLoop, Step, global_batch_size
from .step import CaptionLoss
from .validation import caption_scores, held_out_scores, validation_loss, write_captions

logger = logging.getLogger(__name__)


class Trainer(RowLoop):
    """One training run of a captioner.

    Args:
        config: its settings.
        model, corpus: what is trained on what.
        trained: the trained parameters by name.
        accelerator: Accelerate's.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: Any,
        corpus: Corpus,
        trained: dict[str, torch.nn.Parameter],
        accelerator: Any,
    ) -> None:
        self.corpus = corpus
        captions = sum(len(clip.captions) for clip in corpus.train.clips)
        batch_size = global_batch_size(config, accelerator.num_processes)
        steps = math.ceil(captions / batch_size)
        module = CaptionLoss(model.decoder, model.prefix_mapper)
        super().__init__(config, model, module, trained, accelerator, batch_size, steps)
        self._lengths = corpus.train.prompt_lengths()

    def _set_training(self) -> None:
        self.model.decoder.train()

    def _steps(self, epoch: int, first: int) -> Iterator[Step]:
        config = self.config
        plan = plan_epoch(
            self.corpus.train.clips,
            self._lengths,
            self.batch_size,
            config.seed,
            epoch,
            share_prompts=config.share_prompts,
            group_by_length=config.group_by_length,
        )
        yield from self._row_steps(plan[first:], self.corpus.train, epoch)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.decoder.parameters()).dtype

    def _validation_loss(self) -> float:
        size = self.config.eval_batch_size
        return validation_loss(self.module, self.corpus.validation, size, self.accelerator, self.dtype)

    def _validate_untrained(self) -> dict[str, float]:
        return {"loss": self._validation_loss()} if self.corpus.validation is not None else {}

    def _validate(self) -> dict[str, float]:
        corpus, config = self.corpus, self.config
        if corpus.validation is None:
            return {}
        figures = {"loss": self._validation_loss()}
        batch_size = max(1, config.eval_batch_size // 4)
        if config.generation_clips:
            captions = write_captions(
                self.model, corpus.validation, config.generation_clips, batch_size, self.accelerator
            )
            references = [clip.captions for clip in corpus.validation.clips[: len(captions)]]
            figures |= caption_scores(captions, references)
            logger.info("validation caption of %s: %s", corpus.validation.clips[0].clip_id, captions[0])
        if corpus.held_out:
            captions = write_captions(self.model, corpus.held_out.builder, 0, batch_size, self.accelerator)
            figures |= held_out_scores(captions, corpus.held_out)
        return figures
