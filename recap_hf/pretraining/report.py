"""What a pretraining leaves: the model in a folder of the stock classes, a report, a picture of its losses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from recap_hf.training.options import RunConfig
from recap_hf.training.report import CURVE, REPORT, draw_losses, run_report

logger = logging.getLogger(__name__)

_QUANTITY = {"clap": "contrastive loss", "language-model": "cross-entropy per token"}


def finish_base(
    config: RunConfig, kind: str, data: Any, loop: Any, progress: Any, prepared_s: float, model: Any
) -> dict[str, Any]:
    """Write everything to `config.output_dir`; the report, on every process.

    Args:
        config: the settings.
        kind: `clap` or `language-model`.
        data: has `problems`, `counts` and `sources`.
        loop, progress: the training, and where it came to.
        prepared_s: seconds before the first step.
        model: has `save_pretrained`.
    """
    folder = Path(config.output_dir)
    report = {"kind": kind, **run_report(config, data, loop, progress, prepared_s)}
    if loop.accelerator.is_main_process:
        loop.model.to("cpu")
        model.save_pretrained(folder)
        draw_losses(progress, folder / CURVE, _QUANTITY[kind])
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        logger.info("Model, tokenizer and report: %s", folder)
    loop.accelerator.wait_for_everyone()
    return report
