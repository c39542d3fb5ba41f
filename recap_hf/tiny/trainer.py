"""The training loop that the parts of recap-tiny share: AdamW with checkpoints and exact resume.

Every random choice of a step, of data and of dropout, is a function of (seed, step, batch): a run that was stopped
continues as if it had not been. The batches of a step are shared among the processes that `torchrun` started, and
their gradients are averaged: how many processes there are does not change what is trained. On a shared CPU two
processes of one thread are faster than one of two, which waits at every operation.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_hf.modeling.attribution_recap import eager_attention

if TYPE_CHECKING:
    import torch

__all__ = ["TrainConfig", "fast_attention", "is_main_process", "learning_rate", "own_device", "steps_done", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. A checkpoint resumes under the same ones; `steps` may change until the decay begins.

    `cycles` are the lengths of earlier cycles of the learning rate: after each it starts again, at half its height
    (Loshchilov and Hutter, "SGDR", ICLR 2017), so that a finished run can be made longer. `steps` counts them all.

    With `average` above 1 the result is the mean of the weights of so many last checkpoints, `save_every` apart: what
    a longer decay would give, for a run that is stopped before its end (Izmailov et al., "Averaging Weights Leads to
    Wider Optima and Better Generalization", UAI 2018).
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    cycles: tuple[int, ...] = ()
    decay: float = 0.35
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_norm: float = 1.0
    seed: int = 0
    save_every: int = 100
    average: int = 1
    log_every: int = 20
    # Batches whose mean gradient makes a step; so many processes at most can share it.
    batches_per_step: int = 1
    # From this step on, a step is a single batch.
    one_batch_from: int | None = None
    device: str = "cpu"


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, a constant phase, and half a cosine to zero over the last `decay` of a cycle's steps.

    The constant phase does not depend on the number of steps: a run may be made longer or shorter while it lasts.
    """
    begin, peak = 0, config.learning_rate
    for length in config.cycles:
        if step < begin + length:
            return peak * _height(step - begin, length, config)
        begin, peak = begin + length, config.learning_rate / 2
    return peak * _height(step - begin, config.steps - begin, config)


def _height(step: int, length: int, config: TrainConfig) -> float:
    """Share of the peak at a step of a cycle of `length` steps."""
    falling = round(length * config.decay)
    if step >= length - falling:
        return 0.5 * (1 + math.cos(math.pi * (step - length + falling) / max(1, falling)))
    return min(1.0, (step + 1) / config.warmup_steps)


def _decay_start(config: TrainConfig) -> int:
    """Where the learning rate of the last cycle begins to fall."""
    return config.steps - round((config.steps - sum(config.cycles)) * config.decay)


def is_main_process() -> bool:
    """Whether this is the only process or the first one of `torchrun`."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device(name: str | None) -> str:
    """[`pick_device`], a GPU being the one of this process among those of `torchrun`."""
    from recap_hf.loading import pick_device

    device = pick_device(name)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def fast_attention(model: torch.nn.Module) -> AbstractContextManager[None]:
    """The attention whose training step is faster where the model is.

    In bfloat16 on a CPU a step with the eager one takes two thirds of the time of torch's own, whose backward pass is
    slow there.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    return eager_attention(model) if on_cpu else nullcontext()


def _join_processes(name: str, config: TrainConfig) -> tuple[int, int]:
    """(rank, world size), with the process group started where `torchrun` started several processes.

    Raises:
        ValueError: there are more processes than a step has batches.
    """
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > config.batches_per_step:
        raise ValueError(
            f"a step of the {name} is {config.batches_per_step} batch(es), too few for {world} processes: "
            "start fewer of them"
        )
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def _batches(step: int, config: TrainConfig) -> int:
    """How many batches make this step."""
    alone = config.one_batch_from is not None and step >= config.one_batch_from
    return 1 if alone else config.batches_per_step


