"""`pipeline("audio-captioning")`: recordings in, captions with what they were prompted with out."""

from __future__ import annotations

import collections.abc
import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .audio_recap import SILENCE_CAPTION, is_silent, load_audio, resample, to_mono
from .batching_recap import decoding_batches
from .captions_recap import open_datastore
from .confidence_recap import ConfidenceModel, caption_features
from .datastore_choice_recap import check_choice
from .decoding_recap import lay_out_for_cpu
from .outputs_recap import RecapEncoderOutput
from .readings_recap import WEIGHTS
from .reranking_recap import caption_similarities, generate_captions, reranking_parameters
from .timeline_recap import DEFAULT_SEGMENT_BATCH, TimelineSettings, TimelineSummary, caption_timeline

_GENERATION_KEYS = frozenset(key for key in vars(GenerationConfig()) if not key.startswith("_")) | {
    "generation_config",
    "max_new_tokens",
    *WEIGHTS,
}


class AudioCaptioningPipeline(Pipeline):
    """Captions recordings: `pipeline("audio-captioning")`.

    Args:
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): loaded by `pipeline(...)`.
        datastore (*optional*): captions to retrieve from instead of the checkpoint's: a [`CaptionDatastore`], a
            folder or Hub id of one, a file of captions (text with one a line, CSV, JSON or JSONL), or a list of
            captions. The last two are embedded on the spot.
        retrieval_diversity, retrieval_score_drop (`float`, *optional*): captions that differ from each other, and
            fewer where one fits, see [`CaptionDatastore.search`]. Set on the processor, and saved with it.
        k (`int`, *optional*): captions in the prompt, default the processor's.
        rerank (`str`, *optional*): `"clap"` generates several captions and returns the one that CLAP finds nearest to
            the recording, with its `similarity` and all `candidates`, best first; `"none"` the search's own best.
        candidates (`int`, *optional*): how many with `rerank`, default as many as the search has beams; samples
            instead of beams with `do_sample=True`.
        rerank_weight (`float`, *optional*): with `rerank`, what the similarity counts beside the search's score of a
            caption, see [`Choice`]. The three are by default those of the checkpoint's generation configuration;
            where it has none there is no reranking, and reranking goes by the similarity alone.
        decoding_batch_size (`int`, *optional*): clips decoded together, those with prompts of like lengths; default
            `batch_size`, which is then how many are heard together.
        generation parameters (`num_beams`, `max_new_tokens`, `do_sample`, `promptless_weight`, ...): passed to
            `generate`.

    Each input is a path, a URL, bytes, a waveform of shape `(samples,)` or `(channels, samples)` at the feature
    extractor's rate, `{"array", "sampling_rate"}`, or a `datasets` row or Audio value, decoded or not. Lists,
    generators and datasets of these are streamed, `batch_size` at a time.

    Returns for each input `{"caption": str, "score": float, "retrieved": [{"caption": str, "score": float, ...}]}`:
    `score` is the exponential of the mean log-probability of the caption's tokens. A recording that holds nothing
    above the smallest step of 16-bit audio is captioned "silence" without asking the model. A model with a calibration
    (`config.confidence`) also returns `confidence`, the probability that the caption is right.

    With `return_timestamps=True` a recording of any length is read as it is needed and becomes a timeline:
    `"segments"` has `{"start", "end", "caption", "score", "retrieved"}` of each, in seconds; `"caption"`, `"score"`,
    `"retrieved"`, `"duration"` and `"sounds"` are those of [`TimelineSummary`]. `batch_size` then counts segments.
    `timeline` takes the fields of [`TimelineSettings`] as a dictionary. To have segments while the recording is read,
    see [`caption_timeline`].

    Example:
        >>> import recap_hf
        >>> from transformers import pipeline
        >>> captioner = pipeline("audio-captioning")
        >>> captioner("dog.wav")["caption"]
        'a dog barks twice'
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(
        self,
        *args: Any,
        datastore: Any = None,
        retrieval_diversity: float | None = None,
        retrieval_score_drop: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "The audio-captioning pipeline needs a `processor`: give one, or a `model` as a folder or Hub id that "
                "has one."
            )
        if datastore is not None:
            self.processor.datastore = open_datastore(datastore, self.model, self.processor)
        check_choice(retrieval_diversity or 0.0, retrieval_score_drop, "retrieval_")
        if retrieval_diversity is not None:
            self.processor.retrieval_diversity = retrieval_diversity
        if retrieval_score_drop is not None:
            self.processor.retrieval_score_drop = retrieval_score_drop
        self.processor.check_model(self.model)
        if self.model.device.type == "cpu" and self.model.dtype == torch.float32:
            # Another order in memory and the same numbers; see `prepare_for_cpu`.
            lay_out_for_cpu(self.model.decoder)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Captions one input, a list (as a list), or a stream of them: generators, datasets and their columns."""
        known = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray, torch.Tensor, collections.abc.Mapping)
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        elif not isinstance(inputs, (*known, list, Dataset)) and hasattr(inputs, "__len__"):
            # A dataset or a column of `datasets`: neither a list nor one of torch's, which the base class knows.
            rows = inputs
            inputs = (rows[index] for index in range(len(rows)))
        if kwargs.get("return_timestamps", self._forward_params.get("return_timestamps")) and "batch_size" in kwargs:
            kwargs["segment_batch_size"] = kwargs.pop("batch_size")
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self,
        k: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        return_timestamps: bool | None = None,
        timeline: dict[str, Any] | None = None,
        segment_batch_size: int | None = None,
        rerank: str | None = None,
        candidates: int | None = None,
        rerank_weight: float | None = None,
        decoding_batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_params: dict[str, Any] = {}
        forward_params: dict[str, Any] = {}
        if return_timestamps is not None:
            preprocess_params["return_timestamps"] = forward_params["return_timestamps"] = bool(return_timestamps)
        if timeline is not None:
            forward_params["timeline"] = TimelineSettings(**timeline)
        if segment_batch_size is not None:
            forward_params["segment_batch_size"] = segment_batch_size
        unknown = [key for key in kwargs if key not in _GENERATION_KEYS]
        if unknown:
            raise TypeError(f"The audio-captioning pipeline does not know the arguments {', '.join(sorted(unknown))}.")
        if k is not None:
            forward_params["k"] = k
        forward_params |= reranking_parameters(rerank, candidates, rerank_weight)
        if decoding_batch_size is not None:
            forward_params["decoding_batch_size"] = decoding_batch_size
        if generate_kwargs or kwargs:
            forward_params["generate_kwargs"] = {**(generate_kwargs or {}), **kwargs}
        return preprocess_params, forward_params, {}

    def preprocess(self, input_: Any, return_timestamps: bool = False) -> dict[str, Any]:
        if return_timestamps:
            # Read later, as it is needed. In a list, as the waveforms of a batch are.
            return {"source": [input_]}
        rate = self.processor.feature_extractor.sampling_rate
        if isinstance(input_, (np.ndarray, torch.Tensor, list)):
            waveform = to_mono(input_)
            if not waveform.size or not np.isfinite(waveform).all():
                raise ValueError("The recording is empty or holds NaN or infinite samples.")
        else:
            # A row of a dataset with an audio column, or the audio itself.
            if isinstance(input_, collections.abc.Mapping) and "audio" in input_:
                input_ = input_["audio"]
            waveform, source_rate = load_audio(input_)
            waveform = resample(to_mono(waveform), source_rate, rate)
        return {"waveform": waveform}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        k: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        return_timestamps: bool = False,
        timeline: TimelineSettings | None = None,
        segment_batch_size: int | None = None,
        rerank: str | None = None,
        candidates: int | None = None,
        rerank_weight: float | None = None,
        decoding_batch_size: int | None = None,
    ) -> dict[str, list[Any]]:
        if return_timestamps:
            options = {"settings": timeline, "k": k, "generate_kwargs": generate_kwargs}
            options |= reranking_parameters(rerank, candidates, rerank_weight)
            options["batch_size"] = segment_batch_size or self._batch_size or DEFAULT_SEGMENT_BATCH
            return {"result": [self._timeline(source, options) for source in model_inputs["source"]]}
        waveforms = model_inputs["waveform"]
        if not isinstance(waveforms, list):
            waveforms = [waveforms]
        confidence = {} if self.model.config.confidence is None else {"confidence": 1.0}
        results: list[dict[str, Any]] = [
            {"caption": SILENCE_CAPTION, "score": 1.0, **confidence, "retrieved": []} for _ in waveforms
        ]
        heard = [index for index, waveform in enumerate(waveforms) if not is_silent(waveform)]
        if heard:
            chosen = [waveforms[index] for index in heard]
            captions = self.caption(
                chosen,
                k,
                generate_kwargs or {},
                rerank,
                candidates,
                decoding_batch_size,
                rerank_weight,
            )
            for index, result in zip(heard, captions, strict=True):
                results[index] = result
        return {"result": results}

    def _timeline(self, source: Any, options: dict[str, Any]) -> dict[str, Any]:
        summary = TimelineSummary()
        segments = list(caption_timeline(self, source, summary=summary, **options))
        return {**summary.result(), "segments": segments}

    def caption(
        self,
        waveforms: list[np.ndarray],
        k: int | None,
        generate_kwargs: dict[str, Any],
        rerank: str | None = None,
        candidates: int | None = None,
        decoding_batch_size: int | None = None,
        rerank_weight: float | None = None,
    ) -> list[dict[str, Any]]:
        """Captions of one batch of waveforms at the feature extractor's sampling rate."""
        inputs = self.processor(
            audio=waveforms,
            sampling_rate=self.processor.feature_extractor.sampling_rate,
            return_tensors="pt",
            device=self.device,
        )
        encoding = self.model.encode_audio(**inputs)
        prompts = self.processor.build_prompts(encoding.audio_embeds, k=k)
        retrieved = prompts.pop("retrieved")
        choice = {"rerank": rerank, "candidates": candidates, "rerank_weight": rerank_weight}
        captions, scores = [""] * len(waveforms), [0.0] * len(waveforms)
        extras: list[dict[str, Any]] = [{} for _ in waveforms]
        for rows, part, part_prompts in decoding_batches(encoding, prompts, decoding_batch_size):
            decoded = self._decode(part, part_prompts, [retrieved[row] for row in rows], generate_kwargs, choice)
            for row, *texts_and_more in zip(rows, *decoded, strict=True):
                captions[row], scores[row], extras[row] = texts_and_more
        confidences = self._confidences(captions, scores, retrieved, encoding.audio_embeds)
        return [
            {"caption": caption, "score": score, **confidence, "retrieved": hits, **extra}
            for caption, score, confidence, hits, extra in zip(
                captions, scores, confidences, retrieved, extras, strict=True
            )
        ]

    def _decode(
        self,
        encoding: RecapEncoderOutput,
        prompts: dict[str, Any],
        retrieved: list[list[Any]],
        generate_kwargs: dict[str, Any],
        choice: dict[str, Any],
    ) -> tuple[list[str], list[float], list[dict[str, Any]]]:
        """Captions, scores and what `rerank` adds where it was asked for, of one batch for the decoder."""
        sequences, scores, chosen = generate_captions(
            self.model, self.processor, encoding, prompts, retrieved, **choice, **generate_kwargs
        )
        extras: list[dict[str, Any]] = [{} for _ in scores]
        if chosen is not None and choice["rerank"] is not None:
            extras = [{"similarity": entry.similarity, "candidates": entry.candidates} for entry in chosen]
        return self.processor.batch_decode(sequences), scores, extras

    def _confidences(
        self, captions: list[str], scores: list[float], retrieved: list[list[Any]], audio_embeds: torch.Tensor
    ) -> list[dict[str, float]]:
        """For each caption its `confidence`, or nothing where the model has no calibration."""
        calibration = ConfidenceModel.of(self.model.config.confidence)
        if calibration is None:
            return [{} for _ in captions]
        similarities = caption_similarities(self.model, self.processor, captions, audio_embeds)
        return [
            {"confidence": calibration(caption_features(*features))}
            for features in zip(scores, similarities, retrieved, strict=True)
        ]

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        result = model_outputs["result"]
        return result[0] if isinstance(result, list) else result

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> PipelineIterator:
        # The stock collation pads features and refuses the decoder's left padding beside them; waveforms need none.
        if isinstance(inputs, collections.abc.Sized):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            dataset = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=_collate)
        batches = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(batches, self.postprocess, postprocess_params)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model, processor, datastore and code: all that `pipeline(model=folder)` needs."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _collate(items: list[dict[str, Any]]) -> dict[str, list[Any]]:
    if "source" in items[0]:
        return {"source": [source for item in items for source in item["source"]]}
    return {"waveform": [item["waveform"] for item in items]}


__all__ = ["SILENCE_CAPTION", "AudioCaptioningPipeline"]
