"""FENSE and SPIDEr-FL (Zhou et al., "Can audio captions be evaluated with image caption metrics?", ICASSP 2022).

FENSE is the sentence similarity of caption and references, divided by ten if a classifier is more than 90 % sure that
the caption is not fluent. SPIDEr-FL applies the same penalty to SPIDEr. Similarities and probabilities come from the
caller or from models in local folders; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ERROR_THRESHOLD = 0.9
PENALTY = 0.9
_MAX_TOKENS = 64  # of the error detector


def penalize(scores: np.ndarray, error_probabilities: np.ndarray) -> np.ndarray:
    """`scores` (num_clips,), divided by ten where the error probability exceeds 0.9."""
    return scores * (1 - PENALTY * (np.asarray(error_probabilities) > ERROR_THRESHOLD))


class FenseModels:
    """The two models of FENSE, from local files.

    Args:
        sentence_model: folder of a Sentence-BERT model (usually `paraphrase-TinyBERT-L6-v2`).
        error_detector: the published checkpoint, `echecker_clotho_audiocaps_base.ckpt`.
        error_detector_encoder: folder with configuration and tokenizer of the BERT that the checkpoint names as its
            `model_type`; default: that BERT from the local Hub cache.
        device: torch device.

    Raises:
        ImportError: if `sentence-transformers` is not installed.
        OSError: if a file does not exist.
        ValueError: if the checkpoint is no error detector.
    """

    def __init__(
        self,
        sentence_model: str | os.PathLike,
        error_detector: str | os.PathLike,
        error_detector_encoder: str | os.PathLike | None = None,
        device: str = "cpu",
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                'the sentence model of FENSE needs sentence-transformers: pip install "recap-hf[fense]"'
            ) from error
        if not Path(sentence_model).is_dir():
            raise FileNotFoundError(f"no Sentence-BERT folder at {sentence_model}; nothing is downloaded")
        self.device = device
        self.names = {"sentence_model": Path(sentence_model).name, "error_detector": Path(error_detector).name}
        self.sentence_model = SentenceTransformer(str(sentence_model), device=device, local_files_only=True)
        self._load_detector(Path(error_detector), error_detector_encoder)

    def _load_detector(self, checkpoint: Path, encoder: str | os.PathLike | None) -> None:
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        if not checkpoint.is_file():
            raise FileNotFoundError(f"no error detector at {checkpoint}; nothing is downloaded")
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not {"model_type", "num_classes", "state_dict"} <= saved.keys():
            raise ValueError(
                f"{checkpoint} is no error detector of FENSE: expected the keys model_type, num_classes and state_dict"
            )
        source = str(encoder or saved["model_type"])
        self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        self.encoder = AutoModel.from_config(config)
        self.head = torch.nn.Linear(config.hidden_size, saved["num_classes"])
        weights = dict(saved["state_dict"])
        # Old releases of transformers saved the positions; new ones compute them.
        weights.pop("encoder.embeddings.position_ids", None)
        module = torch.nn.ModuleDict({"encoder": self.encoder, "clf": self.head})
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the error detector {checkpoint} does not fit the encoder {source}: {error}") from error
        module.eval().to(self.device)

    def sentence_similarities(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(num_clips,) mean cosine similarity of each caption to its references."""
        texts = [*captions, *(text for refs in references for text in refs)]
        vectors = self.sentence_model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        similarities, start = [], len(captions)
        for number, refs in enumerate(references):
            similarities.append(float((vectors[start : start + len(refs)] @ vectors[number]).mean()))
            start += len(refs)
        return np.array(similarities)

    def error_probabilities(self, captions: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """(num_clips,) probability that each caption has an error of fluency: the detector's last class."""
        import torch

        probabilities = []
        for start in range(0, len(captions), batch_size):
            batch = self.tokenizer(
                list(captions[start : start + batch_size]),
                truncation=True,
                padding="max_length",
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            with torch.no_grad():
                hidden = self.encoder(**batch).last_hidden_state[:, 0]
                probabilities.append(self.head(hidden)[:, -1].sigmoid().cpu().numpy())
        return np.concatenate(probabilities)
