"""The smaller measurements of `recap bench`: mel, growth of the costs, steady state, start-up."""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ClapFeatureExtractor

from recap_hf.inference import prepare_for_cpu
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.speed.machine import describe, peak_memory_gb, seconds_of
from recap_hf.speed.stages import stages_of
from recap_hf.speed.workload import BenchmarkOptions, Workload, grown, make_workload

_MEL_LENGTHS_S = (1, 5, 10)
_THREADS_REST_S = 0.05
_MEL_PASSES = 15
_STEADY_BLOCK = 500
# What the embedded default is varied by, one at a time around ten seconds, 3 beams, one reading, k = 4 and batch 8.
_COSTS = {
    "batch_size": (1, 2, 4, 8, 16, 32),
    "clip_seconds": (1, 5, 10, 20, 40),
    "num_beams": (1, 2, 3, 5),
    "readings": (1, 2, 3),
    "k": (0, 1, 2, 4, 8),
    "datastore_size": (1_000, 10_000, 100_000),
}

# Run in a fresh interpreter: seconds on the clock and on the processor after each step towards a caption, as
# `recap caption` takes them or with plain imports and `from_pretrained`.
_STARTUP = """
import contextlib, json, sys, time
marks = [("start", time.perf_counter(), time.process_time())]
def mark(name): marks.append((name, time.perf_counter(), time.process_time()))
quickly = sys.argv[2] == "quick"
from recap_hf.quick_start import quick_start
with quick_start() if quickly else contextlib.nullcontext():
    import torch; mark("import torch")
    import transformers.modeling_utils; mark("import transformers' models")
    import recap_hf.inference, recap_hf.loading, recap_hf.modeling.pipeline_recap
    mark("import recap_hf and transformers' pipelines")
from recap_cli import build_parser
from recap_cli.caption import load_captioner
if not quickly:
    recap_hf.loading.load_from_folder = lambda *args: None
args = build_parser("caption").parse_args(["caption", sys.argv[1]])
captioner = load_captioner(args); mark("load model, tokenizers and datastore")
from recap_hf.captioning import caption_files
first = next(iter(caption_files(captioner, [sys.argv[1]], 1))); mark("caption one recording")
assert first.result, first.error
print(json.dumps(marks))
"""


