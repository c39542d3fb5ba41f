"""Reading foreign weight files safely, and accounting for every key of a state dict.

Nothing here runs code found in a file: `torch.load` is called with ``weights_only=True`` and a short list of plain
NumPy scalar types, safetensors files hold no code at all. A conversion is a pure function from one dictionary of
tensors to another; `check_complete` compares its result with the model that is to receive it, key by key and shape
by shape, and names every difference.
"""

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_SHOWN = 20
# Metrics and learning rates that training scripts leave in their checkpoints; they are data and call nothing.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN_NUMPY = [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_KINDS = ("Float32", "Float64", "Int32", "Int64", "Bool")
_PLAIN_NUMPY += [np.dtype, *(getattr(np.dtypes, f"{kind}DType") for kind in _KINDS)]


class ConversionError(ValueError):
    """The weights are not what the conversion expects; the message lists what differs."""


def list_keys(keys: Iterable[str]) -> str:
    """Keys as an indented list, shortened after twenty."""
    ordered = sorted(keys)
    lines = [f"  {key}" for key in ordered[:_SHOWN]]
    if len(ordered) > _SHOWN:
        lines.append(f"  ... and {len(ordered) - _SHOWN} more")
    return "\n".join(lines)


def read_weights(path: str | Path) -> dict:
    """The content of a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is no weight file, or its pickle asks for anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(_PLAIN_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(_refusal(path, str(error))) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConversionError(f"{path} is not a readable PyTorch weight file: {error}") from error


def _refusal(path: Path, reason: str) -> str:
    if "Unsupported operand" in reason:
        return (
            f"{path} was pickled with a protocol that PyTorch's weights-only reader does not know. Save its state "
            "dict again with torch.save's default protocol, or as safetensors, where you trust the file."
        )
    asked = re.search(r"GLOBAL ([\w.]+)", reason)
    detail = f", and asks for {asked[1]}" if asked else ""
    return (
        f"{path} was refused and nothing in it was run: it is no plain weight file{detail}. Only tensors and plain "
        "values are read here; save the state dict alone, or as safetensors, where you trust the file."
    )


def read_checkpoint_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint folder as `save_pretrained` or `Trainer` write it, in one file or in shards.

    Raises:
        FileNotFoundError: the folder holds no weights under a known name.
        ConversionError: a file is unreadable, or a shard lacks a tensor that the index promises.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with config.json and its weights")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return state_dict_of(read_weights(folder / name), folder / name)
        if index.is_file():
            return _read_shards(folder, index)
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of shards)")


def _read_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ConversionError(f"{index} names a file outside its folder: {name}")
        state.update(state_dict_of(read_weights(folder / name), folder / name))
    if absent := set(weight_map) - set(state):
        raise ConversionError(f"the shards of {folder} lack tensors that {index.name} lists:\n{list_keys(absent)}")
    return state


def state_dict_of(content: object, source: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a loaded file: bare, or under ``state_dict``/``model``, with or without a ``module.`` prefix.

    Raises:
        ConversionError: the content is no mapping of names to tensors.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{source} holds no state dict: expected named tensors, got {type(content).__name__}")
    if other := [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f"{source} holds values that are not tensors:\n{list_keys(other)}")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def check_complete(
    converted: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    unknown: Iterable[str] = (),
    subject: str = "the checkpoint",
) -> None:
    """Stop unless `converted` has exactly the keys and shapes of `expected` and no source key was left over.

    Args:
        converted: the result of a conversion.
        expected: the state dict of the receiving model (its tensors may be on the meta device).
        unknown: keys of the source that no rule of the conversion covers.
        subject: what the message calls the source.

    Raises:
        ConversionError: with every missing, unknown and wrongly shaped key.
    """
    problems = []
    if missing := set(expected) - set(converted):
        problems.append(f"missing ({len(missing)}):\n{list_keys(missing)}")
    if surplus := set(unknown) | (set(converted) - set(expected)):
        problems.append(f"unknown ({len(surplus)}):\n{list_keys(surplus)}")
    misshapen = [
        f"{key}: {tuple(converted[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in set(expected) & set(converted)
        if converted[key].shape != expected[key].shape
    ]
    if misshapen:
        problems.append(f"wrong shape ({len(misshapen)}):\n{list_keys(misshapen)}")
    if problems:
        raise ConversionError(f"{subject} does not fit, and nothing was written; its keys:\n" + "\n".join(problems))


def floating_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the floating-point tensors; the widest where they differ (a model is loaded in one dtype)."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if not dtypes:
        raise ConversionError("the checkpoint holds no floating-point tensor")
    result = dtypes.pop()
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """`module`, built on the meta device, with copies of the tensors of `state` in `dtype`, in evaluation mode."""
    tensors = {
        key: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for key, tensor in state.items()
    }
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


def require_cross_attention(config: Any, purpose: str) -> None:
    """Refuse a captioner that is conditioned by a prefix: these layouts have no place for its mapping network.

    Raises:
        ConversionError: naming the conditioning and what it was wanted for.
    """
    if config.conditioning != "cross_attention":
        hint = "Run it with transformers (AudioCaptioningPipeline), or train one with --conditioning cross_attention"
        needed = f"{purpose} needs a captioner with cross-attention"
        raise ConversionError(f"{needed}; this one has conditioning={config.conditioning!r}. {hint}")


def check_saved(model: torch.nn.Module, reloaded: torch.nn.Module) -> None:
    """Stop unless a model that was saved and loaded again has the same tensors, bit by bit.

    Raises:
        ConversionError: naming the tensors that differ.
    """
    before, after = model.state_dict(), reloaded.state_dict()
    changed = [
        key
        for key in before.keys() | after.keys()
        if key not in before
        or key not in after
        or before[key].dtype != after[key].dtype
        or not torch.equal(before[key], after[key])
    ]
    if changed:
        raise ConversionError(f"{len(changed)} tensors are other ones when loaded again:\n{list_keys(changed)}")


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    scale = reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.float() - reference.float()).abs().max() / scale)
