"""What the audio tower hands to the decoder, and the positions of a padded prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class RecapEncoderOutput(ModelOutput):
    """What one pass of the audio tower gives.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_windows * positions, hidden_size)`):
            CLAP's last hidden state right before the projection (paper, Section 3.1), windows joined along time.
            Within a window the positions run over the frequency bins first, then time, as CLAP lays them out.
        attention_mask (`torch.LongTensor` of shape `(batch_size, num_windows * positions)`):
            1 for the positions of a window that the clip has, 0 for padding.
        audio_embeds (`torch.FloatTensor` of shape `(batch_size, num_windows, projection_dim)`):
            L2-normalised query embeddings in float32, one per window; all zero where a clip has no such window.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    audio_embeds: torch.FloatTensor | None = None


def position_ids_of(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Positions of the tokens that a mask leaves, counted from 0; padding gets 0.

    >>> position_ids_of(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


__all__ = ["RecapEncoderOutput", "position_ids_of"]
