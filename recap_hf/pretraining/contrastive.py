"""The contrastive loss of a CLAP: both directions, several captions of a clip, over all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from transformers import ClapModel, PreTrainedTokenizerBase

__all__ = ["Towers", "contrastive_loss", "embed_texts", "fix_input_statistics", "gather_rows", "soft_cross_entropy"]


def soft_cross_entropy(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the target spread evenly over the positives of each row; rows without any are left out.

    Args:
        logits: shape `(rows, columns)`.
        positive: the same shape, 1 for a positive.
    """
    count = positive.sum(dim=1)
    rows = count > 0
    target = positive[rows] / count[rows, None]
    return -(target * F.log_softmax(logits[rows], dim=1)).sum(dim=1).mean()


def contrastive_loss(
    audio: torch.Tensor,
    texts: torch.Tensor,
    positive: torch.Tensor,
    audio_scale: torch.Tensor,
    text_scale: torch.Tensor,
    max_logit_scale: float = 100.0,
) -> torch.Tensor:
    """Mean of both directions, every pair that belongs together a positive (InfoNCE for one positive a row).

    Args:
        audio: `(N, P)` normalised.
        texts: `(M, P)` normalised.
        positive: `(N, M)` bool.
        audio_scale, text_scale: logarithms of the two factors, as `ClapModel` holds them.
        max_logit_scale: upper bound of the factors.
    """
    similarity = audio @ texts.T
    positive = positive.float()
    bound = math.log(max_logit_scale)
    from_audio = soft_cross_entropy(similarity * audio_scale.clamp(max=bound).exp(), positive)
    from_text = soft_cross_entropy(similarity.T * text_scale.clamp(max=bound).exp(), positive.T)
    return (from_audio + from_text) / 2


def embed_texts(clap: ClapModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """L2-normalised text embeddings `(N, P)`, float32."""
    output = clap.text_model(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(clap.text_projection(output.pooler_output).float(), dim=-1)


def embed_mels(clap: ClapModel, mels: torch.Tensor) -> torch.Tensor:
    """L2-normalised audio embeddings `(N, P)`, float32, of mel windows `(N, frames, bins)` in dB.

    A fused CLAP sees each window as a short clip, as a RECAP captioner does.
    """
    windows, longer = mels[:, None], None
    if clap.config.audio_config.enable_fusion:
        windows = windows.expand(-1, 4, -1, -1)
        longer = torch.zeros(len(mels), 1, dtype=torch.bool, device=mels.device)
    output = clap.audio_model(input_features=windows, is_longer=longer)
    return F.normalize(clap.audio_projection(output.pooler_output).float(), dim=-1)


class Towers(nn.Module):
    """Both towers in one pass: what is wrapped for several processes and for mixed precision.

    The statistics of the input's normalisation stay as they are: an embedding must not depend on its batch.

    Args:
        clap: the model.
        frozen: the tower to leave as it is: `none`, `audio` or `text`.
    """

    def __init__(self, clap: ClapModel, frozen: str = "none") -> None:
        super().__init__()
        self.clap = clap
        clap.audio_model.audio_encoder.batch_norm.requires_grad_(False)
        for module in {"audio": (clap.audio_model, clap.audio_projection), "text": self._text()}.get(frozen, ()):
            module.requires_grad_(False)

    def _text(self) -> tuple[nn.Module, nn.Module]:
        return self.clap.text_model, self.clap.text_projection

    def train(self, mode: bool = True) -> Towers:
        super().train(mode)
        self.clap.audio_model.audio_encoder.batch_norm.eval()
        return self

    def forward(
        self, mels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio embeddings of mels `(N, frames, bins)`, text embeddings of token ids `(M, length)`."""
        return embed_mels(self.clap, mels), embed_texts(self.clap, input_ids, attention_mask)


def fix_input_statistics(clap: ClapModel, mels: torch.Tensor) -> None:
    """Give the audio tower's input normalisation the statistics of some mels `(N, frames, bins)`, and freeze it.

    With constant statistics a clip's embedding does not depend on its batch, and no gradient has to pass the
    interpolation of the input (a quarter of a step's time on a CPU).
    """
    normalisation = clap.audio_model.audio_encoder.batch_norm
    with torch.no_grad():
        normalisation.running_mean.copy_(mels.mean(dim=(0, 1)))
        normalisation.running_var.copy_(mels.var(dim=(0, 1)))
    normalisation.requires_grad_(False)


def gather_rows(own: torch.Tensor, counts: Sequence[int], accelerator: Any) -> torch.Tensor:
    """Rows of all processes in their order; only this process's own carry a gradient.

    Args:
        own: `(counts[this process], P)`.
        counts: rows of each process.
    """
    if accelerator.num_processes == 1:
        return own
    padded = F.pad(own.detach(), (0, 0, 0, max(counts) - len(own)))
    blocks = accelerator.gather(padded).split(max(counts))
    return torch.cat(
        [
            own if rank == accelerator.process_index else block[:count]
            for rank, (block, count) in enumerate(zip(blocks, counts, strict=True))
        ]
    )


def clap_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of texts, cut after `max_length`, special tokens included."""
    return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if len(texts) else []