def run_mel(options: BenchmarkOptions, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Features a clip by `ClapFeatureExtractor` and by ours in turns, at 1 thread and at all; milliseconds."""
    device, rows = torch.device(options.device), []
    stock, threads = ClapFeatureExtractor(truncation="rand_trunc"), torch.get_num_threads()
    generator = np.random.default_rng(options.seed)
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            for seconds in _MEL_LENGTHS_S:
                clip = (0.1 * generator.standard_normal(seconds * stock.sampling_rate)).astype(np.float32)
                rows += [
                    {"threads": count, "clip_s": seconds, **_mel_row(stock, clip, dtype, batch, device)}
                    for dtype in (("float32", "float64") if device.type != "mps" else ("float32",))
                    for batch in options.batch_sizes
                ]
    finally:
        torch.set_num_threads(threads)
    return {"settings": rows, "machine": describe(device)}


def _mel_row(
    stock: ClapFeatureExtractor, clip: np.ndarray, dtype: str, batch: int, device: torch.device
) -> dict[str, Any]:
    ours = RecapFeatureExtractor(compute_dtype=dtype)
    rate = stock.sampling_rate
    sides: dict[str, Callable[[], Any]] = {
        "reference": lambda: stock(clip, sampling_rate=rate, return_tensors="pt"),
        "recap": lambda: ours([clip] * batch, sampling_rate=rate, return_tensors="pt", device=device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for work in sides.values():
        work()
    for _ in range(_MEL_PASSES):
        for name, work in sides.items():
            # The threads of NumPy's matrix products wait actively for some 20 ms, on a core that is the other side's.
            time.sleep(_THREADS_REST_S)
            seconds[name].append(seconds_of(work, device))
    expected = sides["reference"]()["input_features"][0, 0]
    difference = (sides["recap"]()["input_features"][0, 0].cpu() - expected).abs().max().item()
    reference, recap = (1e3 * statistics.median(seconds[name]) for name in sides)
    return {
        "dtype": dtype,
        "batch": batch,
        "reference_ms": reference,
        "recap_ms": recap / batch,
        "ratio": reference * batch / recap,
        "difference_db": float(f"{difference:.1e}"),
    }


def run_costs(options: BenchmarkOptions, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Milliseconds a clip of each stage while one thing grows and the others stay."""
    batch = max(options.batch_sizes)
    base = make_workload(replace(options, clips=max(batch, *_COSTS["batch_size"])))
    if base.model.device.type == "cpu":
        prepare_for_cpu(base.model, options.dtypes[0])
    rows = []
    for what, values in _COSTS.items():
        for value in values:
            workload, size = _varied(base, what, value, batch)
            rows.append({"varied": what, "value": value, **stages_of(workload, size)})
            rows[-1]["total_ms"] = sum(figure for name, figure in rows[-1].items() if name.endswith("_ms"))
            note(f"{what} {value}: {rows[-1]['total_ms']:.1f} ms a clip")
    return {"settings": rows, "dtype": options.dtypes[0], "machine": describe(base.model.device)}


def _varied(base: Workload, what: str, value: int, batch: int) -> tuple[Workload, int]:
    workload = Workload(base.model, base.processor, base.waveforms, base.options)
    if what == "batch_size":
        return workload, value
    if what == "clip_seconds":
        samples = value * base.rate
        workload.waveforms = [np.resize(waveform, samples) for waveform in base.waveforms]
    elif what == "num_beams":
        workload.options = replace(base.options, num_beams=value)
    elif what == "readings":
        workload.options = replace(base.options, readings=value)
    else:
        workload.processor = copy.copy(base.processor)
        if what == "k":
            workload.processor.num_retrieved_captions = value
        else:
            workload.processor.datastore = grown(base.processor.datastore, value, base.options.seed)
    return workload, batch


def run_steady(options: BenchmarkOptions, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Clips of one second through the captioner, block after block: the memory and the speed of each block."""
    workload = make_workload(replace(options, clips=max(options.batch_sizes), new_tokens=0))
    if workload.model.device.type == "cpu":
        prepare_for_cpu(workload.model, options.dtypes[0])
    batch, generator = max(options.batch_sizes), np.random.default_rng(options.seed)
    deadline = time.perf_counter() + 60 * options.max_minutes
    rows: list[dict[str, Any]] = []
    done = 0
    while done < options.clips and time.perf_counter() < deadline:
        started, cpu, block = time.perf_counter(), time.process_time(), 0
        while block < min(_STEADY_BLOCK, options.clips - done):
            # Made as they are needed: nothing but the captioner is to hold memory.
            clips = [(0.1 * generator.standard_normal(workload.rate)).astype(np.float32) for _ in range(batch)]
            workload.caption(clips)
            block += batch
        done += block
        rows.append(
            {
                "clips": done,
                "clips_per_s": block / (time.perf_counter() - started),
                "clips_per_cpu_s": block / (time.process_time() - cpu),
                "memory_mb": _resident_mb(),
                "objects": len(gc.get_objects()),
            }
        )
        note(f"{done} clips: {rows[-1]['clips_per_s']:.1f} clips/s, {rows[-1]['memory_mb']:.0f} MB")
    # The first block warms up: allocators, kernels, tokenizers.
    settled = rows[1:] or rows
    return {
        "clips": done,
        "memory_growth_mb": settled[-1]["memory_mb"] - settled[0]["memory_mb"],
        "objects_growth": settled[-1]["objects"] - settled[0]["objects"],
        "settings": rows,
        "machine": describe(workload.model.device),
    }


def _resident_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 1e3 * peak_memory_gb(torch.device("cpu"))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_startup(recording: str, repeats: int = 3) -> dict[str, Any]:
    """From nothing to the first caption in fresh processes: seconds of each step, by the clock and the processor.

    Args:
        recording (`str`): what is captioned.
        repeats (`int`, *optional*, defaults to 3): processes; the fastest one counts, after one that is not counted.

    Returns:
        `dict`: `seconds` of the whole process and `settings`, a row for each step; beside them `usual_seconds`, with
        plain imports and `from_pretrained`, measured in turns.
    """
    runs: dict[str, list[tuple[float, list[Any]]]] = {"quick": [], "usual": []}
    for _ in range(repeats + 1):
        for kind, done in runs.items():
            done.append(_start_once(recording, kind))
    fastest = {kind: min(done[1:], key=lambda run: run[0]) for kind, done in runs.items()}
    steps = {kind: _steps(*run) for kind, run in fastest.items()}
    rows = [
        {**quick, **{f"usual_{name}": value for name, value in usual.items() if name != "step"}}
        for quick, usual in zip(steps["quick"], steps["usual"], strict=True)
    ]
    return {
        "seconds": fastest["quick"][0],
        "usual_seconds": fastest["usual"][0],
        "settings": rows,
        "machine": describe(torch.device("cpu")),
    }


def _start_once(recording: str, kind: str) -> tuple[float, list[Any]]:
    started = time.perf_counter()
    command = [sys.executable, "-c", _STARTUP, recording, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"The captioning process failed: {done.stderr.strip().splitlines()[-1]}")
    return wall, json.loads(done.stdout)


def _steps(wall: float, marks: list[Any]) -> list[dict[str, Any]]:
    steps = [
        {"step": name, "seconds": at - marks[number][1], "cpu_seconds": cpu - marks[number][2]}
        for number, (name, at, cpu) in enumerate(marks[1:])
    ]
    return [*steps, {"step": "start and end of Python", "seconds": wall - (marks[-1][1] - marks[0][1])}]
