"""Ours against the straightforward way, on the same clips in the same run, and what the machine would allow."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from recap_hf.inference import prepare_for_cpu, prepare_for_gpu
from recap_hf.speed.machine import bandwidth, describe, matmul_rate, peak_memory_gb, reset_peak_memory, timed
from recap_hf.speed.stages import reference_stages, stages_of
from recap_hf.speed.workload import CLIP_SECONDS, BenchmarkOptions, ReferencePath, Workload, make_workload

_MIN_ROUNDS, _MAX_ROUNDS = 1, 12
# Of the time that is allowed, this much goes into rounds; the rest into models, stages and the machine's limits.
_SHARE_FOR_ROUNDS = 0.7
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass
class Setting:
    """Our path with one type of weights and one batch size, and what was measured of it."""

    dtype: str
    batch: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    peak_gb: float = 0.0


def run_benchmark(options: BenchmarkOptions, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measures; plain data (see `format_table`).

    Args:
        options ([`BenchmarkOptions`]): what to measure.
        note (*optional*): called with what goes on.

    Returns:
        `dict`: `ratio` (float32 at the largest batch), `settings`, `identical_captions` (float32, all batches),
        `stages` (milliseconds a clip), `floor`, `machine` and `options`.
    """
    deadline = time.perf_counter() + 60 * options.max_minutes * _SHARE_FOR_ROUNDS
    device = torch.device(options.device)
    machine = describe(device)
    workload = make_workload(options)
    reference = workload.reference()
    models = {dtype: _prepared(workload, dtype) for dtype in options.dtypes}
    note(f"{len(workload.waveforms)} clips, models of {', '.join(models)}")
    settings = [Setting(dtype, batch) for dtype in models for batch in options.batch_sizes]
    reference_seconds, reference_cpu, expected = _rounds(workload, reference, models, settings, deadline, note)
    floor = _floor(workload, models, note)
    rows = [_row(setting, reference_seconds, reference_cpu, expected, floor) for setting in settings]
    exact = [row for row in rows if row["dtype"] == "float32"]
    main = max(exact or rows, key=lambda row: row["batch"])
    note("stages")
    return {
        "ratio": main["ratio"],
        "ratio_of": {"dtype": main["dtype"], "batch": main["batch"]},
        "identical_captions": all(row["identical"] == 1.0 for row in exact) if exact else None,
        "settings": rows,
        "reference": _rates(sum(reference_seconds), len(reference_seconds) * len(expected)),
        "rounds": len(reference_seconds),
        "stages": _all_stages(workload, reference, models, main),
        "floor": floor,
        "machine": machine,
        "options": asdict(options),
    }


def _prepared(workload: Workload, dtype: str) -> Workload:
    model = copy.deepcopy(workload.model)
    if workload.model.device.type == "cpu":
        return workload.with_model(prepare_for_cpu(model, dtype))
    if dtype == "int8":
        raise ValueError("int8 weights are for the CPU; on this device measure float32, bfloat16 or float16.")
    model.to(getattr(torch, dtype))
    return workload.with_model(prepare_for_gpu(model) if model.device.type == "cuda" else model)


def _rounds(
    workload: Workload,
    reference: ReferencePath,
    models: dict[str, Workload],
    settings: list[Setting],
    deadline: float,
    note: Callable[[str], None],
) -> tuple[list[float], list[float], list[str]]:
    """Rounds of the reference and then every setting on all clips, until the time is used up."""
    device, waveforms = workload.model.device, workload.waveforms
    # Once without a clock: first calls choose kernels and fill caches.
    reference.caption(waveforms[0])
    for ours in models.values():
        ours.caption(waveforms[:1])
    reference_seconds: list[float] = []
    reference_cpu: list[float] = []
    expected: list[str] = []
    longest = 0.0
    for number in range(_MAX_ROUNDS):
        started = time.perf_counter()
        if number >= _MIN_ROUNDS and started + longest > deadline:
            break
        expected.clear()
        wall, cpu = timed(lambda: expected.extend(map(reference.caption, waveforms)), device)
        reference_seconds.append(wall)
        reference_cpu.append(cpu)
        note(f"round {number + 1}: reference {len(waveforms) / reference_seconds[-1]:.3f} clips/s")
        for setting in settings:
            ours = models[setting.dtype]
            reset_peak_memory(device)
            setting.captions.clear()
            wall, cpu = timed(lambda s=setting, o=ours: _caption_all(s, o, waveforms), device)
            setting.seconds.append(wall)
            setting.cpu_seconds.append(cpu)
            setting.peak_gb = max(setting.peak_gb, peak_memory_gb(device))
            rate = len(waveforms) / setting.seconds[-1]
            note(f"round {number + 1}: {setting.dtype}, batch {setting.batch}: {rate:.3f} clips/s")
        longest = max(longest, time.perf_counter() - started)
    return reference_seconds, reference_cpu, expected


