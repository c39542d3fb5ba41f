"""CLAPScore: cosine of caption and recording in the space of a CLAP that had no part in the caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.training.tasks.bases import load_clap

from .clips import EvaluationClips

_SAME_ENCODER_COSINE = 0.99


class ClapScorer:
    """A CLAP checkpoint that compares captions with recordings.

    Args:
        name: folder or Hub id of a CLAP or a RECAP checkpoint, with its tokenizer.
        device: torch device; None: a GPU if there is one.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Consecutive windows instead of the stock extractor's random crops: the score of a clip does not vary.
        encoder, self.tokenizer, self.feature_extractor = load_clap(name, with_texts=True)
        self.encoder = encoder.eval().to(self.device)

    def read(self, source: Any) -> np.ndarray:
        """A recording (whatever `load_audio` takes) as a mono waveform at the extractor's rate."""
        waveform, rate = load_audio(source)
        return resample(to_mono(waveform), rate, self.feature_extractor.sampling_rate)

    @torch.no_grad()
    def embed_audio(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """(num_clips, dimension) unit vectors: the mean over a clip's windows. Mono, at the extractor's rate."""
        rate = self.feature_extractor.sampling_rate
        features = self.feature_extractor(list(waveforms), sampling_rate=rate, return_tensors="pt", device=self.device)
        mask = features["input_features_mask"].bool()
        _, embedded = self.encoder.encode_windows(features["input_features"][mask][:, None].to(self.device))
        sums = torch.zeros(*mask.shape, embedded.shape[-1], device=embedded.device)
        sums[mask.to(embedded.device)] = embedded
        return torch.nn.functional.normalize(sums.sum(dim=1), dim=-1).cpu().numpy()

    def refuse_own(self, captioner: Captioner) -> None:
        """Raises `ValueError` if the captioner itself uses this CLAP: it would judge its own choice."""
        theirs = captioner.model.embed_fingerprint(captioner.processor)
        ours = self.encoder.fingerprint(self.tokenizer)
        if theirs.shape == ours.shape and (theirs * ours).sum(axis=1).min() > _SAME_ENCODER_COSINE:
            reason = "is the CLAP that the captioner itself retrieves with, so it cannot judge the captions"
            raise ValueError(f"{self.name} {reason}; give another checkpoint")


def clap_scores(
    scorer: ClapScorer, clips: EvaluationClips, captions: Mapping[str, Sequence[str]], batch_size: int = 16
) -> dict[str, np.ndarray]:
    """CLAPScore of each caption, (num_clips,) by system: the cosine to the recording, 0 for an empty caption.

    Args:
        scorer: the CLAP.
        clips: the recordings.
        captions: by system, one per clip.
        batch_size: recordings embedded together.
    """
    audio = np.concatenate([scorer.embed_audio(batch) for _, batch in clips.batches(0, batch_size, scorer.read)])
    scores = {}
    for name, texts in captions.items():
        embedded = scorer.encoder.embed_captions([text or " " for text in texts], scorer.tokenizer)
        cosines = (audio * embedded).sum(axis=1)
        scores[name] = np.where([bool(text.strip()) for text in texts], cosines, 0.0).astype(np.float64)
    return scores
