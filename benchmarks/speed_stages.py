"""What a clip's time is spent on: file, resampling, mel, encoder, retrieval, prompt, prefill, decode steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin

from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.generation_recap import RecapEncoderOutput
from recap_hf.speed.machine import seconds_of
from recap_hf.speed.workload import ReferencePath, Workload

_REPEATS = 3


def stages_of(workload: Workload, batch: int) -> dict[str, float]:
    """Milliseconds a clip of each stage of our path, at a batch size; the middle of three passes."""
    waveforms = workload.waveforms[:batch]
    return _middle([_our_stages(workload, waveforms) for _ in range(_REPEATS)], len(waveforms))


def reference_stages(reference: ReferencePath, workload: Workload) -> dict[str, float]:
    """Milliseconds a clip of each stage of the reference path."""
    return _middle([_reference_stages(reference, workload) for _ in range(_REPEATS)], 1)


def _middle(passes: list[dict[str, float]], clips: int) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * statistics.median(each[name] for each in passes) / clips for name in passes[0]}


class _Clock:
    """Runs the stages one by one and keeps their seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        result: list[Any] = []
        self.seconds[stage] = seconds_of(lambda: result.append(work()), self.device)
        return result[0]


def _read_files(clock: _Clock, files: list[str], rate: int) -> None:
    if files:
        loaded = clock("decode_file", lambda: [load_audio(path) for path in files])
        clock("resample", lambda: [resample(to_mono(wave), source, rate) for wave, source in loaded])


@torch.no_grad()
def _our_stages(workload: Workload, waveforms: list[Any]) -> dict[str, float]:
    model, processor = workload.model, workload.processor
    clock = _Clock(model.device)
    _read_files(clock, workload.files[: len(waveforms)], workload.rate)
    inputs = clock(
        "mel",
        lambda: processor(audio=waveforms, sampling_rate=workload.rate, return_tensors="pt", device=model.device),
    )
    encoding = clock("encode", lambda: model.encode_audio(**inputs))
    hits = clock("retrieve", lambda: processor.retrieve(encoding.audio_embeds))
    prompts = clock("prompt", lambda: processor.build_prompts(encoding.audio_embeds, retrieved=hits))
    prompts.pop("retrieved")
    generate = _parts_of_generation(clock, workload.generation)
    ids = generate(lambda **settings: model.generate(encoder_outputs=encoding, **prompts, **settings))
    clock("detokenize", lambda: processor.batch_decode(ids))
    return clock.seconds


@torch.no_grad()
def _reference_stages(reference: ReferencePath, workload: Workload) -> dict[str, float]:
    model, processor, waveform = reference.model, reference.processor, workload.waveforms[0]
    clock = _Clock(model.device)
    _read_files(clock, workload.files[:1], workload.rate)
    features = clock("mel", lambda: reference.extractor(waveform, sampling_rate=workload.rate, return_tensors="pt"))
    encoding = clock("encode", lambda: model.encode_audio(features["input_features"][:, :1]))
    hits = clock("retrieve", lambda: processor.retrieve(encoding.audio_embeds))
    prompts = clock("prompt", lambda: processor.build_prompts(encoding.audio_embeds, retrieved=hits))
    prompts.pop("retrieved")
    generate = _parts_of_generation(clock, reference.generation)
    ids = generate(
        lambda **settings: GenerationMixin.generate(
            model, encoder_outputs=RecapEncoderOutput(**encoding), **prompts, **settings
        )
    )
    clock("detokenize", lambda: processor.batch_decode(ids))
    return clock.seconds


def _parts_of_generation(clock: _Clock, settings: dict[str, Any]) -> Callable[[Callable[..., Any]], Any]:
    """Prefill is what a single token takes; the decode steps are the rest."""

    def measured(generate: Callable[..., Any]) -> Any:
        one = {**settings, "min_new_tokens": 1, "max_new_tokens": 1}
        clock("prefill", lambda: generate(**one))
        ids = clock("decode_steps", lambda: generate(**settings))
        clock.seconds["decode_steps"] = max(0.0, clock.seconds["decode_steps"] - clock.seconds["prefill"])
        return ids

    return measured
