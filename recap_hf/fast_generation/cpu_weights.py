"""Weights for fast captions on a CPU: bfloat16 laid out for its matrix units, or int8.

A decode step of a few beams reads every weight of the decoder once and computes little with each, so its time is the
time of reading them: half the bytes in bfloat16, a quarter in int8. Processors with AMX or AVX512-BF16 (bfloat16) and
VNNI (int8) also multiply these faster than float32. Both change captions a little: `python -m
benchmarks.captioning default` says how many.
"""

import functools
import warnings
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

CPU_WEIGHTS = ("float32", "bfloat16", "int8")
# int8 reads fewest bytes; from this many rows on, computing takes longer than reading, and bfloat16 computes faster
# because its activations need no rounding of their own.
_INT8_ROWS = 64


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight oneDNN has laid out once; plain layers have it done at every call.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): of any float type.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(torch.bfloat16).contiguous())
        self.bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`, in the type of `hidden`."""
        output = torch.ops.mkldnn._linear_pointwise(hidden.to(torch.bfloat16), self.weight, self.bias, "none", [], "")
        return output.to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight, a scale per output, and inputs rounded to int8 with a scale per row.

    A scale per row and none per batch: what a clip becomes does not depend on its neighbours.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): of any float type.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.out_features, self.in_features = weight.shape
        self.scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        # Contiguous: the packing reads the memory as it lies, whatever the strides say.
        rounded = (weight / self.scales[:, None]).round().to(torch.int8).contiguous()
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zero_points = torch.zeros(self.out_features, dtype=torch.long)
        self.bias = None if bias is None else bias.detach().float()
        self.for_many_rows = PackedLinear(weight, bias) if _has_bfloat16() else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`, in the type of `hidden`."""
        rows = hidden.reshape(-1, self.in_features)
        if self.for_many_rows is not None and len(rows) >= _INT8_ROWS:
            return self.for_many_rows(hidden)
        scales = rows.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12).mul_(1 / 127)
        rounded = (rows / scales).round_().to(torch.int8)
        output = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 0, self.weight, self.scales, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        output = output * scales if self.bias is None else torch.addcmul(self.bias, output, scales)
        return output.view(*hidden.shape[:-1], self.out_features).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@functools.cache
def _has_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        # The check above is passed by processors with AVX2 alone, where this is not possible.
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


def cpu_capabilities() -> dict[str, bool]:
    """Which of the processor's instructions for narrow types torch can use: `bfloat16`, `amx`, `int8`."""
    supports_vnni = getattr(torch.cpu, "_is_vnni_supported", None) or torch.cpu._is_avx512_vnni_supported
    amx = bool(torch.cpu._is_amx_tile_supported())
    return {"bfloat16": _has_bfloat16(), "amx": amx, "int8": bool(supports_vnni())}


def prepare_for_cpu(model: Any, weights: str = "float32") -> Any:
    """Makes a captioner fast on this CPU, in place. It cannot be trained or saved afterwards, except in float32.

    Args:
        model ([`RecapForConditionalGeneration`]): on the CPU.
        weights (`str`, *optional*, defaults to `"float32"`): `"float32"` changes the order of the decoder's weights
            in memory and no number; `"bfloat16"` makes the whole model bfloat16; `"int8"` the decoder's weights int8
            and the audio encoder bfloat16, where the processor has that.

    Returns:
        The same `model`, in evaluation mode.

    Raises:
        `ValueError`: on other `weights`, a model on another device, or int8 where torch has no oneDNN or the processor
            no VNNI.

    Example:
        >>> model = prepare_for_cpu(RecapForConditionalGeneration.from_pretrained(path), "int8")
        >>> captioner = pipeline("audio-captioning", model=model, processor=RecapProcessor.from_pretrained(path))
    """
    if weights not in CPU_WEIGHTS:
        raise ValueError(f"`weights` must be one of {', '.join(CPU_WEIGHTS)}, got {weights!r}.")
    if model.device.type != "cpu":
        raise ValueError(f"`prepare_for_cpu` is for models on the CPU, this one is on {model.device}.")
    model.eval()
    if weights == "float32":
        lay_out_for_cpu(model.decoder)
        return model
    if not torch.backends.mkldnn.is_available():
        if weights == "bfloat16":
            # Without oneDNN there is nothing to lay out.
            return model.to(torch.bfloat16)
        raise ValueError("int8 weights need oneDNN, which this build of torch does not have.")
    capable = cpu_capabilities()
    if weights == "int8" and not capable["int8"]:
        # Without VNNI, oneDNN sums products of int8 in 16 bits, which overflow: captions would be wrong.
        raise ValueError("This processor has no instructions (VNNI) for int8 products: use float32.")
    if weights == "bfloat16" and not capable["bfloat16"]:
        warnings.warn("This processor has no instructions for bfloat16: it is slower than float32.", stacklevel=2)
        return model.to(torch.bfloat16)
    if weights == "bfloat16":
        model.to(torch.bfloat16)
    elif weights == "int8" and capable["bfloat16"]:
        model.clap.audio_model.to(torch.bfloat16)
        model.clap.audio_projection.to(torch.bfloat16)
        if hasattr(model.clap, "classifier"):
            model.clap.classifier.to(torch.bfloat16)
    _replace_linear_layers(model.decoder, PackedLinear if weights == "bfloat16" else Int8Linear)
    return model


def lay_out_for_cpu(decoder: Any) -> None:
    """Lays the weights of GPT-2's `Conv1D` layers out output by output, as `nn.Linear` has them; no number changes.

    With the few rows of a decode step a CPU multiplies that layout in 0.6 of the time. The parameters stay what they
    are, with the same shapes; only their strides change.
    """
    for module in decoder.modules():
        if isinstance(module, Conv1D) and module.weight.is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()


def _replace_linear_layers(decoder: Any, kind: type[nn.Module]) -> None:
    with torch.no_grad():
        for parent in list(decoder.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, Conv1D):
                    setattr(parent, name, kind(layer.weight.t(), layer.bias))
                elif isinstance(layer, nn.Linear):
                    setattr(parent, name, kind(layer.weight, layer.bias))
