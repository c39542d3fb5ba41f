"""Which clips are decoded together: those with prompts of nearly equal length, however many were heard together.

An encoder is fastest with as many windows as fit, a decoder with as many clips as keep it busy and prompts that need
no padding. So what was encoded in one batch is decoded in several, longest prompts first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .outputs_recap import RecapEncoderOutput


def decoding_batches(
    encoding: RecapEncoderOutput, prompts: Mapping[str, torch.Tensor], batch_size: int | None
) -> Iterator[tuple[list[int], RecapEncoderOutput, dict[str, Any]]]:
    """Parts of a batch to be decoded one after the other.

    Args:
        encoding ([`RecapEncoderOutput`]): of all clips.
        prompts (`Mapping`): `decoder_input_ids` and `decoder_attention_mask`, left-padded, of shape
            `(num_clips, length)`.
        batch_size (`int`, *optional*): most clips in a part; default all, in their order and as they are.

    Yields:
        `tuple`: the rows of a part, and their encoding and prompts without padding that all of them share.
    """
    mask = prompts["decoder_attention_mask"]
    num_clips, length = mask.shape
    if batch_size is None or num_clips <= batch_size:
        yield list(range(num_clips)), encoding, dict(prompts)
        return
    lengths = mask.sum(dim=1).tolist()
    order = sorted(range(num_clips), key=lambda row: -lengths[row])
    for start in range(0, num_clips, batch_size):
        rows = order[start : start + batch_size]
        # The first one is the longest.
        kept = slice(length - lengths[rows[0]], None)
        part = {
            name: value[torch.tensor(rows, device=value.device)]
            for name, value in encoding.items()
            if isinstance(value, torch.Tensor)
        }
        index = torch.tensor(rows, device=mask.device)
        yield rows, RecapEncoderOutput(**part), {name: value[index, kept] for name, value in prompts.items()}


__all__ = ["decoding_batches"]
