"""Decoding with the prompt computed once: what the beams of a clip share is kept once.

`generate` repeats a clip for each of its beams: prompt, encoder states and caches alike. With a prompt of 90 tokens
and a caption of 15 that is most of the work. [`SharedPromptCache`] keeps the keys and values of a clip in one place:
those of the prompt, behind them those of every token that any of its beams has generated, and for each beam which of
them are its own past. Beams that change places exchange these marks; no key and no value is moved, and one attention
serves all beams of a clip.
"""

from typing import Any

import torch
from torch.nn.functional import gelu, pad, scaled_dot_product_attention
from transformers.activations import NewGELUActivation

# Places for generated tokens are made in steps of this many, so that a cache seldom grows.
_TOKENS_AHEAD = 16


class SharedPromptCache:
    """Keys and values of a search in which consecutive rows are the beams of one clip.

    Args:
        num_clips (`int`): clips in the batch; the rows of the prompt tell how many belong to each.
    """

    def __init__(self, num_clips: int) -> None:
        self.num_clips = num_clips
        self.group_size = 1
        self.prompt_length = 0
        self.num_generated = 0
        # Places that hold anything, those of the newest token included.
        self.num_seen = 0
        # Per layer, (num_clips, heads, places, head_dim): the prompt, then `group_size` places a generated token.
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        # (num_clips, 1, group_size, places): 0 where a beam sees a place, else the lowest number.
        self.bias: torch.Tensor | None = None
        # Per layer, (num_clips, heads, encoder length, head_dim).
        self.encoder: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.encoder_bias: torch.Tensor | None = None

    def open_prompt(self, mask: torch.Tensor, encoder_mask: Any, group_size: int, dtype: torch.dtype) -> None:
        """Makes room for prompts with `mask` `(num_clips, prompt_length)`, 1 for tokens and 0 for padding, and states
        with `encoder_mask` `(num_clips, encoder_length)`, for `group_size` beams of a clip, in `dtype`."""
        self.prompt_length, self.group_size = mask.shape[1], group_size
        self.bias = _bias(mask, dtype).expand(-1, -1, group_size, -1)
        self.encoder_bias = None
        if encoder_mask is not None and not bool(encoder_mask.all()):
            self.encoder_bias = _bias(encoder_mask, dtype)

    def reorder_beams(self, beams: torch.LongTensor) -> None:
        """Beams move within their clip. `beams`, `(num_clips, group_size)`: the beam that each goes on from."""
        self.bias = self.bias.take_along_dim(beams[:, None, :, None], dim=2)

    def keep_clips(self, clips: torch.LongTensor) -> None:
        """Only these clips stay; their beams become the rows."""
        self.keys = [keys.index_select(0, clips) for keys in self.keys]
        self.values = [values.index_select(0, clips) for values in self.values]
        self.encoder = [(keys.index_select(0, clips), values.index_select(0, clips)) for keys, values in self.encoder]
        self.bias = self.bias.index_select(0, clips)
        if self.encoder_bias is not None:
            self.encoder_bias = self.encoder_bias.index_select(0, clips)
        self.num_clips = len(clips)

    def open_token(self) -> slice:
        """Makes places for one more token of every beam, which each beam's own attention sees."""
        start = self.prompt_length + self.num_generated * self.group_size
        if start == self.bias.shape[3]:
            more = _TOKENS_AHEAD * self.group_size
            # Zeros: a place that nobody sees must not be NaN.
            self.keys = [pad(keys, (0, 0, 0, more)) for keys in self.keys]
            self.values = [pad(values, (0, 0, 0, more)) for values in self.values]
            self.bias = pad(self.bias, (0, more), value=torch.finfo(self.bias.dtype).min)
        places = slice(start, start + self.group_size)
        self.num_seen = places.stop
        self.bias[:, 0, :, places].diagonal(dim1=1, dim2=2).zero_()
        self.num_generated += 1
        return places


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, length) of ones and zeros -> an additive bias (B, 1, 1, length)."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


