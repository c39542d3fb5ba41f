"""A training run from settings to a folder with the trained model and a report."""

import json
import logging
import platform
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from recap_hf.files import write_text
from recap_hf.version import __version__

from .checkpoints import Checkpoints
from .config import TrainingConfig
from .loop import TrainingLoop

logger = logging.getLogger(__name__)


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train what `config` describes and write it to `config.output_dir`.

    Returns:
        The report, on every process; it is the content of `report.json`.

    Raises:
        ValueError, OSError, RuntimeError, ImportError: with what to change.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and config.device != "cpu" else []
    with torch.random.fork_rng(devices):
        return _train(config)


def _train(config: TrainingConfig) -> dict[str, Any]:
    started, folder = time.monotonic(), Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=config.device == "cpu",
        log_with=_trackers(config.report_to) or None,
        project_dir=config.output_dir,
    )
    if config.num_processes not in (0, accelerator.num_processes):
        launched = f"this was launched as {accelerator.num_processes} (WORLD_SIZE)"
        raise RuntimeError(f"--num-processes {config.num_processes}, but {launched}: give one of both")
    logger.info(
        "World size %d, %d torch threads each, on %s, mixed precision %s",
        accelerator.num_processes, torch.get_num_threads(), accelerator.device, accelerator.mixed_precision,
    )  # fmt: skip
    checkpoint = _checkpoint_to_resume(config)
    task = config.build_task(accelerator)
    task.data.log()
    loop = TrainingLoop(config, task, accelerator)
    prepared = time.monotonic() - started
    if accelerator.log_with:
        accelerator.init_trackers("recap", config={name: str(value) for name, value in vars(config).items()})
    if checkpoint is not None:
        loop.resume(checkpoint)
    elif accelerator.is_main_process:
        # Of an earlier run, once nothing speaks against this one.
        loop.checkpoints.remove_all()
    loop.run()
    report = {**task.report(), **_report(loop, prepared)}
    if accelerator.is_main_process:
        task.model.to("cpu")
        task.save(folder)
        write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
        task.finish(folder, report)
        logger.info("Model and report: %s", folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def _trackers(names: list[str]) -> list[str]:
    """The trackers to report to; one that is not installed is an error, while Accelerate would ignore it."""
    installed = [str(name) for name in get_available_trackers()]
    unknown = set(names) - {*installed, "all", "none"}
    if unknown:
        raise ImportError(f"--report-to {unknown.pop()}: not installed, or unknown; installed: {', '.join(installed)}")
    return [name for name in names if name != "none"]


def _checkpoint_to_resume(config: TrainingConfig) -> Path | None:
    """The checkpoint to continue from; a `ValueError` if the settings do not say what to do with those there are."""
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.save_total_limit)
    latest, wanted = checkpoints.latest(), config.resume_from_checkpoint or ("latest" if config.resume else "")
    if wanted:
        if wanted == "latest" and latest is None:
            logger.info("No checkpoint in %s yet: starting at the beginning", checkpoints.folder)
        return latest if wanted == "latest" else Path(wanted)
    if latest is not None and not config.overwrite_output_dir:
        hint = "continue with --resume, start again with --overwrite-output-dir, or give another --output-dir"
        raise ValueError(f"{config.output_dir} holds checkpoints of a run (up to {latest.name}): {hint}")
    return None


def _report(loop: TrainingLoop, prepared_s: float) -> dict[str, Any]:
    """What is known of every run, as plain data."""
    config, task, progress, accelerator = loop.config, loop.task, loop.progress, loop.accelerator
    problems = [{"split": split, **asdict(problem)} for split, problem in task.data.problems]
    best = {"metric": config.metric_for_best_model, "value": progress.best_value, "step": progress.best_step}
    return {
        "settings": asdict(config),
        "data": {"splits": task.data.counts, "sources": task.data.sources},
        "left_out": {"counts": dict(Counter(item["kind"] for item in problems)), "clips": problems},
        "trained_parameters": sum(parameter.numel() for parameter in loop.trained.values()),
        "global_batch_size": task.batch_size,
        "steps": progress.step,
        "steps_per_epoch": task.steps_per_epoch,
        "stopped_early": progress.stopped_early,
        "best": best,
        "best_evaluation": next((one for one in progress.evaluations if one["step"] == progress.best_step), None),
        "losses": progress.losses,
        "evaluations": progress.evaluations,
        "seconds": {"preparing": round(prepared_s, 1), "training": round(progress.seconds, 1)},
        f"{task.unit}_per_second": round(progress.size / max(1e-9, progress.seconds), 2),
        "machine": {
            "world_size": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": str(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {"recap_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
