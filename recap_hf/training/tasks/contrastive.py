"""The contrastive loss of a CLAP: both directions, several captions of a clip, over all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from transformers import ClapModel

DEPTHS = (1, 5, 10)


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


class Towers(nn.Module):
    """Both towers of a CLAP in one pass.

    The statistics of the input's normalisation are not trained: an embedding must not depend on its batch.

    Args:
        clap: the model.
        frozen: the tower that is not trained: `none`, `audio` or `text`.
    """

    def __init__(self, clap: ClapModel, frozen: str = "none") -> None:
        super().__init__()
        self.clap = clap
        clap.audio_model.audio_encoder.batch_norm.requires_grad_(False)
        if frozen != "none":
            for part in ("model", "projection"):
                getattr(clap, f"{frozen}_{part}").requires_grad_(False)

    def train(self, mode: bool = True) -> Towers:
        super().train(mode)
        self.clap.audio_model.audio_encoder.batch_norm.eval()
        return self

    def forward(
        self, mels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio embeddings of mels `(N, frames, bins)`, text embeddings of token ids `(M, length)`."""
        return self.embed_mels(mels), self.embed_texts(input_ids, attention_mask)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """L2-normalised text embeddings `(N, P)`, float32."""
        output = self.clap.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return F.normalize(self.clap.text_projection(output.pooler_output).float(), dim=-1)

    def embed_mels(self, mels: torch.Tensor) -> torch.Tensor:
        """L2-normalised audio embeddings `(N, P)`, float32, of mel windows `(N, frames, bins)` in dB.

        To a fused CLAP each window is a short clip, as in a RECAP captioner.
        """
        windows, longer = mels[:, None], None
        if self.clap.config.audio_config.enable_fusion:
            windows = windows.expand(-1, 4, -1, -1)
            longer = torch.zeros(len(mels), 1, dtype=torch.bool, device=mels.device)
        output = self.clap.audio_model(input_features=windows, is_longer=longer)
        return F.normalize(self.clap.audio_projection(output.pooler_output).float(), dim=-1)


def fix_input_statistics(clap: ClapModel, mels: torch.Tensor) -> None:
    """Give the audio tower's input normalisation the statistics of mels `(N, frames, bins)`.

    With constant statistics a clip's embedding does not depend on its batch, and no gradient passes the interpolation
    of the input (a quarter of a step's time on a CPU).
    """
    normalisation = clap.audio_model.audio_encoder.batch_norm
    with torch.no_grad():
        normalisation.running_mean.copy_(mels.mean(dim=(0, 1)))
        normalisation.running_var.copy_(mels.var(dim=(0, 1)))
    normalisation.requires_grad_(False)


def gather_rows(own: torch.Tensor, counts: Sequence[int], accelerator: Any) -> torch.Tensor:
    """Rows of all processes in their order; only this process's own have a gradient.

    Args:
        own: `(counts[this process], P)`.
        counts: rows of each process.
        accelerator: Accelerate's.
    """
    if accelerator.num_processes == 1:
        return own
    padded = F.pad(own.detach(), (0, 0, 0, max(counts) - len(own)))
    blocks = [
        block[:count] for block, count in zip(accelerator.gather(padded).split(max(counts)), counts, strict=True)
    ]
    blocks[accelerator.process_index] = own
    return torch.cat(blocks)


def retrieval_metrics(similarity: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Metrics of both directions, and `map10`, the mean of their mAP@10.

    Args:
        similarity: `(clips, captions)`.
        relevant: the same shape, bool: the caption is one of the clip's.
    """
    directions = {"audio_to_text": (similarity, relevant), "text_to_audio": (similarity.T, relevant.T)}
    figures = {
        f"{name}_{metric}": value
        for name, (scores, right) in directions.items()
        for metric, value in one_direction(scores, right).items()
    }
    return {"map10": (figures["audio_to_text_map10"] + figures["text_to_audio_map10"]) / 2, **figures}


def one_direction(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 and mAP@10 of queries.

    R@k is the share of queries with anything relevant among the first k. mAP@10 is the mean over the queries of the
    precisions at the relevant places among the first ten, divided by the number of relevant candidates, at most ten
    (as in DCASE's language-based audio retrieval, where one is relevant).

    Args:
        scores: `(queries, candidates)`; equal scores keep the candidates' order.
        relevant: the same shape, bool; queries without anything relevant are left out.
    """
    kept = relevant.any(axis=1)
    scores, relevant = scores[kept], relevant[kept]
    depth = min(max(DEPTHS), scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    hits = np.take_along_axis(relevant, order, axis=1)
    figures = {f"r{k}": float(hits[:, :k].any(axis=1).mean()) for k in DEPTHS}
    precision = np.cumsum(hits, axis=1) / np.arange(1, depth + 1)
    possible = np.minimum(relevant.sum(axis=1), max(DEPTHS))
    figures["map10"] = float(((precision * hits).sum(axis=1) / possible).mean())
    return figures