def decode_prompt(
    decoder: Any,
    cache: SharedPromptCache,
    input_ids: torch.LongTensor,
    decoder_attention_mask: torch.Tensor,
    position_ids: torch.LongTensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Fills a cache with the prompts.

    Args:
        decoder (`GPT2LMHeadModel`): with RECAP's cross-attention in its blocks.
        cache ([`SharedPromptCache`]): empty.
        input_ids, decoder_attention_mask, position_ids (`torch.Tensor` of shape `(rows, length)`): as in the model, a
            row for each beam, those of a clip together.
        encoder_hidden_states, encoder_attention_mask: one row for each row of `input_ids`.

    Returns:
        Logits after the prompts, `(rows, vocab_size)`.
    """
    group_size = len(input_ids) // cache.num_clips
    first = slice(None, None, group_size)
    encoder_mask = None if encoder_attention_mask is None else encoder_attention_mask[first]
    states, mask = encoder_hidden_states[first].contiguous(), decoder_attention_mask[first]
    cache.open_prompt(mask, encoder_mask, group_size, states.dtype)
    transformer, length, bias = decoder.transformer, input_ids.shape[1], None
    if not bool(mask.all()):
        dtype = cache.bias.dtype
        future = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
        bias = torch.minimum(future.triu(diagonal=1), _bias(mask, dtype))
    hidden = transformer.wte(input_ids[first]) + transformer.wpe(position_ids[first])
    for layer_idx, block in enumerate(transformer.h):
        query, key, value = _split_heads(block.attn, block.attn.c_attn(block.ln_1(hidden)))
        cache.keys.append(key)
        cache.values.append(value)
        causal = bias is None
        if layer_idx == len(transformer.h) - 1:
            # Of the last layer's output only the last position is asked for; it sees all before it.
            hidden, query, causal = hidden[:, -1:], query[:, :, -1:], False
            bias = None if bias is None else bias[:, :, -1:]
        shape = {"attn_mask": bias, "is_causal": causal, "scale": block.attn.scaling}
        output = scaled_dot_product_attention(query, key, value, **shape)
        hidden = hidden + block.attn.c_proj(output.transpose(1, 2).flatten(2))
        cross = block.crossattention
        cache.encoder.append(_split_heads(cross, cross.c_attn(states)))
        hidden = hidden + _cross_attention(cross, block.ln_cross_attn(hidden), cache, layer_idx)
        hidden = hidden + _feed_forward(block.mlp, block.ln_2(hidden))
    logits = decoder.lm_head(transformer.ln_f(hidden))
    return logits[:, -1].repeat_interleave(group_size, dim=0)


def decode_token(
    decoder: Any, cache: SharedPromptCache, input_ids: torch.LongTensor, position_ids: torch.LongTensor
) -> torch.Tensor:
    """One token of each beam, `(rows,)` -> logits `(rows, vocab_size)`, through the decoder's own layers."""
    transformer = decoder.transformer
    places = cache.open_token()
    # The beams of a clip are the queries of one attention: (B, group, width).
    tokens = transformer.wte(input_ids) + transformer.wpe(position_ids)
    hidden = tokens.view(-1, cache.group_size, tokens.shape[1])
    for layer_idx, block in enumerate(transformer.h):
        hidden = hidden + _self_attention(block.attn, block.ln_1(hidden), cache, layer_idx, places)
        hidden = hidden + _cross_attention(block.crossattention, block.ln_cross_attn(hidden), cache, layer_idx)
        hidden = hidden + _feed_forward(block.mlp, block.ln_2(hidden))
    return decoder.lm_head(transformer.ln_f(hidden)).flatten(0, 1)


def _split_heads(layer: Any, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, length, n * heads * head_dim) -> n times (B, heads, length, head_dim)."""
    parts = projected.view(*projected.shape[:2], -1, layer.num_heads, layer.head_dim)
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


def _self_attention(layer: Any, hidden: Any, cache: SharedPromptCache, layer_idx: int, places: slice) -> torch.Tensor:
    query, key, value = _split_heads(layer, layer.c_attn(hidden))
    keys, values = cache.keys[layer_idx], cache.values[layer_idx]
    keys[:, :, places] = key
    values[:, :, places] = value
    seen = slice(0, cache.num_seen)
    output = scaled_dot_product_attention(
        query, keys[:, :, seen], values[:, :, seen], attn_mask=cache.bias[..., seen], scale=layer.scaling
    )
    return layer.c_proj(output.transpose(1, 2).flatten(2))


def _cross_attention(layer: Any, hidden: torch.Tensor, cache: SharedPromptCache, layer_idx: int) -> torch.Tensor:
    keys, values = cache.encoder[layer_idx]
    (query,) = _split_heads(layer, layer.q_attn(hidden))
    output = scaled_dot_product_attention(query, keys, values, attn_mask=cache.encoder_bias, scale=layer.scaling)
    return layer.c_proj(output.transpose(1, 2).flatten(2))


def _feed_forward(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    inner = layer.c_fc(hidden)
    # GPT-2's activation written out is eight passes over the widest tensor there is; torch has it as one.
    inner = gelu(inner, approximate="tanh") if isinstance(layer.act, NewGELUActivation) else layer.act(inner)
    return layer.c_proj(inner)
