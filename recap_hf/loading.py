"""A captioner by its name: model and processor, on a device, in a type, for every command that takes `--model`."""

from __future__ import annotations

import os
from typing import Any


def load_pair(
    name: str | os.PathLike | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    quiet: bool = False,
) -> tuple[Any, Any]:
    """Model, in evaluation mode, and processor of a captioner.

    Args:
        name: folder or Hub id; None: the embedded default.
        device: torch device; None: a GPU where there is one.
        dtype: `float32`, `bfloat16` or `float16`; None: the checkpoint's.
        quiet: without transformers' loading bars and hints, which would stand between results on a terminal.

    Raises:
        OSError: if there is no such checkpoint. ValueError: for a device that this machine lacks.
    """
    import torch

    from recap_hf.assets import default_model_path
    from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
    from recap_hf.modeling.processing_recap import RecapProcessor

    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"the device {device!r} is not there: torch sees no GPU on this machine. Try 'cpu'")
    source = str(name or default_model_path())
    options = {"dtype": getattr(torch, dtype)} if dtype else {}
    model = RecapForConditionalGeneration.from_pretrained(source, **options).eval()
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, RecapProcessor.from_pretrained(source)


__all__ = ["load_pair"]
