"""A training run from settings to a folder with the trained model."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from .checkpoints import Checkpoints
from .config import TrainingConfig
from .loop import TrainingLoop
from .report import write_results

logger = logging.getLogger(__name__)


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train what `config` describes and write it to `config.output_dir`.

    Returns:
        The report (see `recap_hf.training.report`), on every process.

    Raises:
        ValueError, OSError, RuntimeError, ImportError: with what to change.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and config.device != "cpu" else []
    with torch.random.fork_rng(devices):
        return _train(config)


def _train(config: TrainingConfig) -> dict[str, Any]:
    from accelerate import Accelerator

    started = time.monotonic()
    trackers = _trackers(config.report_to)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=config.device == "cpu",
        log_with=trackers or None,
        project_dir=config.output_dir,
    )
    if config.num_processes and accelerator.num_processes != config.num_processes:
        raise RuntimeError(f"--num-processes {config.num_processes}, but {accelerator.num_processes} run")
    logger.info(
        "World size %d, %d torch threads each, on %s, mixed precision %s",
        accelerator.num_processes, torch.get_num_threads(), accelerator.device, accelerator.mixed_precision,
    )  # fmt: skip
    checkpoint = _checkpoint_to_resume(config, accelerator)
    task = config.build_task(accelerator)
    task.data.log()
    loop = TrainingLoop(config, task, accelerator)
    prepared = time.monotonic() - started
    if trackers:
        accelerator.init_trackers("recap", config={name: str(value) for name, value in vars(config).items()})
    if checkpoint is not None:
        loop.resume(checkpoint)
    loop.run()
    report = write_results(loop, prepared)
    accelerator.end_training()
    return report


def _trackers(names: list[str]) -> list[str]:
    """The trackers to report to; one that is not installed is an error, while Accelerate would ignore it."""
    from accelerate.tracking import get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    wanted = installed if "all" in names else [name for name in names if name != "none"]
    missing = [name for name in wanted if name not in installed]
    if missing:
        raise ImportError(
            f"--report-to {missing[0]}: not installed, or not known to Accelerate; "
            f"installed: {', '.join(installed) or 'none'}"
        )
    return wanted


def _checkpoint_to_resume(config: TrainingConfig, accelerator: Any) -> Path | None:
    """The checkpoint to continue from.

    Raises:
        ValueError: if there are checkpoints, and the settings say neither to continue nor to overwrite them.
    """
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.save_total_limit)
    if accelerator.is_main_process:
        checkpoints.clean()
    accelerator.wait_for_everyone()
    if config.resume_from_checkpoint and config.resume_from_checkpoint != "latest":
        return Path(config.resume_from_checkpoint)
    latest = checkpoints.latest()
    if config.resume or config.resume_from_checkpoint == "latest":
        if latest is None:
            logger.info("No checkpoint in %s yet: starting at the beginning", checkpoints.folder)
        return latest
    if latest is not None and not config.overwrite_output_dir:
        raise ValueError(
            f"{config.output_dir} holds checkpoints of a run (up to {latest.name}): continue with --resume, start "
            "again with --overwrite-output-dir, or give another --output-dir"
        )
    if latest is not None and accelerator.is_main_process:
        checkpoints.remove_all()
    accelerator.wait_for_everyone()
    return None
