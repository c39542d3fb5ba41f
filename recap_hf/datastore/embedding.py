"""The encoder of a datastore: a captioner's CLAP, its text tower for captions and its audio tower for recordings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.assets import default_model_path
from recap_hf.modeling.captioning_recap import load_pretrained

from .audio_keys import encode_recordings


@dataclass(eq=False)
class CaptionEmbedder:
    """Embeds captions and recordings, and counts decoder tokens.

    Args:
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the captioner.
        batch_size: captions per forward pass.
        recipe: makes the same encoder in another process, given the number of that process.
    """

    model: Any
    processor: Any
    batch_size: int = 64
    recipe: Callable[[int], "CaptionEmbedder"] | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path | None = None, device: str | None = None, dtype: str = "float32", batch_size: int = 64
    ) -> "CaptionEmbedder":
        """The encoder of a captioner.

        Args:
            name: folder or Hub id; by default the embedded captioner's.
            device: by default a GPU if there is one.
            dtype: "bfloat16" is faster on a GPU; cosines with float32 stay above 0.999.
        """
        name = name or default_model_path()
        recipe = partial(_load_in_worker, str(name), device, dtype, batch_size)
        return cls(*load_pretrained(name, device, dtype), batch_size, recipe)

    @cached_property
    def fingerprint(self) -> np.ndarray:
        """Embeddings of a few fixed texts, of shape `(4, dimension)`: they tell encoders apart."""
        return self.model.embed_fingerprint(self.processor)

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape `(len(captions), dimension)`; batches are sorted by length."""
        return self.model.embed_captions(list(captions), self.processor, batch_size=self.batch_size)

    def embed_audio(self, path: str | Path) -> np.ndarray:
        """Unit vectors of a recording's windows, float32 of shape `(1, num_windows, dimension)`."""
        return encode_recordings([path], self.model, self.processor)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Decoder tokens of each caption."""
        return [len(ids) for ids in self.processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"]]


def _load_in_worker(name: str, device: str | None, dtype: str, batch_size: int, rank: int) -> CaptionEmbedder:
    """The encoder, on one of several GPUs."""
    if device is None and torch.cuda.device_count() > 1:
        device = f"cuda:{rank % torch.cuda.device_count()}"
    return CaptionEmbedder.from_pretrained(name, device, dtype, batch_size)
