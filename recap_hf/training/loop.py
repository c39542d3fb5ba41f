"""The training loop, on Accelerate: order, loss and resume do not depend on the number of processes."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_scheduler

from .checkpoints import Checkpoints, load_checkpoint
from .config import TrainingConfig, changed_settings
from .task import Key, Step, StepSampler, Task

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """The state of a run but for its tensors.

    `epoch` and `step_in_epoch` name the step that comes next; `step` counts the finished ones. `unlogged` counts what
    the next log line will include.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_value: float | None = None
    best_step: int = 0
    without_gain: int = 0
    stopped_early: bool = False
    size: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    unlogged: dict[str, float] = field(default_factory=lambda: {"weight": 0.0, "size": 0, "steps": 0})
    settings: dict[str, Any] = field(default_factory=dict)


class TrainingLoop:
    """One training run.

    Args:
        config: its settings.
        task: what is trained on what.
        accelerator: Accelerate's.
    """

    def __init__(self, config: TrainingConfig, task: Task, accelerator: Any) -> None:
        self.config, self.task, self.accelerator = config, task, accelerator
        self.trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        steps = math.ceil(config.num_train_epochs * task.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else steps
        optimizer = make_optimizer(list(self.trained.values()), config, accelerator.device)
        # Not prepared: Accelerate would move the schedule once per process.
        self.scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, self.total_steps)
        task.module, self.optimizer = accelerator.prepare(task.module, optimizer)
        self.sampler = StepSampler(task, config.gradient_accumulation_steps)
        workers = config.workers(accelerator.device)
        options = {"batch_sampler": self.sampler, "collate_fn": task.collator, "num_workers": workers}
        self.loader = DataLoader(task.examples, persistent_workers=workers > 0, **options)
        self.checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.save_total_limit)
        self.progress = Progress(settings=asdict(config))
        # This process's sum since the last log line, left on the device: nothing waits for it.
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._since = 0.0
        logger.info("Training %s parameters", f"{sum(p.numel() for p in self.trained.values()):,}")

    def run(self) -> Progress:
        """Train to the end, from the current progress; afterwards the model has the best weights."""
        config, progress = self.config, self.progress
        started = time.monotonic() - progress.seconds
        if progress.step == 0:
            self._evaluate()
        self.task.module.train()
        self._since = time.monotonic()
        while progress.step < self.total_steps and not progress.stopped_early:
            self.sampler.set_epoch(progress.epoch, progress.step_in_epoch)
            batches = iter(self.loader)
            for parts in self.sampler.steps:
                self._step(parts, [next(batches) for _ in range(config.gradient_accumulation_steps)])
                progress.seconds = time.monotonic() - started
                ended = progress.step == self.total_steps
                if ended or progress.step % config.logging_steps == 0:
                    self._log()
                if ended or progress.step_in_epoch == self.task.steps_per_epoch:
                    # At the end of an epoch there is always a checkpoint, after the validation.
                    break
                if config.save_steps and progress.step % config.save_steps == 0:
                    self._save()
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            trained = time.monotonic()
            self._evaluate()
            progress.seconds = time.monotonic() - started
            self._save()
            # Steps of several epochs may share a log line: only the time between the epochs does not count.
            self._since += time.monotonic() - trained
        self.accelerator.wait_for_everyone()
        best = self.checkpoints.load_best(progress.best_step) if progress.best_value is not None else None
        self.task.model.load_state_dict(best or {}, strict=False)
        self.task.model.eval()
        return progress

    def _step(self, parts: list[list[Key]], batches: list[Any]) -> None:
        accelerator, progress = self.accelerator, self.progress
        loss, weight = self.task.backward(Step(parts, batches, self._one_pass))
        if self.config.max_grad_norm:
            accelerator.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        size = self.task.size([key.example for part in parts for key in part if key.weight])
        self._loss += loss
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        progress.size += size
        for name, count in (("weight", weight), ("size", size), ("steps", 1)):
            progress.unlogged[name] += count

    @contextmanager
    def _one_pass(self, number: int) -> Iterator[None]:
        # Dropout is a function of seed, step and pass.
        passes = self.config.gradient_accumulation_steps
        place = self.accelerator.process_index * passes + number
        torch.manual_seed(((self.config.seed * 1_000_003 + self.progress.step) * 4_099 + place) % (1 << 62))
        last = number == passes - 1
        with nullcontext() if last else self.accelerator.no_sync(self.task.module):
            yield

    def _log(self) -> None:
        progress, unit, counts = self.progress, self.task.unit, self.progress.unlogged
        loss, seconds = self._total_loss() / max(1e-9, counts["weight"]), max(1e-9, time.monotonic() - self._since)
        speed, rate = counts["size"] / seconds, self.scheduler.get_last_lr()[0]
        left = timedelta(seconds=int((self.total_steps - progress.step) * seconds / counts["steps"]))
        epoch = progress.epoch + progress.step_in_epoch / self.task.steps_per_epoch
        progress.losses.append({"step": progress.step, "epoch": epoch, "loss": loss, "learning_rate": rate})
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.1f %s/s  %s left",
            progress.step, self.total_steps, epoch, loss, rate, speed, unit, left,
        )  # fmt: skip
        figures = {"train/loss": loss, "train/learning_rate": rate, f"train/{unit}_per_s": speed}
        self.accelerator.log(figures, step=progress.step)
        self._loss.zero_()
        progress.unlogged = dict.fromkeys(counts, 0)
        self._since = time.monotonic()

    def _total_loss(self) -> float:
        """Sum of the losses since the last log line, of all processes."""
        return float(self.accelerator.reduce(self._loss.clone(), reduction="sum"))

    def _evaluate(self) -> None:
        config, progress, metric = self.config, self.progress, self.config.metric_for_best_model
        figures = self.task.validate()
        self.task.module.train()
        if not figures:
            return
        progress.evaluations.append({"step": progress.step, "epoch": progress.epoch, **figures})
        best, value, gained = progress.best_value, figures.get(metric), False
        # The metrics from before the training are to compare with, and never the best.
        if progress.step:
            gained = best is None or (value < best if metric in self.task.lower_is_better else value > best)
            progress.without_gain = 0 if gained else progress.without_gain + 1
            progress.stopped_early = 0 < config.early_stopping_patience <= progress.without_gain
        if gained:
            progress.best_value, progress.best_step = value, progress.step
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(progress.step, self._weights())
        shown = "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        logger.info("validation after step %d: %s%s", progress.step, shown, "  (best)" if gained else "")
        if progress.stopped_early:
            logger.info("Stopping: no gain in %d validations", progress.without_gain)
        self.accelerator.log({f"validation/{name}": figure for name, figure in figures.items()}, step=progress.step)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu() for name, parameter in self.trained.items()}

    def _save(self) -> None:
        loss, scaler = self._total_loss(), self.accelerator.scaler
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            states = {"optimizer": self.optimizer, "scheduler": self.scheduler}
            state = {name: part.state_dict() for name, part in states.items()}
            state |= {"weights": self._weights(), "scaler": scaler.state_dict() if scaler else {}}
            self.checkpoints.save(self.progress.step, state | {"progress": asdict(self.progress) | {"loss": loss}})
        self.accelerator.wait_for_everyone()

    def resume(self, path: str | Path) -> None:
        """Continue from a checkpoint.

        Raises:
            FileNotFoundError, ValueError: if it is none, or not one of this run, or the output folder has later ones.
        """
        state = load_checkpoint(path)
        later = [step for step in self.checkpoints.steps() if step > state["progress"]["step"]]
        if later:
            hint = "delete those, or give another --output-dir"
            raise ValueError(
                f"{self.checkpoints.folder} has checkpoints after {path} (up to step {later[-1]}): {hint}"
            )
        if set(state["weights"]) != set(self.trained):
            raise ValueError(f"{path} was written by a run that trained other parts of the model")
        self.task.model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        loss, settings = (state["progress"].pop(name) for name in ("loss", "settings"))
        self.progress = Progress(**state["progress"], settings=asdict(self.config))
        changed = changed_settings(settings, self.config)
        if changed:
            logger.warning("Settings differ from those of the checkpoint, so the run will too: %s", "; ".join(changed))
        if self.progress.step_in_epoch >= self.task.steps_per_epoch:
            raise ValueError(f"{path} is from a run with more steps in an epoch: data or batch size have changed")
        if self.accelerator.is_main_process:
            # The sum of all processes.
            self._loss += loss
        self._take_best(Path(path).parent)
        logger.info("Continuing from %s (step %d)", path, self.progress.step)

    def _take_best(self, folder: Path) -> None:
        """Takes the best weights of the run so far from the folder of its checkpoint."""
        progress = self.progress
        if progress.best_value is None:
            return
        best = Checkpoints(folder).load_best(progress.best_step)
        if best is None:
            text = "The best weights so far (step %d) are not in %s: the best of the steps from here on counts"
            logger.warning(text, progress.best_step, folder)
            progress.best_value, progress.best_step = None, 0
        elif folder.resolve() != self.checkpoints.folder.resolve() and self.accelerator.is_main_process:
            self.checkpoints.save_best(progress.best_step, best)


def make_optimizer(parameters: list[nn.Parameter], config: TrainingConfig, device: Any) -> torch.optim.Optimizer:
    """Adam (AdamW without decay is Adam), fused; decay is not applied to biases and norms."""
    matrices, others = ([p for p in parameters if (p.dim() >= 2) is large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas, fused = (config.adam_beta1, config.adam_beta2), torch.device(device).type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=fused)
