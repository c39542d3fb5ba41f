"""Stock transformers parts into a RECAP model, and a RECAP model into stock parts.

The parts are a `ClapModel`, a `GPT2LMHeadModel` and the tensors of the cross-attention between them. The stock GPT-2
has only a cross-attention of its own width; `widen_cross_attention` writes a narrower one into it without changing
what it computes, so that a trained RECAP decoder runs in plain transformers.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, ClapConfig, ClapModel, GPT2Config, GPT2LMHeadModel

from recap_hf.modeling.configuration_recap import HIDDEN, RecapConfig
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.processing_recap import RecapProcessor

from .state_dicts import ConversionError, check_complete, fill

_CROSS = re.compile(r"transformer\.h\.\d+\.(crossattention|ln_cross_attn)\.")


def split_state_dict(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dict of a RECAP model as those of its CLAP, of its GPT-2 and of the layers between them.

    The last has the names that the layers have in the decoder (``transformer.h.0.crossattention.c_attn.weight``).

    Raises:
        ConversionError: a key belongs to none of the three.
    """
    clap = {key.removeprefix("clap."): value for key, value in state.items() if key.startswith("clap.")}
    whole = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}
    unknown = [key for key in state if not key.startswith(("clap.", "decoder."))]
    check_complete({}, {}, unknown, "the RECAP state dict")
    cross = {key: value for key, value in whole.items() if _CROSS.match(key)}
    return clap, {key: value for key, value in whole.items() if key not in cross}, cross


def join_parts(
    model_class: type[RecapForConditionalGeneration],
    clap: str | os.PathLike | nn.Module,
    decoder: str | os.PathLike | GPT2LMHeadModel,
    clap_kwargs: Mapping[str, Any] | None = None,
    decoder_kwargs: Mapping[str, Any] | None = None,
    **config_kwargs: Any,
) -> RecapForConditionalGeneration:
    """See `RecapForConditionalGeneration.from_clap_gpt2_pretrained`."""
    if not isinstance(clap, nn.Module):
        clap = AutoModel.from_pretrained(clap, **(clap_kwargs or {}))
    if not isinstance(decoder, GPT2LMHeadModel):
        decoder = GPT2LMHeadModel.from_pretrained(decoder, **(decoder_kwargs or {}))
    # Their origin may be a path of this machine: it is not saved.
    parts = [{**part.config.to_dict(), "_name_or_path": ""} for part in (clap, decoder)]
    config = model_class.config_class(clap=parts[0], decoder=parts[1], **config_kwargs)
    model = model_class(config).to(decoder.dtype)
    model.clap.load_state_dict(clap.state_dict())
    missing, unexpected = (
        [key for key in keys if ".crossattention." not in key and ".ln_cross_attn." not in key]
        for keys in model.decoder.load_state_dict(decoder.state_dict(), strict=False)
    )
    if missing or unexpected:
        raise ValueError(f"The decoder's weights are not a GPT-2's: missing {missing}, unexpected {unexpected}.")
    return model.eval()


def join_processors(
    processor_class: type[RecapProcessor], clap: str | os.PathLike, decoder: str | os.PathLike, **settings: Any
) -> RecapProcessor:
    """See `RecapProcessor.from_clap_gpt2_pretrained`."""
    parts = [{**AutoConfig.from_pretrained(name).to_dict(), "_name_or_path": ""} for name in (clap, decoder)]
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (decoder, clap)]
    settings = {"feature_extractor": RecapFeatureExtractor.from_clap_pretrained(clap), **settings}
    return processor_class.from_config(RecapConfig(*parts), *tokenizers, **settings)


def stock_parts(model: RecapForConditionalGeneration) -> tuple[nn.Module, GPT2LMHeadModel, dict[str, torch.Tensor]]:
    """`model` as its CLAP (a `ClapModel`, or the encoder's own class), a `GPT2LMHeadModel` without cross-attention,
    and the tensors in between.

    Dtype and tied weights stay as they are; the parts hold copies.
    """
    clap_state, decoder_state, cross = split_state_dict(model.state_dict())
    clap_config, decoder_config = type(model.config.clap)(**_plain(model.config.clap)), _decoder_config(model, False)
    with torch.device("meta"):
        kind = ClapModel if isinstance(clap_config, ClapConfig) else type(model.clap)
        clap, decoder = kind(clap_config), GPT2LMHeadModel(decoder_config)
    check_complete(clap_state, clap.state_dict(), subject="the CLAP inside the RECAP model")
    check_complete(decoder_state, decoder.state_dict(), subject="the GPT-2 inside the RECAP model")
    decoder = fill(decoder, decoder_state, model.decoder.dtype)
    decoder.tie_weights()
    return fill(clap, clap_state, model.clap.dtype), decoder, {key: value.clone() for key, value in cross.items()}