def _sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum over the processes. One that had no batch adds nothing, and a parameter that no
    process used stays without a gradient, lest the optimizer decays it.
    """
    import torch
    import torch.distributed as dist

    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([used, *(gradient.reshape(-1) for gradient in gradients)])
    dist.all_reduce(flat)
    used, *totals = flat.split([len(parameters), *(parameter.numel() for parameter in parameters)])
    for parameter, total, anywhere in zip(parameters, totals, used.tolist(), strict=True):
        parameter.grad = total.view_as(parameter) if anywhere else None


def _save(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    progress: dict[str, Any],
) -> None:
    import torch

    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "steps": config.steps}
    state |= {"decay_start": _decay_start(config)} | progress

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def _settings(config: TrainConfig) -> str:
    """What must not change between the parts of a run, as JSON."""
    free = ("steps", "device", "save_every", "log_every")
    return json.dumps({key: value for key, value in asdict(config).items() if key not in free})


def _resume(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    settings: str,
    recent: list[dict[str, torch.Tensor]],
) -> int:
    import torch

    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        raise ValueError(
            f"{path} was written with other settings ({state['settings']}; now {settings}): "
            "resume with the same ones, or remove the file to start again"
        )
    if state["steps"] != config.steps and state["step"] > min(state["decay_start"], _decay_start(config)):
        raise ValueError(
            f"{path} is at step {state['step']}, where the learning rate of a run of {state['steps']} or of "
            f"{config.steps} steps already falls: the number of steps can no longer change"
        )
    recent += state["recent"]
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def steps_done(checkpoint: str | Path) -> int:
    """Steps that the run behind a checkpoint has made; 0 where there is no checkpoint."""
    import torch

    path = Path(checkpoint)
    return int(torch.load(path, map_location="cpu", weights_only=True)["step"]) if path.is_file() else 0


def _mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean of weights; integers (position numbers) are those of the last."""
    import torch

    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in states[-1].items()
    }


def _optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; biases and scales do not decay."""
    import torch

    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def train(
    module: torch.nn.Module,
    loss_of: Callable[[np.random.Generator, int], tuple[torch.Tensor, dict[str, float]]],
    config: TrainConfig,
    checkpoint: str | Path,
    name: str,
    stop_after: int | None = None,
) -> None:
    """Train `module`'s parameters that require gradients; resumes from `checkpoint` where it exists.

    Args:
        module: What is trained and checkpointed (all of its state, frozen or not).
        loss_of: Draws a batch with the generator that it is given, and the number of the step; returns the loss and
            figures for the log. Not called where no step is left.
        config: Settings.
        checkpoint: File of the checkpoint, written every `save_every` steps and at the end.
        name: Word for the log on stderr.
        stop_after: Stop after this many steps in all, without touching the schedule.

    Raises:
        ValueError: the checkpoint was written with other settings, or there are more processes than
            `batches_per_step`.
    """
    import torch

    path = Path(checkpoint)
    rank, world = _join_processes(name, config)
    settings = _settings(config)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, config)
    recent: list[dict[str, torch.Tensor]] = []
    start = _resume(path, module, optimizer, config, settings, recent)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    module.train()
    began, figures = time.monotonic(), {}
    for step in range(start, last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        count = _batches(step, config)
        for batch in range(rank, count, world):
            torch.manual_seed((config.seed * 1_000_003 + step) * 64 + batch)
            loss, parts = loss_of(np.random.default_rng([config.seed, step, batch]), step)
            (loss / count).backward()
            for key, value in parts.items():
                figures.setdefault(key, []).append(value)
        if world > 1:
            _sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, config.max_norm)
        optimizer.step()
        done = step + 1
        if rank == 0 and (done % config.log_every == 0 or done == last):
            seconds = (time.monotonic() - began) / (done - start)
            words = "  ".join(f"{key} {np.mean(values):.3f}" for key, values in figures.items())
            print(f"{name} {done}/{config.steps}  {words}  {seconds:.2f} s/step", file=sys.stderr, flush=True)
            figures = {}
        if rank == 0 and (done % config.save_every == 0 or done == last):
            recent.append({key: value.detach().clone() for key, value in module.state_dict().items()})
            del recent[: -config.average]
            _save(path, module, optimizer, config, {"step": done, "recent": recent, "settings": settings})
    if config.average > 1 and rank == 0 and recent:
        module.load_state_dict(_mean(recent))
    module.eval()
