"""A captioner by its name: model and processor, on a device, in a type, for every command that takes `--model`."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from recap_hf.assets import default_model_path
from recap_hf.modeling.configuration_recap import RecapConfig
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.processing_recap import RecapProcessor


def pick_device(name: str | None) -> str:
    """The device of that name; None: a GPU where there is one.

    Raises:
        ValueError: for a GPU on a machine without one.
    """
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"the device {name!r} is not there: torch sees no GPU on this machine. Try 'cpu'")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


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
    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    device = pick_device(device)
    source = str(name or default_model_path())
    kind = getattr(torch, dtype) if dtype else None
    model = load_from_folder(source, kind) if torch.device(device).type == "cpu" else None
    if model is None:
        model = RecapForConditionalGeneration.from_pretrained(source, **({"dtype": kind} if kind else {}))
    return model.eval().to(device), RecapProcessor.from_pretrained(source)


def load_from_folder(folder: str, dtype: torch.dtype | None = None) -> RecapForConditionalGeneration | None:
    """The model in a folder of this machine, as `from_pretrained` loads it, in a fifth of the time.

    `from_pretrained` builds a model on torch's meta device first, which imports torch's compiler and SymPy: a second
    of the two that a short command takes. Here it is built without values, and the tensors of the file become its
    parameters.

    Args:
        folder (`str`): with `config.json`, `generation_config.json` and `model.safetensors`.
        dtype (`torch.dtype`, *optional*): of the weights, default the checkpoint's.

    Returns:
        The model, or `None` where this is not such a folder or its tensors are not exactly the model's:
        `from_pretrained` says then what is wrong.
    """
    weights = os.path.join(folder, "model.safetensors")
    if not all(map(os.path.isfile, (weights, os.path.join(folder, "generation_config.json")))):
        return None
    config = RecapConfig.from_pretrained(folder)
    kind = dtype or config.dtype
    if not isinstance(kind, torch.dtype):
        return None
    with no_init_weights():
        model = RecapForConditionalGeneration(config).to(kind)
    state = load_file(weights)
    state |= {name: tensor.to(kind) for name, tensor in state.items() if tensor.is_floating_point()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        return None
    for part in (config, config.clap, config.decoder):
        part.dtype = kind
    model.name_or_path = config.name_or_path = folder
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


__all__ = ["load_from_folder", "load_pair"]