def stock_decoder(model: RecapForConditionalGeneration) -> GPT2LMHeadModel:
    """The whole decoder, cross-attention included, as a stock `GPT2LMHeadModel` that gives the same logits.

    Its cross-attention is as wide as `add_cross_attention` makes it; what the factor saved is filled with zeros.

    Raises:
        ConversionError: the encoder is not as wide as the decoder, or its states are embeddings.
    """
    config = model.config
    if config.encoder_states != HIDDEN:
        raise ConversionError("stock GPT-2 reads hidden states; this captioner is conditioned on CLAP's embeddings")
    if config.encoder_hidden_size != config.decoder.n_embd:
        hint = f"these are {config.encoder_hidden_size} wide. Take the parts without the cross-attention inside."
        raise ConversionError(f"stock GPT-2 reads encoder states as wide as itself ({config.decoder.n_embd}); {hint}")
    _, state, cross = split_state_dict(model.state_dict())
    scaled, factor = config.decoder.scale_attn_weights, config.cross_attention_reduce_factor
    wide = widen_cross_attention(cross, config.decoder.n_head, factor, scaled)
    with torch.device("meta"):
        decoder = GPT2LMHeadModel(_decoder_config(model, True))
    state = {**state, **wide}
    check_complete(state, decoder.state_dict(), subject="the decoder of the RECAP model")
    decoder = fill(decoder, state, model.decoder.dtype)
    decoder.tie_weights()
    return decoder


def widen_cross_attention(
    cross: Mapping[str, torch.Tensor], num_heads: int, factor: int, scaled: bool = True
) -> dict[str, torch.Tensor]:
    """A cross-attention of width w / factor as one of width w that computes the same.

    Head by head, the narrow queries, keys and values take the first places of the wide ones and zeros the others.
    Attention scores are divided by the square root of the head size, so the queries grow by the factor's root.

    Args:
        cross: tensors named as in the decoder; others than `crossattention`'s pass through.
        num_heads: of the decoder.
        factor: `cross_attention_reduce_factor`.
        scaled: GPT-2's `scale_attn_weights`.
    """
    result = dict(cross)
    for key, tensor in cross.items():
        layer, _, kind = key.rpartition(".crossattention.")
        if not layer:
            continue
        if kind.startswith("q_attn."):
            result[key] = _spread(tensor, num_heads, factor, -1) * (factor**0.5 if scaled else 1.0)
        elif kind.startswith("c_attn."):
            keys, values = tensor.chunk(2, dim=-1)
            result[key] = torch.cat([_spread(part, num_heads, factor, -1) for part in (keys, values)], dim=-1)
        elif kind == "c_proj.weight":
            result[key] = _spread(tensor, num_heads, factor, 0)
    return result


def _spread(tensor: torch.Tensor, num_heads: int, factor: int, dim: int) -> torch.Tensor:
    moved = tensor.movedim(dim, -1)
    heads = moved.unflatten(-1, (num_heads, -1))
    padding = heads.new_zeros(*heads.shape[:-1], heads.shape[-1] * (factor - 1))
    return torch.cat([heads, padding], dim=-1).flatten(-2).movedim(-1, dim).contiguous()


def _decoder_config(model: RecapForConditionalGeneration, cross_attention: bool) -> GPT2Config:
    values = _plain(model.config.decoder)
    values.update(add_cross_attention=cross_attention, is_decoder=cross_attention)
    return GPT2Config(**values)


def _plain(config: object) -> dict:
    values = config.to_dict()
    for key in ("model_type", "transformers_version", "architectures", "dtype", "auto_map"):
        values.pop(key, None)
    return values
