"""Conditioning by a prefix: what the audio says, as embeddings that stand before the prompt.

The neighbour of RECAP that tunes a prefix instead of adding cross-attention, after Kim et al., "Prefix Tuning for
Automated Audio Captioning", ICASSP 2023 (the paper's [6]), on CLAP's hidden states: a mapping network turns them into
a few embeddings of the language model's width, and nothing else is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CROSS_ATTENTION, PREFIX = "cross_attention", "prefix"
CONDITIONINGS = (CROSS_ATTENTION, PREFIX)


class PrefixLayer(nn.Module):
    """One step of the mapping: the prefix attends to audio and to itself, then each of its places by itself.

    Args:
        width (`int`): of the language model's embeddings.
        num_heads (`int`): of the attention.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, prefix: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Shapes `(B, m, width)` and `(B, n, width)`; `mask` is boolean, `(B, 1, 1, n + m)`, True where seen."""
        normed = self.attention_norm(prefix)
        keys, values = self.key_value(torch.cat([states, normed], dim=1)).chunk(2, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(
            self._heads(self.query(normed)), self._heads(keys), self._heads(values), attn_mask=mask
        )
        prefix = prefix + self.attention_out(attended.transpose(1, 2).flatten(2))
        return prefix + self.contract(nn.functional.gelu(self.expand(self.mlp_norm(prefix))))

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PrefixMapper(nn.Module):
    """The mapping network: CLAP's hidden states to `prefix_length` embeddings for the language model.

    Learned embeddings, one a place of the prefix, gather what they need from all windows of a clip; what a mask leaves
    out is not seen, so a clip has the same prefix alone and in a batch.

    Args:
        config ([`RecapConfig`]): `prefix_length`, `prefix_num_layers`, and the sizes of both parts.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, num_heads = config.decoder.n_embd, config.decoder.n_head
        self.length = config.prefix_length
        self.project = nn.Linear(config.encoder_hidden_size, width)
        self.states_norm = nn.LayerNorm(width)
        self.places = nn.Embedding(self.length, width)
        self.layers = nn.ModuleList(PrefixLayer(width, num_heads) for _ in range(config.prefix_num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The prefix of each clip.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, n, d)`): of the audio tower, windows joined.
            attention_mask (`torch.Tensor` of shape `(batch_size, n)`, *optional*): 1 for what the clip has.

        Returns:
            `torch.Tensor` of shape `(batch_size, prefix_length, n_embd)`.
        """
        states = self.states_norm(self.project(hidden_states.to(self.project.weight.dtype)))
        prefix = self.places.weight.expand(len(states), -1, -1)
        mask = None
        if attention_mask is not None:
            own = attention_mask.new_ones(len(states), self.length)
            mask = torch.cat([attention_mask, own], dim=1).bool()[:, None, None]
        for layer in self.layers:
            prefix = layer(prefix, states, mask)
        return self.out(self.norm(prefix))

    def decoder_inputs(
        self,
        decoder: Any,
        prefix: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        """What the language model is called with: the prefix first, then padding and prompt, whose positions follow.

        Args:
            decoder (`GPT2LMHeadModel`): has the embeddings of the tokens.
            prefix (`torch.Tensor` of shape `(batch_size, prefix_length, n_embd)`, *optional*): `None` where the
                decoder's cache has it already.
            input_ids or inputs_embeds, attention_mask, position_ids: of the tokens alone.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "A captioner with a prefix takes a mask of shape (batch_size, length), got one of shape "
                f"{tuple(attention_mask.shape)}."
            )
        if attention_mask is not None:
            own = attention_mask.new_ones(len(attention_mask), self.length)
            attention_mask = torch.cat([own, attention_mask], dim=1)
        if position_ids is not None:
            position_ids = position_ids + self.length
        if prefix is None:
            tokens = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
            return {**tokens, "attention_mask": attention_mask, "position_ids": position_ids}
        if inputs_embeds is None:
            inputs_embeds = decoder.get_input_embeddings()(input_ids)
        if position_ids is not None:
            own = torch.arange(self.length, device=position_ids.device).expand(len(position_ids), -1)
            position_ids = torch.cat([own, position_ids], dim=1)
        embeds = torch.cat([prefix.to(inputs_embeds.dtype), inputs_embeds], dim=1)
        return {"inputs_embeds": embeds, "attention_mask": attention_mask, "position_ids": position_ids}

    def logits_to_keep(self, wanted: int | torch.Tensor, length: int) -> int | torch.Tensor:
        """`logits_to_keep` of a pass over prefix and tokens, `length` places: a prefix predicts nothing."""
        if isinstance(wanted, torch.Tensor):
            return wanted + self.length
        tokens = length - self.length
        return min(wanted, tokens) if wanted else tokens


# Each would have to know that the cache is longer than the tokens.
_REFUSED = ("cache_implementation", "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


def check_prefix_generation(generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Refuses ways of generating that count on a cache without a prefix.

    Raises:
        `ValueError`: naming the parameter.
    """
    for name in _REFUSED:
        value = kwargs.get(name, getattr(generation_config, name, None))
        if value is not None and value != "dynamic":
            raise ValueError(
                f"A captioner conditioned by a prefix generates with the dynamic cache only: `{name}` is not "
                f"supported, got {value!r:.80}."
            )


__all__ = ["CONDITIONINGS", "CROSS_ATTENTION", "PREFIX", "PrefixLayer", "PrefixMapper", "check_prefix_generation"]
