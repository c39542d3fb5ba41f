"""LAION-CLAP ``.pt`` checkpoints (https://github.com/LAION-AI/CLAP) into transformers' `ClapModel`.

Covered: the HTSAT audio branch in every size (tiny, base, large), with and without attentional feature fusion
(``aff_2d``, the only fusion of the released checkpoints), and the RoBERTa text branch. The configuration is read off
the shapes. Two facts are not in the file and are those of LAION's code: patches of 4 x 4 bins that do not overlap, and
ReLU in both projections; the heads of the text tower are taken to be 64 wide, as in every RoBERTa.

RoBERTa's layer norms use an epsilon of 1e-5 where `ClapTextConfig` defaults to 1e-12; with the default, text
embeddings are off by about 1e-4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor

from .output import finished_folder
from .state_dicts import (
    ConversionError,
    check_complete,
    check_saved,
    fill,
    floating_dtype,
    list_keys,
    read_weights,
    state_dict_of,
)

ROBERTA_LAYER_NORM_EPS = 1e-5
_PATCH = 4
_TEXT_HEAD_WIDTH = 64
_AUDIO = "audio_branch."
_AUDIO_TARGET = "audio_model.audio_encoder."

# Source keys that `ClapModel` has no place for, and why nothing is lost without them.
UNUSED = {
    r"audio_branch\.(spectrogram_extractor|logmel_extractor)\.": "waveform front end: the feature extractor does this",
    r"audio_branch\.(tscam_conv|head)\.": "AudioSet tagging head",
    r"audio_branch\.layers\.\d+\.blocks\.\d+\.attn_mask$": "mask of the shifted windows: computed by ClapModel",
    r"(audio|text)_transform\.": "MLP on top of the embeddings, used in LAION's training loss alone",
}
_RENAMED = (
    (r"^audio_branch\.bn0\.", _AUDIO_TARGET + "batch_norm."),
    (r"^audio_branch\.(norm|patch_embed)\.", _AUDIO_TARGET + r"\1."),
    (r"^audio_branch\.(layers\.\d+\.downsample)\.", _AUDIO_TARGET + r"\1."),
    (r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.norm1\.", _AUDIO_TARGET + r"\1.layernorm_before."),
    (r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.norm2\.", _AUDIO_TARGET + r"\1.layernorm_after."),
    (r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.attn\.proj\.", _AUDIO_TARGET + r"\1.attention.output.dense."),
    (r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.attn\.relative_", _AUDIO_TARGET + r"\1.attention.self.relative_"),
    (r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.mlp\.fc1\.", _AUDIO_TARGET + r"\1.intermediate.dense."),
    (r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.mlp\.fc2\.", _AUDIO_TARGET + r"\1.output.dense."),
    (r"^text_branch\.", "text_model."),
    (r"^(audio|text)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(audio|text)_projection\.2\.", r"\1_projection.linear2."),
    (r"^(logit_scale_[at])$", r"\1"),
)
_QKV = re.compile(r"^audio_branch\.(layers\.\d+\.blocks\.\d+)\.attn\.qkv\.(weight|bias)$")

# A key that only this architecture has, and the message.
_UNSUPPORTED = {
    r"audio_branch\.conv_block1\.": "its audio branch is PANN; only HTSAT has a counterpart in ClapModel",
    r"text_branch\.resblocks\.": "its text branch is CLIP's transformer; only RoBERTa has a counterpart in ClapModel",
    r"text_branch\.shared\.": "its text branch is BART; only RoBERTa has a counterpart in ClapModel",
    r"audio_branch\.(mel_conv1d|fusion_model)\.": "its fusion works on one dimension; only aff_2d is in ClapModel",
    r"audio_branch\.patch_embed\.fusion_model\.local_att2\.": "its fusion is iaff_2d; only aff_2d is in ClapModel",
    r"audio_branch\.absolute_pos_embed": "it has absolute position embeddings, which ClapModel has not",
}


@dataclass
class LaionConversion:
    """A converted state dict, the configuration that its shapes imply, and the keys left behind with the reason."""

    config: ClapConfig
    state_dict: dict[str, torch.Tensor]
    dtype: torch.dtype
    unused: dict[str, str] = field(default_factory=dict)


def convert_laion_clap_state_dict(state: Mapping[str, torch.Tensor]) -> LaionConversion:
    """Rename and split the tensors of a LAION-CLAP state dict into those of `ClapModel`.

    Every source key is used, or listed in `unused` with its reason, or checked against the value that `ClapModel`
    computes itself (relative position indices, position ids). Tensors keep their dtype and are views of the input.

    Raises:
        ConversionError: unknown, missing or wrongly shaped keys, an architecture that `ClapModel` does not cover, or
            another mel filter bank than the feature extractor's.
    """
    state = dict(state)
    for pattern, reason in _UNSUPPORTED.items():
        if any(re.match(pattern, key) for key in state):
            raise ConversionError(f"this LAION-CLAP checkpoint cannot be converted: {reason}")
    config = clap_config_from_laion(state)
    with torch.device("meta"):
        expected = ClapModel(config).state_dict()
    computed = _computed(config)

    converted: dict[str, torch.Tensor] = {}
    unused: dict[str, str] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        reason = next((why for pattern, why in UNUSED.items() if re.match(pattern, key)), None)
        renamed = _rename(key, tensor)
        if reason is not None:
            unused[key] = reason
        elif renamed and all(name in expected or name in computed for name in renamed):
            converted.update(renamed)
        else:
            unknown.append(key)
    # The buffers that the model stores are computed, and a source must not have others.
    for name, value in computed.items():
        if name in converted and not torch.equal(converted.pop(name).long(), value):
            raise ConversionError(f"{name} differs from the value that ClapModel computes: another architecture")
    converted.update({name: value.clone() for name, value in computed.items() if name in expected})
    check_complete(converted, expected, unknown, "the LAION-CLAP checkpoint")
    _check_mel_filters(state, laion_feature_extractor(config, state))
    return LaionConversion(config, converted, floating_dtype(converted), unused)


def _rename(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The target keys of one source key; empty if no rule matches."""
    if match := _QKV.match(key):
        block, kind = match.groups()
        if tensor.shape[0] % 3:
            raise ConversionError(f"wrong shape: {key} has {tensor.shape[0]} rows, not those of three projections")
        prefix = f"{_AUDIO_TARGET}{block}.attention.self"
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{prefix}.{name}.{kind}": part for name, part in parts}
    for pattern, replacement in _RENAMED:
        name, count = re.subn(pattern, replacement, key)
        if count:
            return {name: tensor}
    return {}


