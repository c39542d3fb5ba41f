"""The training loop, on Accelerate; order of examples, loss and resume do not depend on the processes."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .arguments import TrainingConfig
from .assemble import load_trained
from .batches import Batch, Row, plan_epoch, split_batch
from .checkpoints import Checkpoints, load_checkpoint
from .corpus import Corpus
from .prefetch import prefetch
from .step import CaptionLoss, to_tensors
from .validation import caption_scores, held_out_scores, validation_loss, write_captions

logger = logging.getLogger(__name__)

# Settings that may change between a run and its continuation without changing what is computed.
_FREE_TO_CHANGE = frozenset(
    {"output_dir", "resume", "resume_from_checkpoint", "overwrite_output_dir", "save_steps", "save_total_limit"}
    | {"logging_steps", "num_threads", "num_processes", "report_to", "feature_cache", "decode_threads"}
    | {"encode_batch_size", "push_to_hub", "hub_model_id", "hub_datastore_id", "hub_private"}
)


@dataclass
class Progress:
    """Where a run is: all of it that is not a tensor.

    `epoch` and `step_in_epoch` name the step that comes next; `step` counts the finished ones. `unlogged` is what the
    next log line is to include.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_value: float | None = None
    best_step: int = 0
    without_gain: int = 0
    stopped_early: bool = False
    captions_seen: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    unlogged: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Window:
    """What was done since the last log line; the loss is this process's sum, left on the device: no waiting for it."""

    loss: torch.Tensor | float = 0.0
    tokens: int = 0
    captions: int = 0
    steps: int = 0
    since: float = 0.0


