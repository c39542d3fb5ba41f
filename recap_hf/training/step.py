"""One pass through the decoder: the loss of a batch's captions, with logits only where a caption's token is due.

The language modelling head is a third of GPT-2 small's arithmetic, and a prompt has five times the tokens of a
caption: states are gathered at the labelled positions first, and only those see the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .batches import Batch


@dataclass
class TensorBatch:
    """A `Batch` as tensors on a device; masks are made where they are needed only.

    Args:
        input_ids, position_ids: shape `(rows, length)`.
        attention_mask: None where nothing is padded; `(rows, length)`, or `(rows, 1, length, length)` (True = sees)
            where captions share a prompt.
        hidden: shape `(rows, positions, d)`; None for text alone.
        hidden_mask: `(rows, positions)`, or None where all clips are equally long.
        target_rows, target_columns, targets, target_captions: shape `(tokens,)`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    hidden: torch.Tensor | None
    hidden_mask: torch.Tensor | None
    target_rows: torch.Tensor
    target_columns: torch.Tensor
    targets: torch.Tensor
    target_captions: torch.Tensor


def to_tensors(batch: Batch, device: torch.device | str, dtype: torch.dtype) -> TensorBatch:
    """Tensors of a batch on `device`, hidden states in `dtype`."""

    def moved(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    segments = moved(batch.segments)
    mask = None
    if batch.segments.max() > 1:
        mask = branched_mask(segments)
    elif batch.segments.min() < 0:
        mask = (segments >= 0).long()
    hidden = hidden_mask = None
    if batch.hidden is not None:
        hidden, lengths = moved(batch.hidden).to(dtype), batch.hidden_lengths
        if lengths.min() < batch.hidden.shape[1]:
            hidden_mask = moved((np.arange(batch.hidden.shape[1]) < lengths[:, None]).astype(np.int64))
    return TensorBatch(
        moved(batch.input_ids),
        moved(batch.position_ids),
        mask,
        hidden,
        hidden_mask,
        moved(batch.target_rows),
        moved(batch.target_columns),
        moved(batch.targets),
        moved(batch.target_captions),
    )


def branched_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom where several captions continue one prompt.

    With one prompt (0) and two captions (1, 2) a row of segments and its mask are:

        segments  0 0 1 1 2      0  x . . . .
                                 0  x x . . .
                                 1  x x x . .
                                 1  x x x x .
                                 2  x x . . x

    Padding (-1) sees itself, so that no row of the softmax is empty; nobody sees it.

    Args:
        segments: shape `(rows, length)`.

    Returns:
        Boolean tensor of shape `(rows, 1, length, length)`, True where the query (third axis) sees the key.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) & (query >= 0) | (key == query))).unsqueeze(1)


def fuse_activations(decoder: nn.Module) -> None:
    """Swaps GPT-2's `gelu_new` for torch's fused kernel of the same function.

    As written in transformers it is eight passes over memory and keeps as many intermediates for the backward pass:
    a fifth of a step's time on a CPU. The values agree to float32's last digits; nothing is saved with the model.
    """
    if decoder.config.activation_function != "gelu_new":
        return
    for block in decoder.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh")


def checkpoint_activations(decoder: Any) -> None:
    """Has the decoder compute activations again in the backward pass, in the place of keeping them."""
    # Renamed within the supported range of transformers.
    enable = getattr(decoder, "activation_checkpointing_enable", None)
    (enable or decoder.gradient_checkpointing_enable)()


class CaptionLoss(nn.Module):
    """The decoder with its loss; this is what gets wrapped for several processes and for mixed precision.

    Args:
        decoder: a `GPT2LMHeadModel` with RECAP's cross-attention, or without one
        prefix_mapper: and what makes a prefix of the audio instead.
    """

    def __init__(self, decoder: nn.Module, prefix_mapper: nn.Module | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.prefix_mapper = prefix_mapper

    def forward(self, batch: TensorBatch) -> torch.Tensor:
        """Cross-entropy of every target token, float32 of shape `(tokens,)`."""
        inputs, offset = self._inputs(batch), 0
        if self.prefix_mapper is None:
            inputs |= {"encoder_hidden_states": batch.hidden, "encoder_attention_mask": batch.hidden_mask}
        else:
            inputs, offset = self._behind_prefix(inputs, batch), self.prefix_mapper.length
        mask = inputs["attention_mask"]
        if mask is not None and mask.dim() == 4 and self.decoder.config._attn_implementation == "eager":
            # Eager attention adds its mask to the scores.
            inputs["attention_mask"] = torch.zeros(mask.shape, dtype=batch.hidden.dtype, device=mask.device)
            inputs["attention_mask"].masked_fill_(~mask, torch.finfo(batch.hidden.dtype).min)
        states = self.decoder.transformer(**inputs, use_cache=False).last_hidden_state
        logits = self.decoder.lm_head(states[batch.target_rows, batch.target_columns + offset])
        return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")

    def _inputs(self, batch: TensorBatch) -> dict[str, torch.Tensor | None]:
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
        }

    def _behind_prefix(self, inputs: dict[str, torch.Tensor | None], batch: TensorBatch) -> dict[str, Any]:
        """The inputs with the prefix before them, which every token sees."""
        mask = inputs["attention_mask"]
        shared = mask is not None and mask.dim() == 4
        prefix = self.prefix_mapper(batch.hidden, batch.hidden_mask)
        tokens = (inputs["input_ids"], None, None if shared else mask, inputs["position_ids"])
        behind = self.prefix_mapper.decoder_inputs(self.decoder, prefix, *tokens)
        if shared:
            behind["attention_mask"] = seen_by_all(mask, self.prefix_mapper.length)
        return behind


def seen_by_all(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask `(rows, 1, n, n)` with `length` places before it: causal among themselves, seen by all that follow."""
    rows, _, size, _ = mask.shape
    grown = torch.ones(rows, 1, length + size, length + size, dtype=torch.bool, device=mask.device).tril()
    grown[:, :, length:, length:] = mask
    return grown


def caption_sums(token_losses: torch.Tensor, batch: TensorBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token losses and number of tokens of each caption of a batch, float64 of shape `(captions,)`.

    Tokens of prompts do not count.
    """
    of_captions = batch.target_captions >= 0
    captions = batch.target_captions[of_captions]
    count = int(captions.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64, device=token_losses.device)
    sums.index_add_(0, captions, token_losses[of_captions].double())
    tokens = torch.bincount(captions, minlength=count).double()
    return sums, tokens