def _computed(config: ClapConfig) -> dict[str, torch.Tensor]:
    """Buffers that follow from the configuration; older and newer checkpoints store some of them or none."""
    positions, window = config.text_config.max_position_embeddings, config.audio_config.window_size
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    rows, columns = (places[:, None] - places[None] + window - 1).unbind(-1)
    index = rows * (2 * window - 1) + columns
    blocks = [(stage, block) for stage, depth in enumerate(config.audio_config.depths) for block in range(depth)]
    return {
        "text_model.embeddings.position_ids": torch.arange(positions)[None],
        "text_model.embeddings.token_type_ids": torch.zeros((1, positions), dtype=torch.long),
        **{
            f"{_AUDIO_TARGET}layers.{stage}.blocks.{block}.attention.self.relative_position_index": index
            for stage, block in blocks
        },
    }


def clap_config_from_laion(state: Mapping[str, torch.Tensor]) -> ClapConfig:
    """The `ClapConfig` that the shapes of a LAION-CLAP state dict imply.

    Raises:
        ConversionError: a tensor that carries a size is missing or has another rank, or the text branch is BERT.
    """
    joint = _shape(state, "audio_projection.0.weight", 2)[0]
    audio = _audio_config(state)
    text = _text_config(state)
    return ClapConfig(audio_config=audio, text_config=text, projection_dim=joint)


def _shape(state: Mapping[str, torch.Tensor], key: str, rank: int) -> tuple[int, ...]:
    if key not in state:
        roots = list_keys({each.split(".", 1)[0] for each in state})
        found = f"It holds {len(state)} tensors under:\n{roots}"
        raise ConversionError(f"the LAION-CLAP checkpoint does not fit; missing:\n  {key}\n{found}")
    if state[key].dim() != rank:
        raise ConversionError(f"wrong shape: {key} is {tuple(state[key].shape)}, expected {rank} dimensions")
    return tuple(state[key].shape)


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len({match.group(1) for key in state if (match := re.match(pattern, key))})


