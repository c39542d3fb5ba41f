"""The measurements of `python -m benchmarks.captioning`. Each takes `BenchmarkOptions` and returns plain data."""

from __future__ import annotations

import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from transformers import ClapFeatureExtractor

from benchmarks.captioning_workload import CLIP_SECONDS, BenchmarkOptions, Workload, grown, make_workload
from benchmarks.machine import describe, peak_memory_gb, resident_mb, seconds_of, timed
from benchmarks.naming import NamingRules
from recap_cli import build_parser
from recap_cli.options import load_captioner
from recap_hf.assets import examples_path
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.modeling.options_recap import CaptionOptions

Note = Callable[[str], None]
_MAX_ROUNDS = 12
# Of the allowed time this share is for rounds; loading and stages take the rest.
_SHARE_FOR_ROUNDS = 0.7
_STAGE_PASSES = 3
_MEL_LENGTHS_S, _MEL_PASSES = (1, 5, 10), 15
# The threads of NumPy's matrix products spin for about 20 ms after their work, on a core that the other side needs.
_THREADS_REST_S = 0.05
_STEADY_BLOCK = 500
_ROUNDS_BESIDE = 5
# One of these is varied at a time; the others stay at 10 s, 3 beams, k = 4 and the largest batch size.
_COSTS = {
    "batch_size": (1, 2, 4, 8, 16, 32),
    "clip_seconds": (1, 5, 10, 20, 40),
    "num_beams": (1, 2, 3, 5),
    "k": (0, 1, 2, 4, 8),
    "datastore_size": (1_000, 10_000, 100_000),
}
# Run in a fresh interpreter: the clock after each step towards a caption.
_STARTUP = """
import json, sys, time
marks = [("", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
import torch; mark("import torch")
import transformers.modeling_utils; mark("import transformers' models")
from recap_hf import Captioner; mark("import recap_hf")
captioner = Captioner.from_pretrained(device="cpu"); mark("load model, tokenizers and datastore")
captioner.caption([captioner.read(sys.argv[1])]); mark("caption one recording")
print(json.dumps(marks))
"""


