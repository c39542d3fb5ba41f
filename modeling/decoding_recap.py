"""Decoding with the prompt computed once: what the beams of a clip share is kept once, whatever `generate` repeats.

`generate` repeats a clip for each of its beams: prompt, encoder states and caches alike. With a prompt of 90 tokens
and a caption of 15 that is most of the work. [`SharedPromptCache`] keeps the prompt's keys and values and those of the
cross-attention once per clip, and per beam only what it has generated; the search itself stays transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.pytorch_utils import Conv1D

# Slots for generated tokens are made in steps of this many, so that a cache seldom grows.
_SLOTS = 16


class SharedPromptCache(EncoderDecoderCache):
    """The cache of a `generate` in which consecutive rows are the beams or samples of one clip.

    Args:
        num_clips (`int`): clips in the batch; the rows of the prompt tell how many belong to each.
    """

    def __init__(self, num_clips: int) -> None:
        super().__init__(DynamicCache(), DynamicCache())
        self.num_clips = num_clips
        self.group_size = 1
        # After the prompt, (num_clips, 1, vocab_size): scoring begins here.
        self.prompt_logits: torch.Tensor | None = None
        self.prompt_bias: torch.Tensor | None = None
        self.encoder_bias: torch.Tensor | None = None
        self.num_generated = 0
        # Per layer: keys and values of shape (rows, heads, slots, head_dim).
        self.generated: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def is_filled(self) -> bool:
        """Whether the prompt has gone through the decoder."""
        return self.self_attention_cache.get_seq_length() > 0

    def prompt_cache(self) -> EncoderDecoderCache:
        """The shared part as one of transformers' own caches, a row per clip."""
        return EncoderDecoderCache(self.self_attention_cache, self.cross_attention_cache)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.self_attention_cache.get_seq_length() + self.num_generated

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows move within their clip: the shared part stays, the generated part follows the beams."""
        if self.num_generated:
            self.generated = [
                (keys.index_select(0, beam_idx), values.index_select(0, beam_idx)) for keys, values in self.generated
            ]

    def append(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds one token's (rows, heads, head_dim) and returns all generated (rows, heads, tokens, head_dim)."""
        if layer_idx == len(self.generated):
            shape = (key.shape[0], key.shape[1], _SLOTS, key.shape[2])
            self.generated.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self.generated[layer_idx]
        if self.num_generated == keys.shape[2]:
            keys, values = (torch.cat([part, torch.empty_like(part)], dim=2) for part in (keys, values))
            self.generated[layer_idx] = (keys, values)
        keys[:, :, self.num_generated] = key
        values[:, :, self.num_generated] = value
        length = self.num_generated + 1
        return keys[:, :, :length], values[:, :, :length]


def decode_with_shared_prompt(
    decoder: Any,
    cache: SharedPromptCache,
    input_ids: torch.LongTensor,
    decoder_attention_mask: torch.Tensor,
    position_ids: torch.LongTensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """One forward pass of `generate`: the prompt, or one more token.

    Args:
        decoder (`GPT2LMHeadModel`): with [`RecapCrossAttention`] in its blocks.
        cache ([`SharedPromptCache`]): filled by the first call, extended by the others.
        input_ids (`torch.LongTensor` of shape `(rows, length)`): `length` is 1 but for the prompt.
        decoder_attention_mask (`torch.Tensor` of shape `(rows, length so far)`), position_ids: as in the model.
        encoder_hidden_states, encoder_attention_mask: one row per row of `input_ids`.

    Returns:
        Logits of the last position, `(rows, 1, vocab_size)`.
    """
    if cache.is_filled:
        return _decode_token(decoder, cache, input_ids[:, -1], position_ids[:, -1]).unsqueeze(1)
    cache.group_size = len(input_ids) // cache.num_clips
    first = slice(None, None, cache.group_size)
    mask = None if encoder_attention_mask is None else encoder_attention_mask[first]
    output = decoder(
        input_ids=input_ids[first],
        attention_mask=decoder_attention_mask[first],
        position_ids=position_ids[first],
        encoder_hidden_states=encoder_hidden_states[first].contiguous(),
        encoder_attention_mask=mask,
        past_key_values=cache.prompt_cache(),
        use_cache=True,
        logits_to_keep=1,
    )
    cache.prompt_bias = _bias(decoder_attention_mask[first], output.logits.dtype)
    cache.encoder_bias = None if mask is None or bool(mask.all()) else _bias(mask, output.logits.dtype)
    cache.prompt_logits = output.logits
    return output.logits.repeat_interleave(cache.group_size, dim=0)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, length) of ones and zeros -> an additive bias (B, 1, 1, length)."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


