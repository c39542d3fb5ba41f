"""What a run leaves: the captioner in one folder, a report, a picture of its losses, a model card."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recap_hf.version import __version__

from .arguments import TrainingConfig
from .assemble import CONDITIONING_NAMES
from .options import RunConfig

logger = logging.getLogger(__name__)

REPORT, CURVE, CARD = "report.json", "loss_curve.png", "README.md"


def finish(
    config: TrainingConfig, model: Any, processor: Any, corpus: Any, trainer: Any, progress: Any, prepared_s: float
) -> dict[str, Any]:
    """Write everything to `config.output_dir` and push it if asked to; the report, on every process."""
    folder = Path(config.output_dir)
    report = make_report(config, corpus, trainer, progress, prepared_s)
    if trainer.accelerator.is_main_process:
        model.to("cpu")
        own_card = _is_own_card(folder)
        model.save_pretrained(folder)
        if corpus.datastore is not None:
            processor.datastore = corpus.datastore
        processor.save_pretrained(folder)
        draw_losses(progress, folder / CURVE)
        if own_card:
            (folder / CARD).unlink()
        _write_card(folder, report, config)
        report["card_sha256"] = _sha256(folder / CARD)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        logger.info("Captioner, report and card: %s", folder)
        if config.push_to_hub:
            _push(folder, config)
    trainer.accelerator.wait_for_everyone()
    return report


def make_report(config: TrainingConfig, corpus: Any, trainer: Any, progress: Any, prepared_s: float) -> dict[str, Any]:
    """All that is known of a captioner's run, as plain data."""
    return {
        "encoder_fingerprint": corpus.features.fingerprint,
        "datastore_captions": len(corpus.datastore) if corpus.datastore is not None else 0,
        "conditioning": trainer.model.config.conditioning,
        **run_report(config, corpus, trainer, progress, prepared_s),
    }


