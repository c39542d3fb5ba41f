"""What a run leaves beside the model: a report and a plot of its losses."""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recap_hf.version import __version__

from .loop import Progress, TrainingLoop

logger = logging.getLogger(__name__)

REPORT, CURVE = "report.json", "loss_curve.png"


def write_results(loop: TrainingLoop, prepared_s: float) -> dict[str, Any]:
    """Save the trained model to the output folder, with report and plot.

    Args:
        loop: the finished training.
        prepared_s: seconds before its first step.

    Returns:
        The report, on every process.
    """
    task, folder = loop.task, Path(loop.config.output_dir)
    report = {**task.report(), **_report(loop, prepared_s)}
    if loop.accelerator.is_main_process:
        task.model.to("cpu")
        task.save(folder)
        draw_losses(loop.progress, folder / CURVE, task.loss_name)
        written = report | task.finish(folder, report)
        (folder / REPORT).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        logger.info("Model and report: %s", folder)
    loop.accelerator.wait_for_everyone()
    return report


def _report(loop: TrainingLoop, prepared_s: float) -> dict[str, Any]:
    """What is known of every run, as plain data."""
    import transformers

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


def draw_losses(progress: Progress, path: Path, loss_name: str) -> None:
    """Training and validation loss by step, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('No plot of the losses: pip install "recap-hf[train]" installs matplotlib')
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, entries, marker in (("training", progress.losses, ""), ("validation", progress.evaluations, ".")):
        axes.plot([one["step"] for one in entries], [one["loss"] for one in entries], marker=marker, label=label)
    if progress.evaluations:
        axes.axvline(progress.best_step, linestyle=":", color="black", linewidth=0.6, label="best")
    axes.set(xlabel="step", ylabel=loss_name)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