def _caption_all(setting: Setting, ours: Workload, waveforms: list[Any]) -> None:
    for start in range(0, len(waveforms), setting.batch):
        setting.captions += ours.caption(waveforms[start : start + setting.batch])


def _rates(seconds: float, clips: int) -> dict[str, float]:
    return {
        "clips_per_s": clips / seconds,
        "ms_per_clip": 1e3 * seconds / clips,
        "real_time_factor": seconds / (clips * CLIP_SECONDS),
    }


def _row(
    setting: Setting,
    reference_seconds: list[float],
    reference_cpu: list[float],
    expected: list[str],
    floor: dict[str, Any],
) -> dict[str, Any]:
    clips = len(expected)
    ours = _rates(sum(setting.seconds), clips * len(setting.seconds))
    # The ratio of each round's two neighbours in time: what slows the machine for a while slows both.
    ratios = [theirs / mine for theirs, mine in zip(reference_seconds, setting.seconds, strict=True)]
    same = sum(mine == theirs for mine, theirs in zip(setting.captions, expected, strict=True))
    least = floor["ms_per_clip"][setting.dtype][str(setting.batch)]
    return {
        "dtype": setting.dtype,
        "batch": setting.batch,
        "reference": clips * len(reference_seconds) / sum(reference_seconds),
        "recap": ours["clips_per_s"],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(
            theirs / mine for theirs, mine in zip(reference_cpu, setting.cpu_seconds, strict=True)
        ),
        "identical": same / clips,
        **{name: ours[name] for name in ("ms_per_clip", "real_time_factor")},
        "peak_memory_gb": setting.peak_gb,
        "share_of_floor": least / ours["ms_per_clip"],
    }


def _floor(workload: Workload, models: dict[str, Workload], note: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a clip if matrix products ran at their best rate and steps at the bandwidth of their weights."""
    note("bandwidth and matrix products")
    device, options = workload.model.device, workload.options
    tokens = options.new_tokens or 20
    counts = count_work(workload)
    bytes_per_s = bandwidth(device)
    # int8 weights are multiplied in the type of the activations at best: no slower than bfloat16.
    kinds = {dtype: torch.bfloat16 if dtype == "int8" else getattr(torch, dtype) for dtype in models}
    rates = {dtype: matmul_rate(device, kind) for dtype, kind in kinds.items()}
    floors: dict[str, dict[str, float]] = {}
    for dtype, rate in rates.items():
        floors[dtype] = {}
        for batch in options.batch_sizes:
            reading = counts["decoder_weights"] * _BYTES[dtype] / bytes_per_s
            computing = batch * options.num_beams * counts["flops_per_token"] / rate
            steps = (tokens - 1) * max(reading, computing) / batch
            floors[dtype][str(batch)] = 1e3 * (counts["flops_before_steps"] / rate + steps)
    return {
        "ms_per_clip": floors,
        "bandwidth_gb_s": bytes_per_s / 1e9,
        "matmul_gflops": {dtype: rate / 1e9 for dtype, rate in rates.items()},
        **counts,
    }


def count_work(workload: Workload) -> dict[str, float]:
    """Operations of encoder and prompt a clip, of a decode step a token, and weights that a step reads."""
    model, processor = workload.model, workload.processor
    waveform = workload.waveforms[0]
    inputs = processor(audio=[waveform], sampling_rate=workload.rate, return_tensors="pt", device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as encoder:
        encoding = model.encode_audio(**inputs)
    prompts = processor.build_prompts(encoding.audio_embeds)
    prompts.pop("retrieved")
    with FlopCounterMode(display=False) as prompt:
        once = {**workload.generation, "num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 1}
        model.generate(encoder_outputs=encoding, **prompts, **once)
    transformer = model.decoder.transformer
    weights = sum(p.numel() for p in transformer.h.parameters()) + model.decoder.lm_head.weight.numel()
    # Keys and values of the encoder's states are made with the prompt and not read again as weights.
    weights -= sum(block.crossattention.c_attn.weight.numel() for block in transformer.h)
    return {
        "prompt_tokens": prompts["decoder_input_ids"].shape[1],
        "flops_before_steps": encoder.get_total_flops() + prompt.get_total_flops(),
        "flops_per_token": 2 * weights,
        "decoder_weights": weights,
    }


def _all_stages(
    workload: Workload, reference: ReferencePath, models: dict[str, Workload], main: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = [{"path": "reference", "dtype": "float32", "batch": 1, **reference_stages(reference, workload)}]
    rows += [
        {"path": "recap", "dtype": dtype, "batch": main["batch"], **stages_of(ours, main["batch"])}
        for dtype, ours in models.items()
    ]
    return rows
