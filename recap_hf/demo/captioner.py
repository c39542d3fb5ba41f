"""The model behind the page: one captioner, any number of caption datastores beside one another."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recap_hf.modeling.audio_recap import is_silent
from recap_hf.modeling.captions_recap import open_datastore
from recap_hf.modeling.explanation_recap import CaptionExplanation
from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline
from recap_hf.modeling.retrieval_recap import CaptionDatastore
from recap_hf.modeling.timeline_recap import caption_timeline

from .recordings import Recording
from .settings import DemoSettings

NO_CAPTIONS = "None: the model alone"
_CAPTIONS_AT_ONCE = 32


class DemoCaptioner:
    """A captioner that visitors use at the same time with different datastores.

    Args:
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the captioner. The processor is not
            changed: each datastore gets a copy that shares everything else.
        datastores (`Mapping[str, Any]`, *optional*): further captions to choose from, anything that
            [`open_datastore`] takes.
        device (*optional*): default a GPU if there is one.

    Raises:
        `ValueError`: if a datastore comes from another text encoder.
        `OSError`: if there is no such datastore.
    """

    def __init__(
        self, model: Any, processor: Any, datastores: Mapping[str, Any] | None = None, device: Any = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.device = device
        self._pipelines: dict[str, AudioCaptioningPipeline] = {}
        if processor.datastore is not None:
            self._add("Built in", processor.datastore)
        for name, source in (datastores or {}).items():
            self._add(name, open_datastore(source, model, processor))
        self._pipelines[NO_CAPTIONS] = self.pipeline(None)

    @classmethod
    def load(cls, settings: DemoSettings) -> DemoCaptioner:
        """The captioner that the settings name."""
        from recap_hf.loading import load_pair

        # The pipelines move it to the device.
        model, processor = load_pair(settings.model, "cpu")
        return cls(model, processor, settings.datastores, settings.device)

    def _add(self, name: str, store: CaptionDatastore) -> None:
        self._pipelines[f"{name} ({len(store):,} captions)"] = self.pipeline(store)

    @property
    def choices(self) -> list[str]:
        """Names of the captions to choose from, the captioner's own first."""
        return list(self._pipelines)

    @property
    def sampling_rate(self) -> int:
        """The model's, in Hz."""
        return self.processor.feature_extractor.sampling_rate

    @property
    def frequency_range(self) -> tuple[float, float]:
        """Lowest and highest frequency that the model hears, in Hz."""
        extractor = self.processor.feature_extractor
        return float(extractor.frequency_min), float(extractor.frequency_max)

    def pipeline(self, store: CaptionDatastore | str | None) -> AudioCaptioningPipeline:
        """The captioner with the captions of that choice, or of a datastore, or without any."""
        if isinstance(store, str):
            return self._pipelines[store]
        processor = copy.copy(self.processor)
        processor.datastore = store
        return AudioCaptioningPipeline(model=self.model, processor=processor, device=self.device)

    def embed(self, captions: Sequence[str]) -> Iterator[int | CaptionDatastore]:
        """Embeds captions, a few at a time: yields how many are done, and last the datastore of them all."""
        blocks = []
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            block = list(captions[start : start + _CAPTIONS_AT_ONCE])
            blocks.append(self.model.embed_captions(block, self.processor, batch_size=_CAPTIONS_AT_ONCE))
            yield min(start + _CAPTIONS_AT_ONCE, len(captions))
        fingerprint = self.model.embed_fingerprint(self.processor)
        yield CaptionDatastore.from_embeddings(list(captions), np.concatenate(blocks), fingerprint)

    def caption(self, pipeline: AudioCaptioningPipeline, recording: Recording) -> dict[str, Any]:
        """The pipeline's result for a recording: caption, score, retrieved captions."""
        return pipeline({"array": recording.waveform, "sampling_rate": recording.sampling_rate})

    def timeline(self, pipeline: AudioCaptioningPipeline, recording: Recording) -> Iterator[dict[str, Any]]:
        """Segments of a recording as they become certain; see [`caption_timeline`]."""
        source = {"array": recording.waveform, "sampling_rate": recording.sampling_rate}
        # Two at once: the first segments are on the page while the others are listened to.
        return caption_timeline(pipeline, source, batch_size=2)

    def explain(
        self, pipeline: AudioCaptioningPipeline, recording: Recording, result: Mapping[str, Any]
    ) -> CaptionExplanation | None:
        """Why the recording got the caption of `result`; `None` where there is nothing to explain.

        That is silence, a caption without a word, and a model without cross-attention.
        """
        explainable = result["caption"].strip() and self.model.config.decoder.add_cross_attention
        if not explainable or is_silent(recording.waveform):
            return None
        why = self.model.explain(
            recording.waveform,
            pipeline.processor,
            sampling_rate=recording.sampling_rate,
            caption=result["caption"],
            retrieved=result["retrieved"],
        )
        return why if why.words else None

    def picture(self, recording: Recording, why: CaptionExplanation) -> bytes:
        """The explanation of all words as one PNG, as `recap explain --output` draws it."""
        from recap_hf.explanation.picture import draw_explanation

        extractor = self.processor.feature_extractor
        buffer = io.BytesIO()
        draw_explanation(why, recording.waveform, extractor, recording.sampling_rate).savefig(buffer, format="png")
        return buffer.getvalue()
