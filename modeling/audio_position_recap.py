"""Time for the cross-attention: where in its window each encoder state lies."""

from __future__ import annotations

import torch

SINUSOIDAL = "sinusoidal"
AUDIO_POSITIONS = (None, SINUSOIDAL)


def sinusoidal_positions(num_steps: int, width: int) -> torch.Tensor:
    """The fixed position embeddings of Vaswani et al., "Attention Is All You Need" (2017), Section 3.5.

    Args:
        num_steps (`int`): time steps of a window.
        width (`int`): d; an odd one ends with a sine.

    Returns:
        `torch.Tensor` of shape `(num_steps, width)`, float32: even places hold sines, odd ones cosines, of wavelengths
        from 2 pi to 10,000 * 2 pi time steps.
    """
    frequencies = torch.pow(10_000.0, -torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(num_steps, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


__all__ = ["AUDIO_POSITIONS", "SINUSOIDAL", "sinusoidal_positions"]
