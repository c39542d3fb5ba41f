"""The model behind the page: one captioner, any number of caption datastores beside one another."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recap_hf.audio.timeline import caption_timeline
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
    """A captioner that visitors use at the same time with different datastores.

    Args:
        captioner ([`Captioner`])
        datastores (`Mapping[str, Any]`, *optional*): further captions to choose from, anything that
            [`open_datastore`] takes.

    Raises:
        `ValueError`: if a datastore comes from another text encoder.
        `OSError`: if there is no such datastore.
    """

    def __init__(self, captioner: Captioner, datastores: Mapping[str, Any] | None = None) -> None:
        self.captioner = captioner
        self.model, self.processor = captioner.model, captioner.processor
        self._captioners: dict[str, Captioner] = {}
        if captioner.datastore is not None:
            self._add("Built in", captioner)
        for name, source in (datastores or {}).items():
            self._add(name, captioner.with_datastore(source))
        self._captioners[NO_CAPTIONS] = captioner.with_options(CaptionOptions(k=0))

    @classmethod
    def load(cls, settings: DemoSettings) -> DemoCaptioner:
        """The captioner that the settings name."""
        return cls(Captioner.from_pretrained(settings.model, device=settings.device), settings.datastores)

    def _add(self, name: str, captioner: Captioner) -> None:
        self._captioners[f"{name} ({len(captioner.datastore):,} captions)"] = captioner

    @property
    def choices(self) -> list[str]:
        """Names of the captions to choose from, the captioner's own first."""
        return list(self._captioners)

    @property
    def sampling_rate(self) -> int:
        """The model's, in Hz."""
        return self.processor.feature_extractor.sampling_rate

    @property
    def frequency_range(self) -> tuple[float, float]:
        """Lowest and highest frequency that the model encodes, in Hz."""
        extractor = self.processor.feature_extractor
        return float(extractor.frequency_min), float(extractor.frequency_max)

    def captioner_of(self, store: CaptionDatastore | str) -> Captioner:
        """The captioner with the captions of that choice, or of a datastore."""
        return self._captioners[store] if isinstance(store, str) else self.captioner.with_datastore(store)

    def embed(self, captions: Sequence[str]) -> Iterator[int | CaptionDatastore]:
        """Embeds captions, a few at a time: yields how many are done, and last the datastore of them all."""
        blocks = []
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            block = list(captions[start : start + _CAPTIONS_AT_ONCE])
            blocks.append(self.model.embed_captions(block, self.processor, batch_size=_CAPTIONS_AT_ONCE))
            yield min(start + _CAPTIONS_AT_ONCE, len(captions))
        fingerprint = self.model.embed_fingerprint(self.processor)
        yield CaptionDatastore.from_embeddings(list(captions), np.concatenate(blocks), fingerprint)

    def caption(self, captioner: Captioner, recording: Recording) -> dict[str, Any]:
        """Caption, score and retrieved captions of a recording."""
        source = {"array": recording.waveform, "sampling_rate": recording.sampling_rate}
        return captioner.caption([captioner.read(source)])[0].to_dict()

    def timeline(self, captioner: Captioner, recording: Recording) -> Iterator[dict[str, Any]]:
        """Segments of a recording as they become certain; see [`caption_timeline`]."""
        source = {"array": recording.waveform, "sampling_rate": recording.sampling_rate}
        # Two at once: the first segments are on the page while the others are captioned.
        return caption_timeline(captioner, source, batch_size=2)

    def explain(
        self, captioner: Captioner, recording: Recording, result: Mapping[str, Any]
    ) -> CaptionExplanation | None:
        """Why the recording got the caption of `result`; `None` where there is nothing to explain.

        That is silence, a caption without a word, and a model without cross-attention.
        """
        explainable = result["caption"].strip() and self.model.config.decoder.add_cross_attention
        if not explainable or is_silent(recording.waveform):
            return None
        why = explain_caption(
            captioner,
            recording.waveform,
            recording.sampling_rate,
            caption=result["caption"],
            retrieved=result["retrieved"],
        )
        return why if why.words else None

    def picture(self, recording: Recording, why: CaptionExplanation) -> bytes:
        """The explanation of all words as one PNG, as `recap explain --output` draws it."""
        extractor = self.processor.feature_extractor
        buffer = io.BytesIO()
        draw_explanation(why, recording.waveform, extractor, recording.sampling_rate).savefig(buffer, format="png")
        return buffer.getvalue()
