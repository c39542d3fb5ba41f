"""The training loop, on Accelerate, whatever is trained: order, loss and resume do not depend on the processes.

What is trained on what stands in the subclasses: the captioner in `trainer.py`, its bases in `pretraining/`.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .assemble import load_trained
from .batches import Batch, BatchBuilder, Row, split_batch
from .checkpoints import Checkpoints, load_checkpoint
from .options import RunConfig
from .prefetch import prefetch
from .step import to_tensors

logger = logging.getLogger(__name__)

# Settings that may change between a run and its continuation without changing what is computed.
_FREE_TO_CHANGE = frozenset(
    {"output_dir", "resume", "resume_from_checkpoint", "overwrite_output_dir", "save_steps", "save_total_limit"}
    | {"logging_steps", "num_threads", "num_processes", "report_to", "feature_cache", "decode_threads"}
    | {"encode_batch_size", "push_to_hub", "hub_model_id", "hub_datastore_id", "hub_private"}
)
_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


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
class Step:
    """One step.

    Args:
        captions: captions (or clips) in it, over all processes.
        parts: what this process computes of it, pass by pass.
        weight: what its loss is a mean over, of all processes.
    """

    captions: int
    parts: list[Any]
    weight: float = 1.0


@dataclass
class _Window:
    """What was done since the last log line; the loss is this process's sum, left on the device: no waiting for it."""

    loss: torch.Tensor | float = 0.0
    tokens: float = 0
    captions: int = 0
    steps: int = 0
    since: float = 0.0


class TrainingLoop(ABC):
    """One training run.

    Args:
        config: its settings.
        model: what `trained` are parameters of.
        module: the module with the loss, which is wrapped for several processes and mixed precision.
        trained: the trained parameters by name.
        accelerator: Accelerate's.
        batch_size: captions (or clips) in a step of all processes.
        steps_per_epoch: steps in a pass over the data.
    """

    unit = "captions"

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        module: nn.Module,
        trained: dict[str, nn.Parameter],
        accelerator: Any,
        batch_size: int,
        steps_per_epoch: int,
    ) -> None:
        from transformers import get_scheduler

        self.config, self.model, self.trained, self.accelerator = config, model, trained, accelerator
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.accumulation = config.gradient_accumulation_steps
        self.total_steps = (
            config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
        )
        self.optimizer = make_optimizer(list(trained.values()), config, accelerator.device)
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.module, self.optimizer = accelerator.prepare(module, self.optimizer)
        self.checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.save_total_limit)
        self.progress = Progress(settings=asdict(config))
        self._bar: Any = None
        self._window = _Window()

    # ------------------------------------------------- what subclasses say

    @abstractmethod
    def _steps(self, epoch: int, first: int) -> Iterator[Step]:
        """The steps of an epoch from the `first` on; they are made in a thread, ahead of the training."""

    @abstractmethod
    def _backward(self, step: Step) -> float:
        """Gradients of a step's mean loss; sums of the loss go to `_record`. Returns the weight of the whole step."""

    @abstractmethod
    def _validate(self) -> dict[str, float]:
        """Figures of the validation set, the same on every process; empty without one."""

    def _validate_untrained(self) -> dict[str, float]:
        """Figures to compare with, from before the training."""
        return self._validate()

    def _set_training(self) -> None:
        """Puts the modules into training mode."""
        self.module.train()

    # ------------------------------------------------------------------ run

    def run(self) -> Progress:
        """Train to the end, from where the progress stands; the best weights are in the model afterwards."""
        progress, config = self.progress, self.config
        started = time.monotonic() - progress.seconds
        if progress.step == 0:
            self._evaluate_untrained()
        self._set_training()
        self._bar = self._progress_bar()
        self._window.since = time.monotonic()
        while progress.step < self.total_steps and not progress.stopped_early:
            for step in prefetch(self._steps(progress.epoch, progress.step_in_epoch)):
                self._step(step)
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

    def _step(self, step: Step) -> None:
        accelerator, progress = self.accelerator, self.progress
        weight = self._backward(step)
        if self.config.max_grad_norm:
            accelerator.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.captions_seen += step.captions
        self._window.tokens += weight
        self._window.captions += step.captions
        self._window.steps += 1
        self._bar.update()

    def _record(self, total: torch.Tensor) -> None:
        """Add this process's sum of losses to the next log line."""
        self._window.loss = self._window.loss + total.detach().double()

    def _seed_noise(self, part: int) -> None:
        """Dropout of one pass is a function of seed, step and place."""
        place = self.accelerator.process_index * self.accumulation + part
        seed = (self.config.seed * 1_000_003 + self.progress.step) * 4_099 + place
        torch.manual_seed(seed % (1 << 62))

    def _no_sync_until_last(self, number: int, parts: list[Any]) -> Any:
        last = number == len(parts) - 1
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    # ------------------------------------------------------------- reporting

    def _log(self) -> None:
        window, progress = self._window, self.progress
        loss = self._window_loss() / max(1e-9, window.tokens)
        now = time.monotonic()
        speed = window.captions / max(1e-9, now - window.since)
        rate = self.scheduler.get_last_lr()[0]
        left = (self.total_steps - progress.step) * (now - window.since) / max(1, window.steps)
        epoch = progress.epoch + progress.step_in_epoch / self.steps_per_epoch
        progress.losses.append({"step": progress.step, "epoch": epoch, "loss": loss, "learning_rate": rate})
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.1f %s/s  %s left",
            progress.step, self.total_steps, epoch, loss, rate, speed, self.unit, clock(left),
        )  # fmt: skip
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} {self.unit}/s")
        figures = {"train/loss": loss, "train/learning_rate": rate, f"train/{self.unit}_per_s": speed}
        self.accelerator.log(figures, step=progress.step)
        self._window = _Window(since=now)

    def _window_loss(self) -> float:
        """Sum of the losses since the last log line, of all processes."""
        own = torch.as_tensor(self._window.loss, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(own, reduction="sum"))

    def _evaluate_untrained(self) -> None:
        """The figures to compare with; they are never the best."""
        figures = self._validate_untrained()
        if figures:
            self.progress.evaluations.append({"step": 0, "epoch": 0, **figures})
            logger.info("validation before training: %s", _shown(figures))

    def _evaluate(self) -> None:
        config, progress = self.config, self.progress
        figures = self._validate()
        if not figures:
            return
        self._set_training()
        progress.evaluations.append({"step": progress.step, "epoch": progress.epoch, **figures})
        value = figures[config.metric_for_best_model]
        lower_is_better = config.metric_for_best_model in _LOWER_IS_BETTER
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
        logger.info("validation after step %d: %s%s", progress.step, _shown(figures), "  (best)" if gained else "")
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
        best = self.checkpoints.load_best() if self.progress.best_value is not None else None
        if best is not None:
            load_trained(self.model, best[0])
        self.model.eval()


