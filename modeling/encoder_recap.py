"""The audio and text encoder behind a captioner: the one place that knows how a CLAP is built.

The model, the processor, timelines and explanations ask an encoder for hidden states, embeddings and geometry, and
know nothing of HTSAT or RoBERTa. Another CLAP is another class in `ENCODERS` of the configuration's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import ClapConfig, ClapModel

# CLAP's text branch was trained on at most this many tokens (LAION-AI/CLAP, training/data.py).
MAX_TEXT_TOKENS = 77
SINUSOIDAL = "sinusoidal"
AUDIO_POSITIONS = (None, SINUSOIDAL)
# Neutral sentences whose embeddings tell one text encoder from another; see `fingerprint`.
FINGERPRINT_TEXTS = (
    "a dog barks in the distance",
    "rain falls on a metal roof",
    "a violin plays a slow melody",
    "an engine idles and then revs",
)


class TextEmbedder:
    """Embeds captions with the text tower of an encoder, which has `text_model`, `encode_text` and a configuration
    with `text_config` and `projection_dim`."""

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], tokenizer: Any, batch_size: int = 64) -> np.ndarray:
        """Text embeddings of captions, in evaluation mode.

        Args:
            captions (`Sequence[str]`): embedded verbatim; cut at 77 tokens.
            tokenizer (`PreTrainedTokenizerBase`): the text tower's.
            batch_size (`int`, *optional*, defaults to 64): captions in a forward pass, grouped by length.

        Returns:
            `np.ndarray` of shape `(len(captions), projection_dim)`, float32, rows of unit length.
        """
        # RoBERTa counts positions from its padding index + 1.
        max_length = min(MAX_TEXT_TOKENS, self.config.text_config.max_position_embeddings - 2)
        embeddings = np.empty((len(captions), self.config.projection_dim), dtype=np.float32)
        # Texts of like length together: padding is wasted work.
        order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
        device = next(self.text_model.parameters()).device
        was_training = self.text_model.training
        self.text_model.eval()
        try:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                texts = [captions[row] for row in rows]
                tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
                tokens = tokens.to(device)
                embeddings[rows] = self.encode_text(tokens.input_ids, tokens.attention_mask).cpu().numpy()
        finally:
            self.text_model.train(was_training)
        return embeddings

    def fingerprint(self, tokenizer: Any) -> np.ndarray:
        """Embeddings of a few fixed texts, of shape `(4, projection_dim)`: they tell text encoders apart.

        Cosines between two fingerprints stay near 1 over dtypes, devices and any training of the decoder, and fall
        far below for another encoder; see `CaptionDatastore.check_encoder`.
        """
        return self.embed_captions(FINGERPRINT_TEXTS, tokenizer)


class RecapClapEncoder(TextEmbedder, ClapModel):
    """LAION's CLAP: an HTSAT audio tower over 10 s windows of log-mel features, a RoBERTa text tower."""

    @staticmethod
    def hidden_size(config: ClapConfig) -> int:
        """d, the width of the audio tower's last hidden state."""
        audio = config.audio_config
        return audio.patch_embeds_hidden_size * 2 ** (len(audio.depths) - 1)

    @staticmethod
    def grid(config: ClapConfig) -> tuple[int, int]:
        """(F, T): frequency bands and time cells of one window. State `band * T + cell` of a window belongs to them.

        HTSAT lays four stretches of time above each other as a square picture and halves it between stages: 2 x 32
        for the published sizes, so that a cell spans half of the mel bins and 0.31 s.
        """
        audio = config.audio_config
        ratio = audio.spec_size // audio.num_mel_bins
        stride = audio.patch_stride[0] if isinstance(audio.patch_stride, (list, tuple)) else audio.patch_stride
        side = audio.spec_size // stride // 2 ** (len(audio.depths) - 1)
        return side // ratio, side * ratio

    @property
    def input_normalisation(self) -> nn.Module | None:
        """The batch norm of the tower's input, if it has one: its statistics are not trained."""
        return self.audio_model.audio_encoder.batch_norm

    @staticmethod
    def window_seconds(config: ClapConfig) -> float:
        """Length of a window, if nothing else is asked for."""
        return 10.0

    @staticmethod
    def feature_settings(config: ClapConfig) -> dict[str, Any]:
        """What the configuration says about the feature extractor."""
        audio = config.audio_config
        mels = "fusion" if audio.enable_fusion else "rand_trunc"
        return {"truncation": mels, "feature_size": audio.num_mel_bins}

    def encode_windows(
        self, windows: torch.Tensor, position_embedding: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and embeddings of windows.

        Fused checkpoints get each window as a short clip, which is their path without fusion: the result depends on
        nothing but the window. (The stock extractor declares a random clip of a batch to be a long one.)

        Args:
            windows (`torch.Tensor` of shape `(N, 1, num_frames, num_mel_bins)`): log-mel features in dB.
            position_embedding (`str`, *optional*): `"sinusoidal"` adds fixed position embeddings along time.

        Returns:
            `tuple`: states of shape `(N, n, d)`, all zero where the decoder shall not attend, and L2-normalised
            float32 embeddings of shape `(N, projection_dim)`.
        """
        output = self._audio_output(windows)
        # (N, d, F, T)
        states = output.last_hidden_state
        if position_embedding == SINUSOIDAL:
            states = states + sinusoidal_positions(states.shape[-1], states.shape[1]).T[:, None].to(states)
        return states.flatten(2).transpose(1, 2), self.embed_features(output.pooler_output[:, None])

    def audio_features(self, windows: torch.Tensor) -> torch.Tensor:
        """What `embed_features` reads: the pooled output of windows, `(N, 1, num_frames, num_mel_bins)` ->
        `(N, 1, d)`."""
        return self._audio_output(windows).pooler_output[:, None]

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Audio embeddings of `audio_features`: `(N, projection_dim)`, L2-normalised, float32."""
        return nn.functional.normalize(self.audio_projection(features[:, 0]).float(), dim=-1)

    def _audio_output(self, windows: torch.Tensor) -> Any:
        is_longer = None
        if self.config.audio_config.enable_fusion:
            windows = windows.expand(-1, 4, -1, -1)
            is_longer = torch.zeros(windows.shape[0], 1, dtype=torch.bool, device=windows.device)
        return self.audio_model(input_features=windows, is_longer=is_longer)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Text embeddings of shape `(batch_size, projection_dim)`, L2-normalised, float32."""
        pooled = self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(self.text_projection(pooled).float(), dim=-1)


def embedding_states(embeds: Any) -> Any:
    """Embeddings of unit length `(..., P)` as states for the decoder: scaled to variance 1, as hidden states are."""
    return embeds * embeds.shape[-1] ** 0.5


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


__all__ = ["RecapClapEncoder"]