def _audio_config(state: Mapping[str, torch.Tensor]) -> dict:
    embed = _shape(state, _AUDIO + "patch_embed.proj.weight", 4)[0]
    stages = _count(state, r"audio_branch\.layers\.(\d+)\.")
    depths = [_count(state, rf"audio_branch\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)]
    table = "attn.relative_position_bias_table"
    tables = [_shape(state, f"{_AUDIO}layers.{stage}.blocks.0.{table}", 2) for stage in range(stages)]
    window = (round(tables[0][0] ** 0.5) + 1) // 2 if tables else 8
    fused = any(key.startswith(_AUDIO + "patch_embed.mel_conv2d.") for key in state)
    config = {
        "num_mel_bins": _shape(state, _AUDIO + "bn0.weight", 1)[0],
        "spec_size": _spectrogram_size(state, window),
        "patch_size": _PATCH,
        "patch_stride": [_PATCH, _PATCH],
        "patch_embeds_hidden_size": embed,
        "hidden_size": embed * 2 ** max(stages - 1, 0),
        "depths": depths,
        "num_attention_heads": [heads for _, heads in tables],
        "num_hidden_layers": stages,
        "window_size": window,
        "mlp_ratio": _shape(state, _AUDIO + "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / embed,
        "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None,
    }
    if fused:
        inner = _shape(state, _AUDIO + "patch_embed.fusion_model.local_att.0.weight", 4)[0]
        config["aff_block_r"] = embed // inner
    if _AUDIO + "head.weight" in state:
        config["num_classes"] = state[_AUDIO + "head.weight"].shape[0]
    return config


def _spectrogram_size(state: Mapping[str, torch.Tensor], window: int) -> int:
    """Side of the folded spectrogram: 256 in LAION's models, checked against the number of shifted windows."""
    mask = state.get(_AUDIO + "layers.0.blocks.1.attn_mask")
    if mask is None:
        return 256
    return round(mask.shape[0] ** 0.5) * window * _PATCH


def _text_config(state: Mapping[str, torch.Tensor]) -> dict:
    prefix = "text_branch."
    vocabulary, hidden = _shape(state, prefix + "embeddings.word_embeddings.weight", 2)
    types = _shape(state, prefix + "embeddings.token_type_embeddings.weight", 2)[0]
    if types != 1:
        hint = f"its text branch has {types} token types, so it is BERT; only RoBERTa has a counterpart in ClapModel"
        raise ConversionError(f"this LAION-CLAP checkpoint cannot be converted: {hint}")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": _count(state, r"text_branch\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(hidden // _TEXT_HEAD_WIDTH, 1),
        "intermediate_size": _shape(state, prefix + "encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": _shape(state, prefix + "embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": types,
        "layer_norm_eps": ROBERTA_LAYER_NORM_EPS,
    }


def laion_feature_extractor(config: ClapConfig, state: Mapping | None = None) -> ClapFeatureExtractor:
    """The extractor of LAION's settings: 48 kHz, hops of 10 ms, 50 to 14,000 Hz, short clips repeated to 10 s."""
    window = 1024
    filters = (state or {}).get(_AUDIO + "logmel_extractor.melW")
    if filters is not None:
        window = 2 * (filters.shape[0] - 1)
    return ClapFeatureExtractor(
        feature_size=config.audio_config.num_mel_bins,
        fft_window_size=window,
        frequency_min=50,
        frequency_max=14_000,
        truncation="fusion" if config.audio_config.enable_fusion else "rand_trunc",
        padding="repeatpad",
    )


def _check_mel_filters(state: Mapping[str, torch.Tensor], extractor: ClapFeatureExtractor) -> None:
    stored = state.get(_AUDIO + "logmel_extractor.melW")
    if stored is None:
        return
    expected = torch.from_numpy(extractor.mel_filters_slaney)
    if stored.shape != expected.shape or (stored - expected).abs().max() > 1e-3 * expected.max():
        wanted = f"LAION's mel filter bank {tuple(expected.shape)} (50 to 14,000 Hz, Slaney)"
        found = f"audio_branch.logmel_extractor.melW {tuple(stored.shape)}"
        raise ConversionError(f"{found} is not {wanted}: no ClapFeatureExtractor setting is known for it")


def convert_laion_clap(
    source: str | Path, out: str | Path, tokenizer: str | Path | None = None, overwrite: bool = False
) -> dict[str, object]:
    """Convert a LAION-CLAP file into a folder that `ClapModel.from_pretrained` loads.

    The folder gets the feature extractor's settings too, and a whole `ClapProcessor` where `tokenizer` is given. It
    appears only after the saved model was loaded again with the same tensors.

    Args:
        source: ``.pt`` file as published by LAION or written by its training code, or its state dict in safetensors.
        out: folder to make.
        tokenizer: folder or Hub id of RoBERTa's tokenizer ("roberta-base" is LAION's).
        overwrite: replace an existing folder.

    Returns:
        What was done: sizes, and the keys left behind with their reasons.

    Raises:
        ConversionError: the file does not fit; nothing is written.
    """
    state = state_dict_of(read_weights(source), source)
    conversion = convert_laion_clap_state_dict(state)
    with torch.device("meta"):
        model = ClapModel(conversion.config)
    model = fill(model, conversion.state_dict, conversion.dtype)
    extractor = laion_feature_extractor(conversion.config, state)
    with finished_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is None:
            extractor.save_pretrained(folder)
        else:
            ClapProcessor(extractor, AutoTokenizer.from_pretrained(tokenizer)).save_pretrained(folder)
        check_saved(model, ClapModel.from_pretrained(folder))
    return {
        "parameters": model.num_parameters(),
        "dtype": str(conversion.dtype).removeprefix("torch."),
        "fusion": conversion.config.audio_config.enable_fusion,
        "depths": list(conversion.config.audio_config.depths),
        "unused": conversion.unused,
    }
