"""The model of the page: one captioner with several datastores to choose from."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recap_hf.explain import CaptionExplanation, draw_explanation, explain_caption
from recap_hf.modeling.audio_recap import is_silent
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .recordings import Recording
from .settings import DemoSettings

NO_CAPTIONS = "None: the model alone"
_CAPTIONS_AT_ONCE = 32


class DemoCaptioner:
    """A captioner with several datastores.

    Args:
        captioner ([`Captioner`])
        datastores (`Mapping[str, Any]`, *optional*): further datastores by name: what [`open_datastore`] takes.

    Raises:
        `ValueError`: if a datastore was made by another text encoder. `OSError`: if there is no such datastore.
    """

    def __init__(self, captioner: Captioner, datastores: Mapping[str, Any] | None = None) -> None:
        self.captioner = captioner
        self.feature_extractor = captioner.processor.feature_extractor
        named = {} if captioner.datastore is None else {"Built in": captioner}
        named |= {name: captioner.with_datastore(source) for name, source in (datastores or {}).items()}
        self._captioners = {f"{name} ({len(one.datastore):,} captions)": one for name, one in named.items()}
        self._captioners[NO_CAPTIONS] = captioner.with_options(CaptionOptions(k=0))

    @classmethod
    def load(cls, settings: DemoSettings) -> DemoCaptioner:
        """The captioner that the settings name."""
        return cls(Captioner.from_pretrained(settings.model, device=settings.device), settings.datastores)

    @property
    def choices(self) -> list[str]:
        """Names of the datastores, the checkpoint's own first."""
        return list(self._captioners)

    def captioner_of(self, store: CaptionDatastore | str) -> Captioner:
        """The captioner with the datastore of that name, or with another datastore."""
        return self._captioners[store] if isinstance(store, str) else self.captioner.with_datastore(store)

    def embed(self, captions: Sequence[str]) -> Iterator[int | CaptionDatastore]:
        """Embeds captions in batches. Yields the number that are done, and last the datastore."""
        model, processor, blocks = self.captioner.model, self.captioner.processor, []
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            block = list(captions[start : start + _CAPTIONS_AT_ONCE])
            blocks.append(model.embed_captions(block, processor, batch_size=_CAPTIONS_AT_ONCE))
            yield start + len(block)
        fingerprint = model.embed_fingerprint(processor)
        yield CaptionDatastore.from_embeddings(list(captions), np.concatenate(blocks), fingerprint)

    def explain(
        self, captioner: Captioner, recording: Recording, result: Mapping[str, Any]
    ) -> tuple[CaptionExplanation | None, bytes]:
        """The explanation of the caption in `result`, and its picture as PNG.

        `None` and no picture for silence, for a caption without words, and for a model without cross-attention.
        """
        cross_attention = captioner.model.config.decoder.add_cross_attention
        if is_silent(recording.waveform) or not cross_attention or not result["caption"].strip():
            return None, b""
        rate, buffer = self.feature_extractor.sampling_rate, io.BytesIO()
        texts = {"caption": result["caption"], "retrieved": result["retrieved"]}
        explanation = explain_caption(captioner, recording.waveform, rate, **texts)
        if not explanation.words:
            return None, b""
        draw_explanation(explanation, recording.waveform, self.feature_extractor, rate).savefig(buffer, format="png")
        return explanation, buffer.getvalue()
