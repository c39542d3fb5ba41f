"""Checkpoints of the authors' RECAP code (Sreyan88/RECAP, commit 832ad8a) into `RecapForConditionalGeneration`.

Their captioner descends from SmallCap: ``encoder.*`` is a `ClapAudioModel`, ``decoder.*`` a GPT-2 whose blocks have a
cross-attention of reduced width, both under the names that transformers gave them. The text tower and the projections
that retrieval needs are in no such checkpoint; they come from the CLAP that the training started from (the code's
default is laion/clap-htsat-fused), whose audio tower must be the one in the checkpoint: it was frozen.

The result keeps the authors' prompt, special tokens (pad ``!``, end ``.``) and number of retrieved captions. Their
retrieval used another CLAP (laion/clap-htsat-unfused) than their captioner; here one model does both, so the captions
retrieved are not always theirs.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import ClapModel, GPT2Config

from recap_hf.modeling.configuration_recap import RecapConfig
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.prompts import OFFICIAL_PROMPT

from .state_dicts import ConversionError, check_complete, floating_dtype, relative_error

# `--k` of their train.py.
_DEFAULT_NUM_RETRIEVED = 3
# "!" and "." in GPT-2's vocabulary.
_PAD_TOKEN_ID, _EOS_TOKEN_ID = 0, 13

# Buffers of older GPT-2 code: the causal mask and the value that it masked with.
_UNUSED = re.compile(r"decoder\.transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$")
_UNSUPPORTED = {
    r"enc_to_dec_proj\.": "it has a projection between encoder and decoder, which RECAP has not",
    r"encoder\.vision_model\.": "its encoder is a CLIP image tower: a SmallCap checkpoint, which describes pictures",
    r"decoder\.model\.": "its decoder is an OPT or XGLM; only GPT-2 is supported",
}
_TOWER_TOLERANCE = 1e-5


def read_recap_original_config(folder: str | Path) -> dict:
    """The settings in the authors' ``config.json``: their own keys, and GPT-2's under ``decoder``.

    Raises:
        ConversionError: it is not the configuration of such a checkpoint.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}; expected a checkpoint folder of the authors' code")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "clap" in config:
        raise ConversionError(f"{folder} is a checkpoint of this package already: nothing to convert")
    decoder = config.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("model_type") not in ("this_gpt2", "gpt2"):
        found = decoder.get("model_type") if isinstance(decoder, dict) else None
        raise ConversionError(f"{path}: expected a decoder of model type this_gpt2, got {found!r}")
    return config


def recap_config_from_original(state: Mapping[str, torch.Tensor], original: dict, clap: ClapModel) -> RecapConfig:
    """Our configuration for the authors' checkpoint; the width of the cross-attention is read off its tensors."""
    kept = {key: value for key, value in original["decoder"].items() if hasattr(GPT2Config(), key)}
    kept.pop("model_type", None)
    decoder = GPT2Config(**kept)
    word, head = (state.get(f"decoder.{name}.weight") for name in ("transformer.wte", "lm_head"))
    decoder.tie_word_embeddings = word is None or head is None or torch.equal(word, head)
    query = state.get("decoder.transformer.h.0.crossattention.q_attn.weight")
    if query is None:
        raise ConversionError("the checkpoint has no cross-attention: decoder.transformer.h.0.crossattention.q_attn")
    width = query.shape[-1]
    if width == 0 or decoder.n_embd % width:
        raise ConversionError(f"a cross-attention {width} wide does not divide a decoder {decoder.n_embd} wide")
    factor = decoder.n_embd // width
    stated = original["decoder"].get("cross_attention_reduce_factor", factor)
    if stated != factor:
        found = f"the cross-attention is {width} wide in a decoder of {decoder.n_embd}: a factor of {factor}"
        raise ConversionError(f"config.json has cross_attention_reduce_factor {stated}, but {found}")
    ids = {"pad_token_id": _PAD_TOKEN_ID, "eos_token_id": _EOS_TOKEN_ID}
    ids |= {name: original[name] for name in ids if original.get(name) is not None}
    parts = {"clap": clap.config.to_dict(), "decoder": decoder.to_dict()}
    return RecapConfig(**parts, cross_attention_reduce_factor=factor, **ids)


def processor_settings_from_original(original: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' prompt and k, as [`RecapProcessor`] takes them."""
    return {
        "num_retrieved_captions": original.get("k", _DEFAULT_NUM_RETRIEVED),
        "prompt_template": OFFICIAL_PROMPT.template,
        "caption_separator": OFFICIAL_PROMPT.separator,
        "prompt_without_captions": OFFICIAL_PROMPT.without_captions,
        "target_prefix": OFFICIAL_PROMPT.target_prefix,
    }


def convert_recap_original_state_dict(
    state: Mapping[str, torch.Tensor], clap: ClapModel, config: RecapConfig
) -> dict[str, torch.Tensor]:
    """The authors' tensors, and those of `clap` that they lack, under the names of `RecapForConditionalGeneration`.

    Args:
        state: ``encoder.*`` and ``decoder.*``.
        clap: the CLAP that the training started from.
        config: from `recap_config_from_original`.

    Raises:
        ConversionError: unknown, missing or wrongly shaped keys, or an audio tower other than `clap`'s.
    """
    for pattern, reason in _UNSUPPORTED.items():
        if any(re.match(pattern, key) for key in state):
            raise ConversionError(f"this checkpoint cannot be converted: {reason}")
    with torch.device("meta"):
        expected = RecapForConditionalGeneration(config).state_dict()
    dtype = floating_dtype(state)
    converted = {
        f"clap.{key}": value.to(dtype) if value.is_floating_point() else value
        for key, value in clap.state_dict().items()
        if not key.startswith("audio_model.")
    }
    unknown = []
    for key, tensor in state.items():
        name = re.sub(r"^encoder\.", "clap.audio_model.", key)
        if _UNUSED.match(key):
            continue
        if name in expected and (name != key or key.startswith("decoder.")):
            converted[name] = tensor
        else:
            unknown.append(key)
    if config.decoder.tie_word_embeddings and "decoder.transformer.wte.weight" in converted:
        # A tied head is stored by some versions of transformers and not by others.
        converted["decoder.lm_head.weight"] = converted["decoder.transformer.wte.weight"]
    check_complete(converted, expected, unknown, "the authors' checkpoint")
    _check_same_tower(converted, clap)
    return converted


def _check_same_tower(converted: Mapping[str, torch.Tensor], clap: ClapModel) -> None:
    differing = {}
    for key, reference in clap.audio_model.state_dict().items():
        if reference.is_floating_point():
            error = relative_error(converted[f"clap.audio_model.{key}"], reference.to(floating_dtype(converted)))
            if not error <= _TOWER_TOLERANCE:
                differing[key] = error
    if differing:
        worst = max(differing, key=differing.get)
        raise ConversionError(
            f"the audio tower in the checkpoint is not the one of the given CLAP: {len(differing)} tensors differ, "
            f"{worst} by {differing[worst]:.1e} relative. Give the CLAP that the training started from (the authors' "
            "default is laion/clap-htsat-fused): its text tower and projections belong to its own audio tower."
        )