def _decode_token(
    decoder: Any, cache: SharedPromptCache, input_ids: torch.LongTensor, position_ids: torch.LongTensor
) -> torch.Tensor:
    """(rows,) -> logits (rows, vocab_size), through the decoder's own layers."""
    transformer = decoder.transformer
    hidden = transformer.wte(input_ids) + transformer.wpe(position_ids)
    for layer_idx, block in enumerate(transformer.h):
        hidden = hidden + _self_attention(block.attn, block.ln_1(hidden), cache, layer_idx)
        hidden = hidden + _cross_attention(block.crossattention, block.ln_cross_attn(hidden), cache, layer_idx)
        hidden = hidden + block.mlp(block.ln_2(hidden))
    cache.num_generated += 1
    return decoder.lm_head(transformer.ln_f(hidden))


def _self_attention(layer: Any, hidden: torch.Tensor, cache: SharedPromptCache, layer_idx: int) -> torch.Tensor:
    rows, group, heads, head_dim = len(hidden), cache.group_size, layer.num_heads, layer.head_dim
    query, key, value = layer.c_attn(hidden).view(rows, 3, heads, head_dim).unbind(dim=1)
    keys, values = cache.append(layer_idx, key, value)
    prompt = cache.self_attention_cache.layers[layer_idx]
    prompt_length = prompt.keys.shape[2]
    # The beams of a clip are queries of one attention over its prompt: (B, heads, group, head_dim).
    shared_query = query.view(-1, group, heads, head_dim).transpose(1, 2)
    over_prompt = shared_query @ prompt.keys.transpose(2, 3) * layer.scaling + cache.prompt_bias
    over_own = (keys @ query.unsqueeze(3)).squeeze(3) * layer.scaling
    over_own = over_own.view(-1, group, heads, keys.shape[2]).transpose(1, 2)
    weights = torch.cat([over_prompt, over_own], dim=3).softmax(dim=3)
    from_prompt = weights[..., :prompt_length] @ prompt.values
    own_weights = weights[..., prompt_length:].transpose(1, 2).reshape(rows, heads, 1, -1)
    output = from_prompt.transpose(1, 2).reshape(rows, heads, head_dim) + (own_weights @ values).squeeze(2)
    return layer.c_proj(output.reshape(rows, heads * head_dim))


def _cross_attention(layer: Any, hidden: torch.Tensor, cache: SharedPromptCache, layer_idx: int) -> torch.Tensor:
    rows, group, heads, head_dim = len(hidden), cache.group_size, layer.num_heads, layer.head_dim
    encoder = cache.cross_attention_cache.layers[layer_idx]
    query = layer.q_attn(hidden).view(-1, group, heads, head_dim).transpose(1, 2)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, encoder.keys, encoder.values, attn_mask=cache.encoder_bias, scale=layer.scaling
    )
    return layer.c_proj(output.transpose(1, 2).reshape(rows, heads * head_dim))


def can_share_prompt(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call of `generate` can use a [`SharedPromptCache`]; if not, transformers' own caches serve it.

    Those serve whatever looks inside a forward pass or brings a cache of its own: attention maps and hidden states,
    static and quantized caches, assisted decoding, chunked prefill, models spread over devices, hooked or replaced
    layers.
    """

    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(generation_config, name, None))

    asked_otherwise = ("cache_implementation", "output_attentions", "output_hidden_states", "prefill_chunk_size")
    bring_their_own = ("past_key_values", "assistant_model", "custom_generate", "prompt_lookup_num_tokens")
    decoder = model.config.decoder
    return (
        decoder.add_cross_attention
        and not any(setting(name) for name in (*asked_otherwise, *bring_their_own))
        and setting("use_cache") is not False
        and not model.training
        and not getattr(model, "hf_device_map", None)
        and not decoder.reorder_and_upcast_attn
        and not decoder.output_attentions
        and type(model.decoder.transformer.h[0].attn.c_attn) is Conv1D
    )


__all__ = ["SharedPromptCache", "can_share_prompt", "decode_with_shared_prompt"]
