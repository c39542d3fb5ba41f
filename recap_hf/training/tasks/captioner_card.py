"""The model card of a trained captioner."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..report import REPORT
from .captioner_model import CONDITIONING_NAMES

_CARD = "README.md"


def write_card(folder: Path, report: dict[str, Any], name: str) -> dict[str, str]:
    """Write the card of the captioner in `folder`, unless there is one that a person has edited.

    Args:
        folder: the saved captioner.
        report: of its training.
        name: of the model; empty: that of the folder.

    Returns:
        An addition to the report, by which a later run recognises its own card.
    """
    from recap_hf.hub.facts import FACTS_FILE
    from recap_hf.hub.prepare import prepare_folder

    card, before = folder / _CARD, folder / REPORT
    written = json.loads(before.read_text(encoding="utf-8")).get("card_sha256") if before.is_file() else None
    if card.is_file() and written == _sha256(card):
        card.unlink()
    (folder / FACTS_FILE).write_text(json.dumps(card_facts(report), indent=2) + "\n", encoding="utf-8")
    prepare_folder(folder, name or folder.resolve().name)
    return {"card_sha256": _sha256(card)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_facts(report: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a run, with the keys of `recap_hf.hub.facts`."""
    settings, data, best = report["settings"], report["data"], report["best"]
    use = CONDITIONING_NAMES[report["conditioning"]] + (" and language model" if settings["train_decoder"] else "")
    training = {
        "trained": f"{use}, {report['trained_parameters']:,} parameters",
        "optimiser": f"Adam, learning rate {settings['learning_rate']:g}, {settings['lr_scheduler_type']} schedule",
        "batch": f"{report['global_batch_size']} captions",
        "steps": f"{report['steps']:,} ({report['steps'] / report['steps_per_epoch']:.1f} epochs)",
        "retrieved captions in a prompt": _prompts(settings),
        "audio hidden": f"{settings['audio_dropout']:.0%} of the examples",
        "loss": "cross-entropy on the caption's tokens",
        "checkpoint": "the last step"
        if best["value"] is None
        else f"step {best['step']}, the best {best['metric']} in validation",
        "seed": settings["seed"],
        "captions a second": report["captions_per_second"],
    }
    return {
        "training_data": [{**source, "use": use} for source in data["sources"]],
        "training": {name: str(value) for name, value in training.items()},
        "results": [
            {
                "metric": f"validation {name.replace('_', ' ')}",
                "value": round(value, 4),
                "dataset": ", ".join(source["name"] for source in data["sources"]),
                "implementation": f"recap_hf {report['versions']['recap_hf']}",
                "split": "validation",
                "clips": data["splits"]["validation"]["clips"] if name == "loss" else None,
                "clip_list": _clip_list(name, settings),
            }
            for name, value in (report["best_evaluation"] or {}).items()
            if name not in ("step", "epoch")
        ],
    }


def _clip_list(metric: str, settings: dict[str, Any]) -> str | None:
    """The validation clips of a metric; None for all."""
    if metric == "loss":
        return None
    if metric.startswith("held_out"):
        return "clips that name a held-out event"
    return f"first {settings['generation_clips']} clips"


def _prompts(settings: dict[str, Any]) -> str:
    if not settings["num_retrieved"]:
        return "none"
    nearest = settings["draw_from"]
    drawn = f"drawn in each epoch from the {nearest} nearest" if nearest else "the nearest"
    order = ", in random order" if settings["shuffle_prompt"] else ""
    return f"{settings['num_retrieved']}, {drawn}{order}"
