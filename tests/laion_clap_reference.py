"""Runs the original `laion_clap` code on random weights; a program for the Python that has it, not a test.

Usage: PYTHON laion_clap_reference.py OUT --size tiny|base [--fusion] [--seed N]

Writes OUT/checkpoint.pt (laid out as LAION's training writes it) and OUT/reference.safetensors with the inputs given
to the original model and everything that came out of it. Text is given as token ids: RoBERTa's vocabulary is a
download.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import RobertaConfig, RobertaModel


def import_clap_module() -> tuple[types.ModuleType, Path]:
    """`laion_clap.clap_module.model` without the package's own __init__, which wants every training dependency."""
    if importlib.util.find_spec("torchvision") is None:
        stubs = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms")
        for name in stubs:
            sys.modules[name] = types.ModuleType(name)
        # Only used to freeze image towers, which no model here has.
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (torch.nn.Module,), {})
    root = Path(importlib.util.find_spec("laion_clap").origin).parent
    for name in ("laion_clap", "laion_clap.clap_module"):
        package = types.ModuleType(name)
        package.__path__ = [str(root / "clap_module" if name.endswith("clap_module") else root)]
        sys.modules[name] = package
    return importlib.import_module("laion_clap.clap_module.model"), root


def build(size: str, fusion: bool, seed: int) -> torch.nn.Module:
    module, root = import_clap_module()
    # The original asks the Hub for roberta-base; random weights of the same architecture stand in for it.
    roberta = RobertaConfig(
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    module.RobertaModel = types.SimpleNamespace(from_pretrained=lambda _: RobertaModel(roberta))
    settings = json.loads((root / "clap_module" / "model_configs" / f"HTSAT-{size}.json").read_text())
    settings["text_cfg"]["model_type"] = "roberta"
    torch.manual_seed(seed)
    model = module.CLAP(**settings, enable_fusion=fusion, fusion_type="aff_2d" if fusion else "None").eval()
    with torch.no_grad():
        # Fresh layers are too tame: zero biases, unit norms and BatchNorm statistics hide swapped or dropped tensors.
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            if name.endswith(("running_var",)):
                tensor.uniform_(0.5, 1.5)
            elif "bn0.running_mean" in name:
                tensor.uniform_(-40, -30)
            elif name.endswith(("running_mean", "relative_position_bias_table", ".bias")):
                tensor.normal_(0, 0.1)
            elif "norm" in name.lower() and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
        model.audio_branch.bn0.running_var.fill_(300.0)
    return model


def run(model: torch.nn.Module, fusion: bool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    branch = model.audio_branch
    hidden = {}
    branch.norm.register_forward_hook(lambda _, __, output: hidden.update(last=output))
    for index, layer in enumerate(branch.layers):
        layer.register_forward_hook(lambda _, __, output, index=index: hidden.update({f"stage{index}": output[0]}))
    model.text_branch.register_forward_hook(lambda _, __, output: hidden.update(text=output.last_hidden_state))

    waveform = 0.3 * torch.randn(2, 480_000, generator=generator)
    if fusion:
        mel = -35 + 17 * torch.randn(2, 4, 1001, 64, generator=generator)
        longer = torch.tensor([True, False])
        features = {"mel_fusion": mel, "longer": longer}
    else:
        with torch.no_grad():
            mel = branch.logmel_extractor(branch.spectrogram_extractor(waveform))
        longer = torch.tensor([False, False])
        features = {"waveform": waveform}
    ids = torch.randint(3, 50_265, (2, 12), generator=generator)
    ids[:, 0], ids[0, -1], ids[1, 8], ids[1, 9:] = 0, 2, 2, 1
    mask = (ids != 1).long()
    result = {"mel": mel, "longer": longer, "waveform": waveform, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        items = [{name: value[row] for name, value in features.items()} for row in range(2)]
        result["audio_embeds"] = model.get_audio_embedding(items)
        result["text_embeds"] = model.get_text_embedding({"input_ids": ids, "attention_mask": mask})
    result.update({f"hidden.{name}": tensor for name, tensor in hidden.items()})
    return {name: tensor.contiguous() for name, tensor in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--fusion", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = build(args.size, args.fusion, args.seed)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "random", "state_dict": state}, args.out / "checkpoint.pt")
    save_file(run(model, args.fusion, args.seed), args.out / "reference.safetensors")


if __name__ == "__main__":
    main()
