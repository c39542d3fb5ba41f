"""CLAPScore: how near a caption is to its recording, by a CLAP that had no part in making it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .captioner import Captioner
from .run import EvaluationClips, decoded_batches

_TEXT_LENGTH = 77  # tokens: LAION trained its text towers on at most so many
_SAME_ENCODER_COSINE = 0.99


class ClapScorer:
    """A CLAP checkpoint that compares captions with recordings.

    Args:
        name: folder or Hub id with a `ClapModel`, its tokenizer and the settings of its feature extractor.
        device: torch device; None: a GPU where there is one.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        import torch
        from transformers import AutoTokenizer, ClapModel

        from recap_hf import RecapFeatureExtractor

        self.name = name
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = ClapModel.from_pretrained(name, dtype=torch.float32).eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        # Consecutive windows instead of the stock extractor's random crops: the score of a clip does not vary.
        self.feature_extractor = RecapFeatureExtractor.from_clap_pretrained(name)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """(num_texts, dimension) unit vectors."""
        import torch

        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=_TEXT_LENGTH,
                return_tensors="pt",
            ).to(self.device)
            with torch.no_grad():
                rows.append(self.model.get_text_features(**tokens).pooler_output.float().cpu().numpy())
        return _unit(np.concatenate(rows))

    def embed_audio(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """(num_clips, dimension) unit vectors: the mean over a clip's windows. Mono, at the extractor's rate."""
        import torch

        rate = self.feature_extractor.sampling_rate
        features = self.feature_extractor(list(waveforms), sampling_rate=rate, return_tensors="pt", device=self.device)
        mask = features["input_features_mask"].bool()
        windows = features["input_features"][mask][:, None].to(self.device)
        options = {}
        if self.model.config.audio_config.enable_fusion:
            # Four equal mels and "not longer": what the stock extractor makes of a clip of one window.
            windows = windows.expand(-1, 4, -1, -1)
            options["is_longer"] = torch.zeros(len(windows), 1, dtype=torch.bool, device=windows.device)
        with torch.no_grad():
            embedded = self.model.get_audio_features(input_features=windows, **options).pooler_output.float()
        sums = torch.zeros(*mask.shape, embedded.shape[-1], device=embedded.device)
        sums[mask.to(embedded.device)] = torch.nn.functional.normalize(embedded, dim=-1)
        return _unit(sums.sum(dim=1).cpu().numpy())

    def refuse_own(self, captioner: Captioner) -> None:
        """Stops where the captioner itself hears or retrieves with this CLAP: it would be judging its own choice.

        Raises:
            ValueError: naming the remedy.
        """
        from recap_hf.modeling.modeling_recap import FINGERPRINT_TEXTS

        theirs = captioner.model.embed_fingerprint(captioner.processor)
        ours = self.embed_texts(FINGERPRINT_TEXTS)
        if theirs.shape == ours.shape and (theirs * ours).sum(axis=1).min() > _SAME_ENCODER_COSINE:
            raise ValueError(
                f"{self.name} is the CLAP that the captioner itself retrieves with, so it cannot judge the captions; "
                "give another checkpoint"
            )


def clap_scores(
    scorer: ClapScorer, clips: EvaluationClips, captions: Mapping[str, Sequence[str]], batch_size: int = 16
) -> dict[str, np.ndarray]:
    """CLAPScore of each caption: the cosine of its embedding and the recording's, an empty caption's being 0.

    Args:
        scorer: the CLAP.
        clips: the recordings.
        captions: by system, one a clip.
        batch_size: recordings embedded together.
    """
    rate = scorer.feature_extractor.sampling_rate
    audio = np.concatenate(list(_embedded(scorer, clips, batch_size, rate)))
    scores = {}
    for name, texts in captions.items():
        cosines = (audio * scorer.embed_texts([text or " " for text in texts])).sum(axis=1)
        scores[name] = np.where([bool(text.strip()) for text in texts], cosines, 0.0).astype(np.float64)
    return scores


def _embedded(scorer: ClapScorer, clips: EvaluationClips, batch_size: int, rate: int) -> Iterator[Any]:
    for _, waveforms in decoded_batches(clips, 0, batch_size, rate):
        yield scorer.embed_audio(waveforms)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
