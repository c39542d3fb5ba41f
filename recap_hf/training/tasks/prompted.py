"""What the tasks of captions behind retrieval prompts have in common: the captioner and the language model."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..collator import CaptionCollator, PromptedCaptions, PromptOptions, with_targets
from ..config import AT_LEAST_1, NOT_NEGATIVE, SHARE, TrainingConfig, option, require
from ..data import Clip, DataSummary
from ..loss import CaptionLoss
from ..neighbours import Neighbours
from ..plans import Row, plan_epoch, plan_validation, split_rows
from ..task import Key, Step, Task


@dataclass
class PromptConfig(TrainingConfig):
    """Settings of the prompts and of the captions behind them."""

    num_retrieved: int = option("prompts", 4, "captions in the prompt (0: no retrieval)", check=NOT_NEGATIVE)
    draw_from: int = option(
        "prompts", 0, "draw the k captions of each epoch from this number of nearest ones (0: k)", check=NOT_NEGATIVE
    )
    retrieval_diversity: float = option(
        "prompts", 0.0, "0: the nearest captions; to 1: captions that differ from each other", check=SHARE
    )
    shuffle_prompt: bool = option("prompts", False, "put the captions of a prompt in random order")
    vary_num_retrieved: bool = option("prompts", False, "draw the number of captions, too, from 1 to --num-retrieved")
    prompt_dropout: float = option("prompts", 0.0, "share of examples without captions in their prompt", check=SHARE)
    max_caption_tokens: int = option("optimisation", 60, "tokens that captions are cut to", check=AT_LEAST_1)
    gradient_checkpointing: bool = option("model", False, "less memory for more computing")

    def check(self) -> None:
        super().check()
        expected = f"0, or at least --num-retrieved ({self.num_retrieved})"
        require(not 0 < self.draw_from < self.num_retrieved, "draw_from", self.draw_from, expected)

    def examples(
        self,
        split: str,
        clips: list[Clip],
        processor: Any,
        tables: list[Neighbours],
        store: Any,
        embedding_noise: float = 0.0,
        **dropout: float,
    ) -> PromptedCaptions:
        """The examples of a split; in validation nothing is random but noise, which is always the same."""
        options = PromptOptions(self.num_retrieved, seed=self.seed, embedding_noise=embedding_noise)
        if split == "train":
            dropout |= {"prompt_dropout": self.prompt_dropout}
            drawn = (self.draw_from, self.shuffle_prompt, self.vary_num_retrieved)
            dropout |= {"embedding_noise": embedding_noise}
            options = PromptOptions(self.num_retrieved, *drawn, seed=self.seed, **dropout)
        targets = with_targets(clips, processor, self.max_caption_tokens)
        return PromptedCaptions(targets, store, processor, tables, options)


class PromptedTask(Task):
    """Cross-entropy of captions behind prompts.

    Args:
        config, accelerator, model, data: see `Task`.
        loss: the module with the loss.
        examples: by split; `validation` may be missing.
        prompt_weight: weight of a prompt's tokens in the loss.
    """

    config: PromptConfig
    examples: PromptedCaptions

    def __init__(
        self,
        config: PromptConfig,
        accelerator: Any,
        model: nn.Module,
        loss: CaptionLoss,
        examples: dict[str, PromptedCaptions],
        data: DataSummary,
        prompt_weight: float = 0.0,
    ) -> None:
        super().__init__(config, accelerator, model, loss, data)
        self.examples, self.validation = examples["train"], examples.get("validation")
        pad = self.examples.processor.tokenizer.pad_token_id
        self.collator, self._validation_collator = CaptionCollator(pad, prompt_weight), CaptionCollator(pad)
        self._dtype = loss.decoder.dtype
        self._lengths = self.examples.prompt_lengths()
        self.steps_per_epoch = math.ceil(sum(len(clip.captions) for clip in self.examples.clips) / self.batch_size)

    def plan(self, epoch: int) -> list[list[Row]]:
        config, clips = self.config, self.examples.clips
        share = getattr(config, "share_prompts", False)
        return plan_epoch(clips, self._lengths, self.batch_size, config.seed, epoch, share_prompts=share)

    def split(self, step: list[Row], parts: int) -> list[list[Row]]:
        return split_rows(step, parts)

    def size(self, step: list[Row]) -> int:
        return sum(len(row.captions) for row in step)

    def backward(self, step: Step) -> tuple[torch.Tensor, float]:
        accelerator = self.accelerator
        own = torch.stack([batch.weights.double().sum() for batch in step.batches]).sum()
        # A mean over the tokens of all processes and passes.
        weight = float(accelerator.reduce(own.to(accelerator.device), reduction="sum"))
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for number, batch in enumerate(step.batches):
            with step.one_pass(number):
                batch = batch.to(accelerator.device, self._dtype)
                loss = (self.module(batch) * batch.weights).sum()
                # Processes average their gradients: the factor turns that into a sum.
                accelerator.backward(loss * (accelerator.num_processes / weight))
            total += loss.detach()
        return total, weight

    def mean_loss(self, examples: PromptedCaptions) -> float:
        """Mean cross-entropy of a caption token. It does not depend on the number of processes."""
        batches = plan_validation(examples.clips, examples.prompt_lengths(), self.config.eval_batch_size)
        self.module.eval()

        def losses(numbers: range) -> tuple[float, int]:
            batch = self._validation_collator([examples[Key(row)] for row in batches[numbers[0]]])
            own = self.module(batch.to(self.accelerator.device, self._dtype))
            return float(own.double().sum()), len(own)

        sums = self.in_batches(len(batches), 1, losses)
        return sum(total for total, _ in sums) / sum(count for _, count in sums)