class Trainer:
    """One training run.

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
        from transformers import get_scheduler

        self.config, self.model, self.corpus, self.trained = config, model, corpus, trained
        self.accelerator = accelerator
        self.dtype = next(model.decoder.parameters()).dtype
        world = accelerator.num_processes
        self.accumulation = config.gradient_accumulation_steps
        self.batch_size = config.per_device_train_batch_size * world * self.accumulation or config.batch_size
        captions = sum(len(clip.captions) for clip in corpus.train.clips)
        self.steps_per_epoch = math.ceil(captions / self.batch_size)
        self.total_steps = (
            config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * self.steps_per_epoch)
        )
        self.optimizer = make_optimizer(list(trained.values()), config, accelerator.device)
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.loss_module, self.optimizer = accelerator.prepare(CaptionLoss(model.decoder), self.optimizer)
        self.checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.save_total_limit)
        self.progress = Progress(settings=asdict(config))
        self._lengths = corpus.train.prompt_lengths()
        self._bar: Any = None
        self._window = _Window()

    # ------------------------------------------------------------------ run

    def run(self) -> Progress:
        """Train to the end, from where the progress stands; the best weights are in the model afterwards."""
        progress, config = self.progress, self.config
        self.model.decoder.train()
        started = time.monotonic() - progress.seconds
        if progress.step == 0:
            self._evaluate_untrained()
        self._bar = self._progress_bar()
        self._window.since = time.monotonic()
        while progress.step < self.total_steps and not progress.stopped_early:
            for rows, batches in self._steps(progress.epoch, progress.step_in_epoch):
                self._step(rows, batches)
                progress.step_in_epoch += 1
                progress.seconds = time.monotonic() - started
                if progress.step % config.logging_steps == 0 or progress.step == self.total_steps:
                    self._log()
                at_end = progress.step >= self.total_steps
                if self._save_is_due() and not at_end:
                    self._save()
                if at_end:
                    break
            progress.epoch += 1
            progress.step_in_epoch = 0
            self._evaluate()
            progress.seconds = time.monotonic() - started
            self._save()
        self._bar.close()
        self._restore_best()
        return progress

    def _progress_bar(self) -> Any:
        """A bar on a terminal; elsewhere the log lines are enough."""
        from tqdm import tqdm

        shown = self.accelerator.is_main_process and sys.stderr.isatty()
        return tqdm(total=self.total_steps, initial=self.progress.step, unit="step", disable=not shown, leave=False)

    def _steps(self, epoch: int, first: int) -> Iterator[tuple[list[Row], list[tuple[list[Row], Batch | None]]]]:
        """The steps of an epoch from the `first` on: all rows of each, and this process's batches of it."""
        config, accelerator = self.config, self.accelerator
        steps = plan_epoch(
            self.corpus.train.clips,
            self._lengths,
            self.batch_size,
            config.seed,
            epoch,
            share_prompts=config.share_prompts,
            group_by_length=config.group_by_length,
        )
        parts = accelerator.num_processes * self.accumulation
        start = accelerator.process_index * self.accumulation

        def prepared() -> Iterator[tuple[list[Row], list[tuple[list[Row], Batch]]]]:
            for rows in steps[first:]:
                own = split_batch(rows, parts)[start : start + self.accumulation]
                # A process without rows (a short last step) still takes part, with a weight of zero.
                yield rows, [(part, self.corpus.train.build(part or rows[:1], epoch)) for part in own]

        return prefetch(prepared())

    def _step(self, rows: list[Row], batches: list[tuple[list[Row], Batch]]) -> None:
        accelerator, progress = self.accelerator, self.progress
        clips = self.corpus.train.clips
        tokens = sum(len(clips[row.clip].targets[caption]) for row in rows for caption in row.captions)
        for number, (part, batch) in enumerate(batches):
            if self.config.dropout:
                torch.manual_seed(self._noise_seed(number))
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.loss_module):
                losses = self.loss_module(to_tensors(batch, accelerator.device, self.dtype))
                # The mean over the whole step's tokens; averaging over processes is undone beforehand.
                total = losses.sum() * float(bool(part))
                accelerator.backward(total * (accelerator.num_processes / tokens))
            self._window.loss = self._window.loss + total.detach().double()
        if self.config.max_grad_norm:
            accelerator.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        captions = sum(len(row.captions) for row in rows)
        progress.step += 1
        progress.captions_seen += captions
        self._window.tokens += tokens
        self._window.captions += captions
        self._window.steps += 1
        self._bar.update()

    def _noise_seed(self, part: int) -> int:
        config, accelerator = self.config, self.accelerator
        place = accelerator.process_index * self.accumulation + part
        return ((config.seed * 1_000_003 + self.progress.step) * 4_099 + place) % (1 << 62)

    # ------------------------------------------------------------- reporting

    def _log(self) -> None:
        window, progress = self._window, self.progress
        loss = self._window_loss() / max(1, window.tokens)
        now = time.monotonic()
        speed = window.captions / max(1e-9, now - window.since)
        rate = self.scheduler.get_last_lr()[0]
        left = (self.total_steps - progress.step) * (now - window.since) / max(1, window.steps)
        epoch = progress.epoch + progress.step_in_epoch / self.steps_per_epoch
        progress.losses.append({"step": progress.step, "epoch": epoch, "loss": loss, "learning_rate": rate})
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.1f captions/s  %s left",
            progress.step, self.total_steps, epoch, loss, rate, speed, clock(left),
        )  # fmt: skip
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} captions/s")
        self.accelerator.log(
            {"train/loss": loss, "train/learning_rate": rate, "train/captions_per_s": speed}, step=progress.step
        )
        self._window = _Window(since=now)

    def _window_loss(self) -> float:
        """Sum of the losses since the last log line, of all processes."""
        own = torch.as_tensor(self._window.loss, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(own, reduction="sum"))

    def _validation_loss(self) -> float:
        size = self.config.eval_batch_size
        return validation_loss(self.loss_module, self.corpus.validation, size, self.accelerator, self.dtype)

    def _evaluate_untrained(self) -> None:
        """The loss to compare with; it is never the best."""
        if self.corpus.validation is None:
            return
        loss = self._validation_loss()
        self.progress.evaluations.append({"step": 0, "epoch": 0, "loss": loss})
        logger.info("validation before training: loss %.4f", loss)

    def _evaluate(self) -> None:
        corpus, config, progress = self.corpus, self.config, self.progress
        if corpus.validation is None:
            return
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
        self.model.decoder.train()
        progress.evaluations.append({"step": progress.step, "epoch": progress.epoch, **figures})
        value = figures[config.metric_for_best_model]
        lower_is_better = config.metric_for_best_model == "loss"
        gained = progress.best_value is None or (
            value < progress.best_value if lower_is_better else value > progress.best_value
        )
        if gained:
            progress.best_value, progress.best_step, progress.without_gain = value, progress.step, 0
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(self._weights(), {"step": progress.step, **figures})
        else:
            progress.without_gain += 1
            progress.stopped_early = 0 < config.early_stopping_patience <= progress.without_gain
        shown = "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        logger.info("validation after step %d: %s%s", progress.step, shown, "  (best)" if gained else "")
        if progress.stopped_early:
            logger.info("Stopping: no gain in %d validations", progress.without_gain)
        self.accelerator.log({f"validation/{name}": figure for name, figure in figures.items()}, step=progress.step)
        self._window.since = time.monotonic()

    # ----------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu() for name, parameter in self.trained.items()}

    def _save_is_due(self) -> bool:
        """Whether to save inside an epoch; at its end there is a checkpoint in any case, after validation."""
        every = self.config.save_steps
        return every > 0 and self.progress.step % every == 0 and self.progress.step_in_epoch < self.steps_per_epoch

    def _save(self) -> None:
        window = self._window
        self.progress.unlogged = {"loss": self._window_loss(), "tokens": window.tokens, "captions": window.captions}
        self.progress.unlogged["steps"] = window.steps
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
            }
            self.checkpoints.save(self.progress.step, self._weights(), state, asdict(self.progress))
        self.accelerator.wait_for_everyone()

    def resume(self, folder: str | Path) -> None:
        """Go on from a checkpoint.

        Raises:
            FileNotFoundError, ValueError: where it is none, or not one of this run.
        """
        weights, state, progress = load_checkpoint(folder)
        if set(weights) != set(self.trained):
            raise ValueError(f"{folder} was written by a run that trained other parts of the model")
        load_trained(self.model, weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        settings = asdict(self.config)
        changed = [
            f"{name} {progress['settings'].get(name)!r} -> {value!r}"
            for name, value in settings.items()
            if name not in _FREE_TO_CHANGE and progress["settings"].get(name) != value
        ]
        if changed:
            logger.warning("Settings differ from those of the checkpoint, so the run will too: %s", "; ".join(changed))
        self.progress = Progress(**{**progress, "settings": settings})
        if self.progress.step_in_epoch >= self.steps_per_epoch:
            raise ValueError(f"{folder} is from a run with more steps in an epoch: data or batch size have changed")
        self._window = _Window(**self.progress.unlogged)
        if not self.accelerator.is_main_process:
            # The sum of all processes is in the first one's window already.
            self._window.loss = 0.0
        logger.info("Going on from %s (step %d)", folder, self.progress.step)

    def _restore_best(self) -> None:
        self.accelerator.wait_for_everyone()
        best = self.checkpoints.load_best()
        if self.corpus.validation is not None and best is not None:
            load_trained(self.model, best[0])
        self.model.eval()


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainingConfig, device: Any) -> torch.optim.Optimizer:
    """Adam (AdamW without decay is Adam), fused; decay, where given, leaves biases and norms alone."""
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=torch.device(device).type in ("cpu", "cuda"),
    )


def clock(seconds: float) -> str:
    """`1:02:03` or `02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
