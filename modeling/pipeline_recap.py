"""`pipeline("audio-captioning")`: recordings in, captions with the captions in their prompts out."""

from __future__ import annotations

import collections.abc
import copy
import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .audio_recap import is_clip_and_rate
from .captioning_recap import READ_ERRORS, Captioner
from .index_recap import from_package
from .options_recap import RETRIEVAL, CaptionOptions

# Arguments of `generate` that a GenerationConfig does not know.
_OTHERS = ("generation_config", "logits_processor", "stopping_criteria", "no_repeat_token_groups")
_GENERATION_KEYS = frozenset(key for key in (*vars(GenerationConfig()), *_OTHERS) if not key.startswith("_"))


class AudioCaptioningPipeline(Pipeline):
    """Captions recordings: `pipeline("audio-captioning")`. It holds a [`Captioner`] as `captioner`.

    Args:
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): loaded by `pipeline(...)`.
        datastore (*optional*): captions to retrieve from instead of the checkpoint's: see [`open_datastore`].
        batch_size (`int`, *optional*): recordings that are captioned together.
        decoding_batch_size (`int`, *optional*): recordings that are decoded together, those with prompts of like
            lengths; default `batch_size`.
        on_error (`str`, *optional*, defaults to `"raise"`): `"skip"` returns `{"error": reason}` for a recording that
            cannot be read.
        options: every field of [`CaptionOptions`]: `k`, `num_beams`, `rerank`, ...
        generation parameters (`no_repeat_ngram_size`, `num_return_sequences`, ...): of `generate`.

    Each input is a path, a URL, bytes, a waveform of shape `(samples,)` or `(channels, samples)` at the feature
    extractor's rate, `{"array", "sampling_rate"}`, a pair of array and rate, or a `datasets` row or Audio value,
    decoded or not. Lists, iterators, Series and datasets of these are streamed, `batch_size` at a time.

    Returns for each input the fields of a [`CaptionResult`] that are set: `{"caption": str, "score": float,
    "retrieved": [{"caption": str, "score": float, ...}]}`, with `"similarity"` and `"candidates"` where captions are
    reranked.

    With `return_timestamps=True` a recording of any length becomes a timeline: `"segments"` has `{"start", "end",
    "caption", "score", "retrieved"}` of each, in seconds; the other fields are those of `recap_hf.TimelineSummary`.
    `batch_size` then counts segments. `timeline` takes the fields of `recap_hf.TimelineSettings` as a dictionary. It
    needs the package `recap-hf`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args: Any, datastore: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("Give a `processor`, or a `model` as a folder or Hub id that has one.")
        self.captioner = Captioner(self.model, self.processor, datastore)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Captions one input, a list (as a list), or a stream of them: generators, datasets and their columns."""
        known = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray, torch.Tensor, collections.abc.Mapping)
        if isinstance(inputs, tuple) and not is_clip_and_rate(inputs):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        file = isinstance(inputs, (*known, list, tuple, Dataset)) or hasattr(inputs, "read")
        if not file and hasattr(inputs, "__iter__"):
            # A Series, a column of `datasets`, a set, an iterator: the base class knows lists, generators and torch's
            # datasets. By position: a Series has labels.
            inputs = (one for one in inputs)
        if kwargs.get("return_timestamps", self._forward_params.get("return_timestamps")) and "batch_size" in kwargs:
            kwargs["segment_batch_size"] = kwargs.pop("batch_size")
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self,
        generate_kwargs: dict[str, Any] | None = None,
        return_timestamps: bool | None = None,
        on_error: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if return_timestamps not in (None, True, False):
            raise ValueError(f"`return_timestamps` must be True or False, got {return_timestamps!r}.")
        if on_error not in (None, "raise", "skip"):
            raise ValueError(f"`on_error` must be 'raise' or 'skip', got {on_error!r}.")
        preprocess_params = {"return_timestamps": return_timestamps, "on_error": on_error}
        names = ("timeline", "segment_batch_size", "decoding_batch_size")
        forward_params = {name: kwargs.pop(name, None) for name in names} | preprocess_params
        preprocess_params, forward_params = (
            {name: value for name, value in params.items() if value is not None}
            for params in (preprocess_params, forward_params)
        )
        given = {**(generate_kwargs or {}), **kwargs}
        options = {name: given.pop(name) for name in CaptionOptions.names() if name in given}
        unknown = [key for key in given if key not in _GENERATION_KEYS]
        if unknown:
            raise TypeError(f"The audio-captioning pipeline does not know the arguments {', '.join(sorted(unknown))}.")
        if options:
            forward_params["options"] = CaptionOptions(**options)
        if given:
            forward_params["generate_kwargs"] = given
        return preprocess_params, forward_params, {}

    def preprocess(self, input_: Any, return_timestamps: bool = False, on_error: str = "raise") -> dict[str, Any]:
        if return_timestamps:
            # Read later, as it is needed. In a list, as the waveforms of a batch are.
            return {"source": [input_]}
        try:
            return {"waveform": [self.captioner.read(input_)]}
        except READ_ERRORS as error:
            if on_error == "raise":
                raise
            return {"waveform": [error]}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        options: CaptionOptions | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        return_timestamps: bool = False,
        decoding_batch_size: int | None = None,
        on_error: str = "raise",
        **timeline: Any,
    ) -> dict[str, list[Any]]:
        captioner, skipped = self.captioner_for(options, generate_kwargs), READ_ERRORS if on_error == "skip" else ()
        if return_timestamps:
            return {"result": [self._timeline(captioner, one, skipped, **timeline) for one in model_inputs["source"]]}
        waveforms = model_inputs["waveform"]
        readable = [one for one in waveforms if not isinstance(one, Exception)]
        found = iter(captioner.caption(readable, decoding_batch_size))
        results = [{"error": str(one)} if isinstance(one, Exception) else next(found).to_dict() for one in waveforms]
        return {"result": results}

    def captioner_for(
        self, options: CaptionOptions | None = None, generate_kwargs: dict[str, Any] | None = None
    ) -> Captioner:
        """The pipeline's captioner, with options and arguments of `generate` beside the pipeline's own."""
        captioner = copy.copy(self.captioner)
        own = self._forward_params.get("options", CaptionOptions())
        captioner.options = own.merged_with(options or CaptionOptions())
        captioner.generate_kwargs = {**self._forward_params.get("generate_kwargs", {}), **(generate_kwargs or {})}
        return captioner

    def _timeline(
        self,
        captioner: Captioner,
        source: Any,
        skipped: tuple[type[Exception], ...],
        timeline: dict[str, Any] | None = None,
        segment_batch_size: int | None = None,
    ) -> dict[str, Any]:
        module = from_package("audio.timeline", "`return_timestamps=True`")
        settings = module.TimelineSettings(**(timeline or {}))
        summary = module.TimelineSummary(settings.same_caption)
        batch_size = segment_batch_size or self._batch_size or module.DEFAULT_SEGMENT_BATCH
        given = {"settings": settings, "summary": summary, "batch_size": batch_size}
        try:
            segments = list(module.caption_timeline(captioner, source, **given))
        except skipped as error:
            return {"error": str(error)}
        return {**summary.result(), "segments": segments}

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
        # The stock collation pads features; waveforms need none.
        if isinstance(inputs, collections.abc.Sized):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            dataset = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=_collate)
        batches = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(batches, self.postprocess, postprocess_params)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model, processor and code, with the pipeline's datastore and retrieval options: all that
        `pipeline(model=folder)` needs."""
        self.model.save_pretrained(save_directory, **kwargs)
        processor = copy.copy(self.processor)
        processor.datastore = self.captioner.datastore
        options = self.captioner_for().options
        for name in CaptionOptions.names(RETRIEVAL):
            if getattr(options, name) is not None:
                setattr(processor, "num_retrieved_captions" if name == "k" else name, getattr(options, name))
        processor.save_pretrained(save_directory, **kwargs)


def _collate(items: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [value for item in items for value in item[name]] for name in items[0]}


__all__ = ["AudioCaptioningPipeline"]
