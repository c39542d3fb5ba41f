"""The contrastive loss of a CLAP: both directions, several captions of a clip, over all processes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

DEPTHS = (1, 5, 10)


def soft_cross_entropy(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the target spread over each row in proportion to its weights; rows without any are left out.

    Args:
        logits: shape `(rows, columns)`.
        positive: weights of the same shape; 1 for a positive, 0 for a negative.
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
        positive: `(N, M)`, bool, or from 0 to 1: how well the caption fits the audio.
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
        clap: one of the encoder classes.
        frozen: what is not trained: `none`, `audio`, `text`, or `audio_model` (the audio tower but not its
            projection).
        from_features: audio is given as the outputs of the audio tower.
        with_classes: also give scores of the classes of the CLAP's classification head.
    """

    def __init__(self, clap: Any, frozen: str = "none", from_features: bool = False, with_classes: bool = False):
        super().__init__()
        self.clap, self.from_features, self.with_classes = clap, from_features, with_classes
        if clap.input_normalisation is not None:
            clap.input_normalisation.requires_grad_(False)
        parts = {"audio": ("audio_model", "audio_projection"), "text": ("text_model", "text_projection")}
        for part in parts.get(frozen, () if frozen == "none" else (frozen,)):
            getattr(clap, part).requires_grad_(False)
        if not with_classes and hasattr(clap, "classifier"):
            clap.classifier.requires_grad_(False)

    def train(self, mode: bool = True) -> "Towers":
        super().train(mode)
        if self.clap.input_normalisation is not None:
            self.clap.input_normalisation.eval()
        return self

    def forward(
        self, audio: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Embeddings of audio and of token ids `(M, length)`, each `(n, P)`, L2-normalised, float32; class scores.

        Args:
            audio: log-mel windows `(N, frames, bins)`, or outputs of the audio tower `(N, n, d)`.
        """
        features = self.features(audio)
        scores = clip_scores(self.clap.classify_features(features)) if self.with_classes else None
        return self.clap.embed_features(features), self.clap.encode_text(input_ids, attention_mask), scores

    def features(self, audio: torch.Tensor) -> torch.Tensor:
        """Outputs of the audio tower."""
        return audio if self.from_features else self.clap.audio_features(audio[:, None])


def clip_scores(probabilities: torch.Tensor) -> torch.Tensor:
    """One score a class of patches' probabilities, `(N, n, classes)` -> `(N, classes)`: the mean of mean and maximum.

    Patches without sound, whose probabilities are zero, do not count.
    """
    holds = (probabilities != 0).any(dim=-1, keepdim=True).to(probabilities.dtype)
    mean = probabilities.sum(dim=1) / holds.sum(dim=1).clamp(min=1)
    return (mean + probabilities.amax(dim=1)) / 2


def fix_input_statistics(clap: Any, mels: torch.Tensor) -> None:
    """Give the audio tower's input normalisation the statistics of mels `(N, frames, bins)`.

    With constant statistics a clip's embedding does not depend on its batch, and no gradient passes the interpolation
    of the input (a quarter of a step's time on a CPU).
    """
    with torch.no_grad():
        clap.input_normalisation.running_mean.copy_(mels.mean(dim=(0, 1)))
        clap.input_normalisation.running_var.copy_(mels.var(dim=(0, 1)))
    clap.input_normalisation.requires_grad_(False)


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
    gathered = zip(accelerator.gather(padded).split(max(counts)), counts, strict=True)
    blocks = [block[:count] for block, count in gathered]
    blocks[accelerator.process_index] = own
    return torch.cat(blocks)


def retrieval_metrics(similarity: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Metrics of both directions, and `map10`, the mean of their mAP@10.

    Args:
        similarity: `(clips, captions)`.
        relevant: the same shape, bool: the caption is one of the clip's.
    """
    directions = {"audio_to_text": (similarity, relevant), "text_to_audio": (similarity.T, relevant.T)}
    found = {name: one_direction(*arrays) for name, arrays in directions.items()}
    figures = {f"{name}_{metric}": value for name, own in found.items() for metric, value in own.items()}
    return {"map10": sum(own["map10"] for own in found.values()) / 2, **figures}


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
