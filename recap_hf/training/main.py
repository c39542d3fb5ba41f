"""A training run from settings to a folder with a captioner."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arguments import TrainingConfig
from .assemble import assemble, prepare_for_training
from .checkpoints import Checkpoints
from .corpus import build_corpus
from .loop import Progress, TrainingLoop
from .options import RunConfig
from .trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train a captioner and write it to `config.output_dir`.

    Returns:
        The report (see `recap_hf.training.report`), on every process.

    Raises:
        ValueError, OSError, RuntimeError: with what to change.
    """
    from .report import finish

    run = open_run(config, check=lambda: _check_login(config))
    started = time.monotonic()
    model, processor = assemble(config)
    model.to(run.accelerator.device)
    corpus = build_corpus(config, model, processor)
    prepared = time.monotonic() - started
    log_data(corpus.counts, corpus.problems)
    # The text tower and the audio tower have done their work; the decoder has the device to itself.
    model.clap.to("cpu")
    trained = prepare_for_training(model, config)
    trainer = Trainer(config, model, corpus, trained, run.accelerator)
    progress = run.go(trainer)
    report = finish(config, model, processor, corpus, trainer, progress, prepared)
    run.accelerator.end_training()
    return report


@dataclass
class Run:
    """A run whose processes have met: Accelerate's object, and the checkpoint to go on from."""

    config: RunConfig
    accelerator: Any
    checkpoint: Path | None
    trackers: list[str]

    def go(self, loop: TrainingLoop) -> Progress:
        """Train to the end, from the checkpoint where there is one."""
        from tqdm.contrib.logging import logging_redirect_tqdm

        if self.trackers:
            self.accelerator.init_trackers("recap", config={k: str(v) for k, v in vars(self.config).items()})
        if self.checkpoint is not None:
            loop.resume(self.checkpoint)
        with logging_redirect_tqdm(loggers=[logging.getLogger("recap_hf")]):
            return loop.run()


def open_run(config: RunConfig, check: Callable[[], None] = lambda: None) -> Run:
    """Meet the other processes, set threads, log and seeds, and look for the checkpoint to go on from.

    Args:
        config: the settings.
        check: what else must hold before anything is read, and raises where it does not.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    trackers = _trackers(config.report_to)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=config.device == "cpu",
        log_with=trackers or None,
        project_dir=config.output_dir,
    )
    _log_to_stderr(accelerator.is_main_process)
    if config.num_processes and accelerator.num_processes != config.num_processes:
        raise RuntimeError(f"--num-processes {config.num_processes}, but {accelerator.num_processes} run")
    logger.info(
        "World size %d, %d torch threads each, on %s, mixed precision %s",
        accelerator.num_processes, torch.get_num_threads(), accelerator.device, accelerator.mixed_precision,
    )  # fmt: skip
    check()
    checkpoint = _checkpoint_to_resume(config, accelerator)
    set_seed(config.seed)
    return Run(config, accelerator, checkpoint, trackers)


def _trackers(names: list[str]) -> list[str]:
    """The trackers to report to; one that is not installed is an error, where Accelerate would pass over it."""
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


def _check_login(config: TrainingConfig) -> None:
    """A push that cannot work is known before the training, not after it."""
    from huggingface_hub import get_token

    if config.push_to_hub and get_token() is None:
        raise ValueError("--push-to-hub needs a login: hf auth login (or HF_TOKEN in the environment)")


def _checkpoint_to_resume(config: RunConfig, accelerator: Any) -> Path | None:
    """The checkpoint to go on from; a folder with checkpoints is never overwritten by accident."""
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
            f"{config.output_dir} holds checkpoints of a run (up to {latest.name}): go on with --resume, start afresh "
            "with --overwrite-output-dir, or give another --output-dir"
        )
    if latest is not None and accelerator.is_main_process:
        checkpoints.remove_all()
    accelerator.wait_for_everyone()
    return None


def log_data(counts: Mapping[str, Mapping[str, int]], problems: Sequence[tuple[str, Any]]) -> None:
    """What there is in each split, and what was left out."""
    for split, numbers in counts.items():
        logger.info("%s: %s", split, ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in numbers.items()))
    for split, problem in problems:
        logger.warning("left out (%s, %s): %s", split, problem.kind, problem.detail)


def _log_to_stderr(is_main: bool) -> None:
    """Log lines of the main process, warnings of the others, on stderr."""
    root = logging.getLogger("recap_hf")
    if not any(isinstance(handler, logging.StreamHandler) for handler in root.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
    root.setLevel(logging.INFO if is_main else logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_main or not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
