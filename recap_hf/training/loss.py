"""The loss of captions behind prompts, with logits only at the places that predict a target.

The language modelling head is a third of GPT-2 small's arithmetic, and a prompt has five times the tokens of a
caption: states are gathered at the targets' places first, and only those are multiplied with the vocabulary.
"""

from typing import Any

import torch
from torch import nn

from .collator import Batch


class CaptionLoss(nn.Module):
    """The decoder with its loss.

    Args:
        decoder: a `GPT2LMHeadModel` with RECAP's cross-attention, or without one.
        prefix_mapper: makes a prefix of the audio instead of cross-attention.
    """

    def __init__(self, decoder: nn.Module, prefix_mapper: nn.Module | None = None) -> None:
        super().__init__()
        self.decoder, self.prefix_mapper = decoder, prefix_mapper
        # Of its implementations this one takes a mask of booleans.
        decoder.set_attn_implementation("sdpa")

    def forward(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every target token, float32 of shape `(tokens,)`."""
        mask, offset = None, 0
        if batch.shared:
            mask = branched_mask(batch.segments)
        elif batch.padded:
            mask = (batch.segments >= 0).long()
        if self.prefix_mapper is None:
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            inputs |= {"encoder_hidden_states": batch.hidden, "encoder_attention_mask": batch.hidden_mask}
        else:
            offset = self.prefix_mapper.length
            prefix = self.prefix_mapper(batch.hidden, batch.hidden_mask)
            tokens = (batch.input_ids, None, None if batch.shared else mask, batch.position_ids)
            inputs = self.prefix_mapper.decoder_inputs(self.decoder, prefix, *tokens)
            own = inputs.pop("attention_mask")
            mask = behind_prefix(mask, offset) if batch.shared else own
        states = self.decoder.transformer(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.decoder.lm_head(states[batch.target_rows, batch.target_columns + offset])
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")


def branched_mask(segments: torch.Tensor) -> torch.Tensor:
    """The attention mask of several captions behind one prompt.

    With one prompt (0) and two captions (1, 2) a row of segments and its mask are:

        segments  0 0 1 1 2      0  x . . . .
                                 0  x x . . .
                                 1  x x x . .
                                 1  x x x x .
                                 2  x x . . x

    Padding (-1) attends to itself, so that no row of the softmax is empty; no other token attends to it.

    Args:
        segments: shape `(rows, length)`.

    Returns:
        Boolean tensor of shape `(rows, 1, length, length)`, True if the query (third axis) attends to the key.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) & (query >= 0) | (key == query))).unsqueeze(1)


def behind_prefix(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask `(rows, 1, n, n)` with `length` places before it: causal among themselves, visible to all that follow."""
    rows, _, size, _ = mask.shape
    grown = torch.ones(rows, 1, length + size, length + size, dtype=torch.bool, device=mask.device).tril()
    grown[:, :, length:, length:] = mask
    return grown


def fuse_activations(decoder: nn.Module) -> None:
    """Replace GPT-2's `gelu_new` by torch's fused kernel of the same function, a fifth of a step's time on a CPU.

    The values agree to the last digits of float32; nothing is saved with the model.
    """
    if decoder.config.activation_function == "gelu_new":
        for block in decoder.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")


def checkpoint_activations(decoder: Any) -> None:
    """Compute the decoder's activations again in the backward pass instead of keeping them."""
    # Renamed within the supported range of transformers.
    enable = getattr(decoder, "activation_checkpointing_enable", None)
    (enable or decoder.gradient_checkpointing_enable)()
