"""State dicts in LAION-CLAP's naming, written down from its architecture: names and shapes, no code of either side."""

from __future__ import annotations

import torch

TINY = {"embed": 96, "depths": (2, 2, 6, 2), "heads": (4, 8, 16, 32)}
BASE = {"embed": 128, "depths": (2, 2, 12, 2), "heads": (4, 8, 16, 32)}
ROBERTA = {"hidden": 768, "layers": 12, "inner": 3072, "vocabulary": 50_265, "positions": 514}
SMALL = {"embed": 16, "depths": (2, 2, 2, 1), "heads": (1, 2, 4, 8)}
SMALL_ROBERTA = {"hidden": 64, "layers": 2, "inner": 96, "vocabulary": 120, "positions": 40}


def audio_shapes(embed: int, depths: tuple, heads: tuple, fusion: bool, joint: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, *kernel)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int, batch: bool = False) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
        if batch:
            shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)
            shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn0", 64, batch=True)
    linear("patch_embed.proj", embed, 1, 4, 4)
    norm("patch_embed.norm", embed)
    if fusion:
        linear("patch_embed.mel_conv2d", embed, 1, 4, 12)
        for branch, first in (("local_att", 0), ("global_att", 1)):
            inner = f"patch_embed.fusion_model.{branch}"
            linear(f"{inner}.{first}", embed // 4, embed, 1, 1)
            norm(f"{inner}.{first + 1}", embed // 4, batch=True)
            linear(f"{inner}.{first + 3}", embed, embed // 4, 1, 1)
            norm(f"{inner}.{first + 4}", embed, batch=True)
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        width, side = embed * 2**stage, 64 // 2**stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            norm(f"{name}.norm1", width)
            norm(f"{name}.norm2", width)
            shapes[f"{name}.attn.relative_position_bias_table"] = (225, count)
            shapes[f"{name}.attn.relative_position_index"] = (64, 64)
            linear(f"{name}.attn.qkv", 3 * width, width)
            linear(f"{name}.attn.proj", width, width)
            linear(f"{name}.mlp.fc1", 4 * width, width)
            linear(f"{name}.mlp.fc2", width, 4 * width)
            if block % 2 and side > 8:
                shapes[f"{name}.attn_mask"] = ((side // 8) ** 2, 64, 64)
        if stage < len(depths) - 1:
            linear(f"layers.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
            norm(f"layers.{stage}.downsample.norm", 4 * width)
    last = embed * 2 ** (len(depths) - 1)
    norm("norm", last)
    linear("tscam_conv", 527, last, 2, 3)
    linear("head", 527, 527)
    shapes["spectrogram_extractor.stft.conv_real.weight"] = (513, 1, 1024)
    shapes["spectrogram_extractor.stft.conv_imag.weight"] = (513, 1, 1024)
    shapes = {f"audio_branch.{name}": shape for name, shape in shapes.items()}
    linear("audio_projection.0", joint, last)
    linear("audio_projection.2", joint, joint)
    for index in (0, 3):
        linear(f"audio_transform.sequential.{index}", joint, joint)
    return shapes


def text_shapes(
    hidden: int, layers: int, inner: int, vocabulary: int, positions: int, joint: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "text_branch.embeddings.word_embeddings.weight": (vocabulary, hidden),
        "text_branch.embeddings.position_embeddings.weight": (positions, hidden),
        "text_branch.embeddings.token_type_embeddings.weight": (1, hidden),
        "text_branch.embeddings.LayerNorm.weight": (hidden,),
        "text_branch.embeddings.LayerNorm.bias": (hidden,),
        "text_branch.embeddings.position_ids": (1, positions),
        "logit_scale_a": (),
        "logit_scale_t": (),
    }
    dense = [("text_branch.pooler.dense", hidden, hidden)]
    for layer in range(layers):
        name = f"text_branch.encoder.layer.{layer}"
        dense += [(f"{name}.attention.self.{kind}", hidden, hidden) for kind in ("query", "key", "value")]
        dense += [
            (f"{name}.attention.output.dense", hidden, hidden),
            (f"{name}.intermediate.dense", inner, hidden),
            (f"{name}.output.dense", hidden, inner),
        ]
        for kind in ("attention.output", "output"):
            shapes[f"{name}.{kind}.LayerNorm.weight"] = shapes[f"{name}.{kind}.LayerNorm.bias"] = (hidden,)
    dense += [("text_projection.0", joint, hidden), ("text_projection.2", joint, joint)]
    dense += [(f"text_transform.sequential.{index}", joint, joint) for index in (0, 3)]
    for name, outputs, inputs in dense:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)
    return shapes


def relative_position_index(side: int = 8) -> torch.Tensor:
    """Swin's table lookup for two positions of a window, by counting: row offset first, then column offset."""
    cells = [(row, column) for row in range(side) for column in range(side)]
    span = 2 * side - 1
    return torch.tensor(
        [[(a - c + side - 1) * span + (b - d + side - 1) for c, d in cells] for a, b in cells], dtype=torch.long
    )


def laion_state_dict(
    audio: dict, text: dict, fusion: bool = False, joint: int = 512, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tensors under LAION's names; integer buffers have the values that the original computes."""
    shapes = audio_shapes(**audio, fusion=fusion, joint=joint) | text_shapes(**text, joint=joint)
    generator = torch.Generator().manual_seed(seed)
    index = relative_position_index()
    state = {}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
        elif name.endswith("relative_position_index"):
            state[name] = index
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif device == "meta":
            state[name] = torch.empty(shape, device="meta")
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            state[name] = 0.1 * torch.randn(shape, generator=generator)
    return state
