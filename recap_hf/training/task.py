"""What the training loop is given: a task. The loop knows no captions, no audio and no model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from .config import TrainingConfig
from .data import DataSummary


class Key(NamedTuple):
    """What a task's dataset is indexed by.

    Args:
        example: an item of the plan.
        epoch: random draws of an example depend on it.
        weight: of its loss; 0 for an example that only fills the pass of a process without examples.
    """

    example: Any
    epoch: int = 0
    weight: float = 1.0


@dataclass
class Step:
    """One optimiser step, as one process sees it.

    Args:
        parts: the keys of the step, one list per pass, of all processes (process by process).
        batches: this process's passes, as the task's collator made them.
        one_pass: `with one_pass(n):` surrounds forward and backward of pass `n`: it sets the seed of the dropout, and
            synchronises the gradients of several processes in the last pass only.
    """

    parts: list[list[Key]]
    batches: list[Any]
    one_pass: Callable[[int], AbstractContextManager]


class Task(ABC):
    """A kind of training: examples, batches of them, a module with the loss, metrics, and what is saved.

    Args:
        config: settings of the run.
        accelerator: Accelerate's.
        model: its parameters that require a gradient are trained and kept in checkpoints.
        module: computes what the loss needs; the loop wraps it for several processes and mixed precision.
        data: what the data consists of.
    """

    kind = ""
    unit = "captions"
    # Metrics of which a lower value is better.
    lower_is_better = frozenset({"loss", "perplexity"})
    # Both are copied to the worker processes: a dataset indexed by `Key`, and what makes a batch of its examples.
    examples: Dataset
    collator: Callable[[list[Any]], Any]
    steps_per_epoch: int

    def __init__(self, config: TrainingConfig, accelerator: Any, model: Any, module: Any, data: DataSummary) -> None:
        self.config, self.accelerator, self.model, self.module, self.data = config, accelerator, model, module, data
        self.batch_size = config.global_batch_size(accelerator.num_processes)

    @abstractmethod
    def plan(self, epoch: int) -> list[Sequence[Any]]:
        """The examples of each step of an epoch, for all processes; always the same for the same epoch."""

    @abstractmethod
    def split(self, step: Sequence[Any], parts: int) -> list[Sequence[Any]]:
        """The examples of a step divided into `parts` passes."""

    def size(self, step: Sequence[Any]) -> int:
        """Captions (or clips, see `unit`) in a step."""
        return len(step)

    @abstractmethod
    def backward(self, step: Step) -> tuple[torch.Tensor, float]:
        """Add the gradient of the step's loss to the parameters.

        Returns:
            This process's part of the sum of losses (detached), and the divisor that makes a mean of the sum over all
            processes (the same on every process).
        """

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Metrics of the validation data, the same on every process; empty without such data."""

    @torch.no_grad()
    def in_batches(self, count: int, size: int, compute: Callable[[range], Any]) -> list[Any]:
        """`compute(numbers)` of all batches of `size` of the numbers 0 to `count - 1`, in order, on every process.

        Each process computes its share. Neither batches nor order depend on the number of processes.
        """
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        first, step = self.accelerator.process_index, self.accelerator.num_processes
        own = [(number, compute(batches[number])) for number in range(first, len(batches), step)]
        return [result for _, result in sorted(gather_object(own), key=lambda item: item[0])]

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained model to `folder`."""

    def report(self) -> dict[str, Any]:
        """Additions to the report of the run."""
        return {"kind": self.kind}

    def finish(self, folder: Path, report: dict[str, Any]) -> None:  # noqa: B027 (most tasks have nothing to add)
        """Anything to do after model and report were saved, on the main process."""


class StepSampler:
    """Lists of keys, one for each pass of this process; the `batch_sampler` of the `DataLoader`.

    Args:
        task: makes the plan.
        passes: passes of each process in a step.
    """

    def __init__(self, task: Task, passes: int) -> None:
        self._task, self._passes = task, passes
        self.steps: list[list[list[Key]]] = []

    def set_epoch(self, epoch: int, first_step: int) -> None:
        """Plan an epoch, from one of its steps on."""
        parts = self._task.accelerator.num_processes * self._passes
        # A process without examples (a short last step) still takes part.
        self.steps = [
            [
                [Key(item, epoch) for item in part] or [Key(step[0], epoch, weight=0.0)]
                for part in self._task.split(step, parts)
            ]
            for step in self._task.plan(epoch)[first_step:]
        ]

    def __iter__(self) -> Iterator[list[Key]]:
        start = self._task.accelerator.process_index * self._passes
        for parts in self.steps:
            yield from parts[start : start + self._passes]

    def __len__(self) -> int:
        return len(self.steps) * self._passes