class RowLoop(TrainingLoop):
    """A loop over rows of captions behind prompts: each step's rows are divided among processes and passes."""

    def _row_steps(self, plan: list[list[Row]], builder: BatchBuilder, epoch: int) -> Iterator[Step]:
        """Steps whose parts are (weight 0 or 1, batch)."""
        parts = self.accelerator.num_processes * self.accumulation
        start = self.accelerator.process_index * self.accumulation
        for rows in plan:
            own = split_batch(rows, parts)[start : start + self.accumulation]
            # A process without rows (a short last step) still takes part, with a weight of zero.
            batches: list[tuple[float, Batch]] = [
                (float(bool(part)), builder.build(part or rows[:1], epoch)) for part in own
            ]
            targets = [builder.clips[row.clip].targets[caption] for row in rows for caption in row.captions]
            yield Step(len(targets), batches, sum(map(len, targets)))

    def _backward(self, step: Step) -> float:
        accelerator = self.accelerator
        weight = self._weight(step)
        for number, (share, batch) in enumerate(step.parts):
            self._seed_noise(number)
            with self._no_sync_until_last(number, step.parts):
                tensors = to_tensors(batch, accelerator.device, self.dtype)
                # The mean over the whole step's tokens; averaging over processes is undone beforehand.
                total = self._sum(self.module(tensors), tensors) * share
                accelerator.backward(total * (accelerator.num_processes / weight))
            self._record(total)
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """What the features are fed as."""
        return next(self.model.parameters()).dtype

    def _weight(self, step: Step) -> float:
        """What the step's loss is a mean over, of all processes: its caption tokens."""
        return step.weight

    def _sum(self, losses: torch.Tensor, batch: Any) -> torch.Tensor:
        """The (weighted) sum of token losses."""
        return losses.sum()


def global_batch_size(config: RunConfig, processes: int) -> int:
    """Captions in a step of all processes."""
    own = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return own * processes or config.batch_size


def make_optimizer(parameters: list[nn.Parameter], config: RunConfig, device: Any) -> torch.optim.Optimizer:
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


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