def run_speed(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """Clips a second of both sides, in rounds of the reference and then of every dtype and batch size.

    Returns:
        `dict`: `ratio` of the largest batch size (float32 if measured), `identical_captions` (all float32 rows; None
        without one), `reference`, `rows`, `rounds`, `stages` in milliseconds a clip, `machine` and `options`.
    """
    workload, machine = make_workload(options), describe(torch.device(options.device))
    deadline = time.perf_counter() + 60 * options.max_minutes * _SHARE_FOR_ROUNDS
    reference = workload.reference()
    models = {dtype: workload.in_dtype(dtype) for dtype in options.dtypes}
    sides: dict[Any, Callable[[], list[str]]] = {"reference": lambda: list(map(reference.caption, workload.waveforms))}
    for dtype, ours in models.items():
        for batch in options.batch_sizes:
            sides[dtype, batch] = lambda ours=ours, batch=batch: _caption_all(ours, batch)
    # Once without a clock: first calls choose kernels and fill caches.
    reference.caption(workload.waveforms[0])
    for ours in models.values():
        ours.captioner().caption(ours.waveforms[:1])
    seconds: dict[Any, list[tuple[float, float]]] = {side: [] for side in sides}
    captions: dict[Any, list[str]] = {}
    longest, rounds = 0.0, 0
    while rounds < _MAX_ROUNDS and (not rounds or time.perf_counter() + longest < deadline):
        started, rounds = time.perf_counter(), rounds + 1
        for side, work in sides.items():
            seconds[side].append(timed(lambda s=side, w=work: captions.update({s: w()}), workload.device))
            note(f"round {rounds}: {side} {len(workload.waveforms) / seconds[side][-1][0]:.3f} clips/s")
        longest = max(longest, time.perf_counter() - started)
    rows = [_speed_row(side, seconds, captions) for side in sides if side != "reference"]
    main = max(rows, key=lambda row: (row["dtype"] == "float32", row["batch"]))
    exact = [row["identical"] == 1.0 for row in rows if row["dtype"] == "float32"]
    stages = [
        {"dtype": dtype, "batch": main["batch"], **stages_of(one, main["batch"])} for dtype, one in models.items()
    ]
    return {
        "ratio": main["ratio"],
        "identical_captions": all(exact) if exact else None,
        "reference": _clips_a_second(seconds["reference"], captions["reference"]),
        "rows": rows,
        "rounds": rounds,
        "stages": stages,
        "peak_memory_gb": peak_memory_gb(workload.device),
        "machine": machine,
        "options": asdict(options),
    }


def run_default(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """`run_speed` on recordings with the embedded default, which ends its captions itself.

    Raises:
        ValueError: without recordings.
    """
    if not options.audio:
        raise ValueError("Name recordings to caption: --audio FILE|FOLDER.")
    return run_speed(replace(options, model=options.model or "default", new_tokens=0), note)


def run_beside(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """Two captioners on the same recordings, each with its own decoding, as `recap caption` runs them on a CPU.

    Returns:
        `dict`: `rows`: for each captioner the medians of `clips_per_s`, reading included, and of `first_caption_s`,
        `recap caption` of one recording in a fresh process; `ratios`: medians over the rounds of how many times as
        fast `model` was.

    Raises:
        ValueError: without recordings or a second captioner.
    """
    if not options.audio or options.beside is None:
        raise ValueError("Name recordings and a second captioner: --audio FILE|FOLDER --beside MODEL.")
    names = {"--model": options.model or "default", "--beside": options.beside}
    commands = {side: _caption_command(name, options.audio[0]) for side, name in names.items()}
    captioners = {side: load_captioner(build_parser("caption").parse_args(one)) for side, one in commands.items()}
    for captioner in captioners.values():
        _caption_files(captioner, options.audio[:1], 1)
    warm: dict[str, list[float]] = {side: [] for side in names}
    cold: dict[str, list[float]] = {side: [] for side in names}
    for number in range(_ROUNDS_BESIDE):
        for side, captioner in captioners.items():
            batch, device = max(options.batch_sizes), captioner.model.device
            warm[side].append(seconds_of(lambda c=captioner, b=batch: _caption_files(c, options.audio, b), device))
            cold[side].append(_run_once([sys.executable, "-m", "recap_cli", *commands[side]])[0])
            rate = len(options.audio) / warm[side][-1]
            note(f"round {number + 1}: {side} {rate:.1f} clips/s, {cold[side][-1]:.1f} s")
    rows = [
        {
            "captioner": names[side],
            "clips_per_s": len(options.audio) / statistics.median(warm[side]),
            "first_caption_s": statistics.median(cold[side]),
        }
        for side in names
    ]
    ratios = {
        what: statistics.median(b / a for a, b in zip(times["--model"], times["--beside"], strict=True))
        for what, times in (("clips a second", warm), ("first caption", cold))
    }
    return {"rows": rows, "ratios": ratios, "machine": describe(torch.device("cpu"))}


def _caption_command(model: str, recording: str) -> list[str]:
    """Arguments of `recap` that caption a recording on the CPU, with as many threads as torch has here."""
    own = [] if model == "default" else ["--model", model]
    return ["caption", recording, "--device", "cpu", "--threads", str(torch.get_num_threads()), *own]


def _caption_files(captioner: Captioner, audio: Sequence[str], batch: int) -> None:
    """Reads and captions all recordings; the exception of one that cannot be read."""
    for _, result in captioner.caption_stream(audio, batch):
        if isinstance(result, Exception):
            raise result


def _caption_all(workload: Workload, batch: int) -> list[str]:
    captioner, waveforms = workload.captioner(), workload.waveforms
    blocks = (waveforms[start : start + batch] for start in range(0, len(waveforms), batch))
    return [result.caption for block in blocks for result in captioner.caption(block)]


def _clips_a_second(seconds: list[tuple[float, float]], captions: list[str]) -> float:
    return len(captions) * len(seconds) / sum(wall for wall, _ in seconds)


def _speed_row(
    side: tuple[str, int], seconds: dict[Any, list[tuple[float, float]]], captions: dict[Any, list[str]]
) -> dict[str, Any]:
    dtype, batch = side
    rules, pairs = NamingRules.ours(), list(zip(captions[side], captions["reference"], strict=True))
    # The ratios of neighbours in time: what slows the machine for a while slows both.
    wall, cpu = (
        statistics.median(
            theirs[kind] / ours[kind] for theirs, ours in zip(seconds["reference"], seconds[side], strict=True)
        )
        for kind in (0, 1)
    )
    rate = _clips_a_second(seconds[side], captions[side])
    return {
        "dtype": dtype,
        "batch": batch,
        "clips_per_s": rate,
        "clip_ms": 1e3 / rate,
        "ratio": wall,
        "cpu_ratio": cpu,
        "identical": sum(ours == theirs for ours, theirs in pairs) / len(pairs),
        "same_events": sum(rules.named(ours) == rules.named(theirs) for ours, theirs in pairs) / len(pairs),
        "times_real_time": rate * CLIP_SECONDS,
    }


@torch.no_grad()
def stages_of(workload: Workload, batch: int) -> dict[str, float]:
    """Milliseconds a clip of each stage at a batch size, the median of three passes.

    `prefill` is a caption of one token, its prompt included; `decode_steps` is the rest of a whole caption.
    """
    clips, captioner, first = workload.waveforms[:batch], workload.captioner(), workload.captioner(new_tokens=1)
    kwargs = {"sampling_rate": workload.rate, "return_tensors": "pt", "device": workload.device}
    passes: list[dict[str, float]] = []
    for _ in range(_STAGE_PASSES):
        found: dict[str, float] = {}

        def stage(name: str, work: Callable[[], Any], found: dict[str, float] = found) -> Any:
            result: list[Any] = []
            found[name] = seconds_of(lambda: result.append(work()), workload.device)
            return result[0]

        inputs = stage("mel", lambda: workload.processor(audio=clips, **kwargs))
        encoding = stage("encode", lambda i=inputs: workload.model.encode_audio(**i))
        hits = stage("retrieve", lambda e=encoding: captioner.retrieve(e))
        stage("prefill", lambda e=encoding, h=hits: first.generate(e, h))
        stage("decode_steps", lambda e=encoding, h=hits: captioner.generate(e, h))
        found["decode_steps"] = max(0.0, found["decode_steps"] - found["prefill"])
        passes.append(found)
    medians = {name: statistics.median(one[name] for one in passes) for name in passes[0]}
    return {f"{name}_ms": 1e3 * value / len(clips) for name, value in medians.items()}


def run_mel(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """Milliseconds a clip for features by `ClapFeatureExtractor` and by ours, and the largest difference in dB."""
    device, generator = torch.device(options.device), np.random.default_rng(options.seed)
    stock, rows = ClapFeatureExtractor(truncation="rand_trunc"), []
    for seconds in _MEL_LENGTHS_S:
        clip = (0.1 * generator.standard_normal(seconds * stock.sampling_rate)).astype(np.float32)
        for dtype in ("float32", "float64") if device.type != "mps" else ("float32",):
            rows += [{"clip_s": seconds, **_mel_row(stock, clip, dtype, size, device)} for size in options.batch_sizes]
            note(f"{seconds} s, {dtype}")
    return {"rows": rows, "machine": describe(device)}


def _mel_row(
    stock: ClapFeatureExtractor, clip: np.ndarray, dtype: str, batch: int, device: torch.device
) -> dict[str, Any]:
    ours, rate = RecapFeatureExtractor(compute_dtype=dtype), stock.sampling_rate
    sides: dict[str, Callable[[], Any]] = {
        "reference": lambda: stock(clip, sampling_rate=rate, return_tensors="pt"),
        "recap": lambda: ours([clip] * batch, sampling_rate=rate, return_tensors="pt", device=device),
    }
    features = {name: work()["input_features"][0, 0].cpu() for name, work in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(_MEL_PASSES):
        for name, work in sides.items():
            time.sleep(_THREADS_REST_S)
            seconds[name].append(seconds_of(work, device))
    reference, recap = (1e3 * statistics.median(seconds[name]) for name in sides)
    return {
        "dtype": dtype,
        "batch": batch,
        "reference_ms": reference,
        "recap_ms": recap / batch,
        "ratio": reference * batch / recap,
        "difference_db": f"{(features['recap'] - features['reference']).abs().max().item():.1e}",
    }


def run_costs(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """Milliseconds a clip of each stage while one thing grows and the others stay."""
    batch, dtype = max(options.batch_sizes), options.dtypes[0]
    options = replace(options, model=options.model or "default", clips=max(batch, *_COSTS["batch_size"]))
    base, rows = make_workload(options).in_dtype(dtype), []
    for what, values in _COSTS.items():
        for value in values:
            workload = _varied(base, what, value)
            stages = stages_of(workload, value if what == "batch_size" else batch)
            rows.append({"varied": what, "value": value, **stages, "total_ms": sum(stages.values())})
            note(f"{what} {value}: {rows[-1]['total_ms']:.1f} ms a clip")
    return {"rows": rows, "dtype": dtype, "machine": describe(base.device)}


def _varied(base: Workload, what: str, value: int) -> Workload:
    if what == "clip_seconds":
        return replace(base, waveforms=[np.resize(waveform, value * base.rate) for waveform in base.waveforms])
    if what == "num_beams":
        return replace(base, options=replace(base.options, num_beams=value))
    if what == "k":
        return replace(base, retrieval=CaptionOptions(k=value))
    if what == "datastore_size":
        processor = copy.copy(base.processor)
        processor.datastore = grown(base.processor.datastore, value, base.options.seed)
        return replace(base, processor=processor)
    return base


def run_steady(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """Clips of one second, block after block: speed, memory and Python objects after each block."""
    batch, generator = max(options.batch_sizes), np.random.default_rng(options.seed)
    few = replace(options, model=options.model or "default", clips=batch, new_tokens=0, audio=())
    workload = make_workload(few).in_dtype(options.dtypes[0])
    captioner, rows, done = workload.captioner(), [], 0
    deadline = time.perf_counter() + 60 * options.max_minutes
    while done < options.clips and time.perf_counter() < deadline:
        started, block = time.perf_counter(), 0
        while block < min(_STEADY_BLOCK, options.clips - done):
            # Made when they are needed: nothing but the captioner is to hold memory.
            captioner.caption([(0.1 * generator.standard_normal(workload.rate)).astype(np.float32)] * batch)
            block += batch
        done += block
        rate = block / (time.perf_counter() - started)
        rows.append({"clips": done, "clips_per_s": rate, "memory_mb": resident_mb(), "objects": len(gc.get_objects())})
        note(f"{done} clips: {rate:.1f} clips/s, {rows[-1]['memory_mb']:.0f} MB")
    # The first block warms up: allocators, kernels, tokenizers.
    settled = rows[1:] or rows
    growth = settled[-1]["memory_mb"] - settled[0]["memory_mb"]
    return {"rows": rows, "memory_growth_mb": growth, "machine": describe(workload.device)}


def run_startup(options: BenchmarkOptions, note: Note) -> dict[str, Any]:
    """Seconds from nothing to the first caption of the embedded default in fresh processes: each step, `recap
    caption` and `recap --help`. The fastest of three, after one that is not counted."""
    recording = options.audio[0] if options.audio else str(examples_path() / "sea.flac")
    commands = {
        "steps": [sys.executable, "-c", _STARTUP, recording],
        "recap caption": [sys.executable, "-m", "recap_cli", "caption", recording, "--device", "cpu"],
        "recap --help": [sys.executable, "-m", "recap_cli", "--help"],
    }
    runs: dict[str, list[tuple[float, str]]] = {name: [] for name in commands}
    for _ in range(4):
        for name, command in commands.items():
            runs[name].append(_run_once(command))
            note(f"{name}: {runs[name][-1][0]:.2f} s")
    fastest = {name: min(done[1:]) for name, done in runs.items()}
    marks = json.loads(fastest["steps"][1])
    rows = [{"step": name, "seconds": at - marks[i][1]} for i, (name, at) in enumerate(marks[1:])]
    rows += [{"step": name, "seconds": fastest[name][0]} for name in commands if name != "steps"]
    return {"rows": rows, "machine": describe(torch.device("cpu"))}


def _run_once(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - started, done.stdout