def run_report(config: RunConfig, data: Any, trainer: Any, progress: Any, prepared_s: float) -> dict[str, Any]:
    """What is known of any run, as plain data.

    Args:
        config: its settings.
        data: has `problems` (split, problem), `counts` by split and `sources`.
        trainer, progress: the loop, and where it came to.
        prepared_s: seconds before the first step.
    """
    import transformers

    problems = [{"split": split, **asdict(problem)} for split, problem in data.problems]
    accelerator = trainer.accelerator
    best = next((entry for entry in progress.evaluations if entry["step"] == progress.best_step), None)
    return {
        "settings": asdict(config),
        "data": {"splits": data.counts, "sources": data.sources},
        "left_out": {"counts": dict(Counter(item["kind"] for item in problems)), "clips": problems},
        "trained_parameters": sum(parameter.numel() for parameter in trainer.trained.values()),
        "global_batch_size": trainer.batch_size,
        "steps": progress.step,
        "steps_per_epoch": trainer.steps_per_epoch,
        "stopped_early": progress.stopped_early,
        "best": {"metric": config.metric_for_best_model, "value": progress.best_value, "step": progress.best_step},
        "best_evaluation": best,
        "losses": progress.losses,
        "evaluations": progress.evaluations,
        "seconds": {"preparing": round(prepared_s, 1), "training": round(progress.seconds, 1)},
        f"{trainer.unit}_per_second": round(progress.captions_seen / max(1e-9, progress.seconds), 2),
        "machine": {
            "world_size": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": str(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {
            "recap_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def draw_losses(progress: Any, path: Path, quantity: str = "cross-entropy per caption token") -> None:
    """Training and validation loss against the step, as a picture; `quantity` says what the loss is."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('No picture of the losses: pip install "recap-hf[train]" brings matplotlib')
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [entry["step"] for entry in progress.losses]
    axes.plot(steps, [entry["loss"] for entry in progress.losses], color="#9aa5b1", linewidth=1, label="training")
    if progress.evaluations:
        steps = [entry["step"] for entry in progress.evaluations]
        values = [entry["loss"] for entry in progress.evaluations]
        axes.plot(steps, values, color="#b3412e", marker="o", markersize=3, label="validation")
        axes.axvline(progress.best_step, color="#b3412e", linewidth=0.6, linestyle=":", label="best")
    axes.set_xlabel("step")
    axes.set_ylabel(quantity)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def card_facts(report: dict[str, Any]) -> dict[str, Any]:
    """What the model card says of a run, in the words of `recap_hf.hub.facts`."""
    settings, data = report["settings"], report["data"]
    part = CONDITIONING_NAMES[report["conditioning"]].removeprefix("the ")
    use = f"{part} and language model" if settings["train_decoder"] else part
    training = {
        "trained": f"{use}, {report['trained_parameters']:,} parameters",
        "optimiser": f"Adam, learning rate {settings['learning_rate']:g}, {settings['lr_scheduler_type']} schedule",
        "batch": f"{report['global_batch_size']} captions",
        "steps": f"{report['steps']:,} ({report['steps'] / report['steps_per_epoch']:.1f} epochs)",
        "retrieved captions in a prompt": _prompts(settings),
        "audio hidden": f"{settings['audio_dropout']:.0%} of the examples",
        "loss": "cross-entropy on the caption's tokens",
        "checkpoint": f"step {report['best']['step']}, the best {report['best']['metric']} in validation"
        if report["best"]["value"] is not None
        else "the last step",
        "seed": settings["seed"],
        "captions a second": report["captions_per_second"],
    }
    facts: dict[str, Any] = {
        "training_data": [{**source, "use": use} for source in data["sources"]],
        "training": {name: str(value) for name, value in training.items()},
    }
    best = report["best_evaluation"]
    if best:
        names = ", ".join(source["name"] for source in data["sources"])
        clips = data["splits"]["validation"]["clips"]
        facts["results"] = [
            {
                "metric": f"validation {name.replace('_', ' ')}",
                "value": round(value, 4),
                "dataset": names,
                "implementation": f"recap_hf {report['versions']['recap_hf']}",
                "split": "validation",
                "clips": clips if name == "loss" else None,
                "clip_list": _clip_list(name, settings),
            }
            for name, value in best.items()
            if name not in ("step", "epoch")
        ]
    return facts


def _clip_list(metric: str, settings: dict[str, Any]) -> str | None:
    """Which of the validation clips a figure is about; None for all."""
    if metric == "loss":
        return None
    if metric.startswith("held_out"):
        return "clips that name a held-out event"
    return f"first {settings['generation_clips']} clips"


def _prompts(settings: dict[str, Any]) -> str:
    if not settings["num_retrieved"]:
        return "none"
    nearest = settings["draw_from"]
    drawn = f", drawn afresh in each epoch from the {nearest} nearest" if nearest else ", the nearest"
    return f"{settings['num_retrieved']}{drawn}" + (", in random order" if settings["shuffle_prompt"] else "")


def _write_card(folder: Path, report: dict[str, Any], config: TrainingConfig) -> None:
    from recap_hf.hub.facts import FACTS_FILE
    from recap_hf.hub.prepare import prepare_folder

    (folder / FACTS_FILE).write_text(json.dumps(card_facts(report), indent=2) + "\n", encoding="utf-8")
    prepare_folder(folder, config.hub_model_id or folder.resolve().name)


def _is_own_card(folder: Path) -> bool:
    """Whether the card there is one that an earlier run wrote and nobody has edited."""
    if not (folder / REPORT).is_file() or not (folder / CARD).is_file():
        return False
    written = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("card_sha256")
    return written == _sha256(folder / CARD)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _push(folder: Path, config: TrainingConfig) -> None:
    from recap_hf.hub import PushOptions, push_checkpoint

    repo = config.hub_model_id or folder.resolve().name
    for result in push_checkpoint(
        folder, repo, PushOptions(private=config.hub_private or None), config.hub_datastore_id or None
    ):
        logger.info("Pushed: %s", result)
