"""The embedded default on real recordings: every dtype against the reference path, caption by caption."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from recap_hf.inference import prepare_for_cpu, prepare_for_gpu
from recap_hf.speed.machine import describe, timed
from recap_hf.speed.workload import BenchmarkOptions, Workload, make_workload
from recap_hf.tiny.naming import NamingRules


def run_default(options: BenchmarkOptions, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Captions of recordings by both paths, each ended by the model itself.

    Args:
        options ([`BenchmarkOptions`]): `audio` are the recordings; `batch_sizes` (the largest counts), `num_beams`
            and `dtypes` of our side.
        note (*optional*): called with what goes on.

    Returns:
        `dict`: for each dtype clips a second, `ratio`, and the shares of captions that are `identical` to the
        reference path's and that name the `same_events`.

    Raises:
        `ValueError`: without recordings.
    """
    if not options.audio:
        raise ValueError("Name recordings to caption: --audio FILE|FOLDER (a folder of one fold, say).")
    machine = describe(torch.device(options.device))
    workload = make_workload(replace(options, new_tokens=0))
    batch = max(options.batch_sizes)
    blocks = [workload.waveforms[start : start + batch] for start in range(0, len(workload.waveforms), batch)]
    reference = workload.reference()
    models = {dtype: _prepared(workload, dtype) for dtype in options.dtypes}
    reference.caption(blocks[0][0])
    for ours in models.values():
        ours.caption(blocks[0])
    expected: list[str] = []
    found: dict[str, list[str]] = {dtype: [] for dtype in models}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("reference", *models)}
    device = workload.model.device
    for block in blocks:
        # Block by block in turns: both sides see the same minutes of the machine.
        seconds["reference"].append(timed(lambda b=block: expected.extend(map(reference.caption, b)), device))
        for dtype, ours in models.items():
            captions = found[dtype]
            seconds[dtype].append(timed(lambda o=ours, b=block, c=captions: c.extend(o.caption(b)), device))
        note(f"{len(expected)} of {len(workload.waveforms)} clips")
    rows = [_row(dtype, batch, found[dtype], expected, seconds) for dtype in models]
    exact = [row for row in rows if row["dtype"] == "float32"]
    return {
        "clips": len(expected),
        "num_beams": options.num_beams,
        "identical_captions": exact[0]["identical"] == 1.0 if exact else None,
        "settings": rows,
        "machine": machine,
    }


def _prepared(workload: Workload, dtype: str) -> Workload:
    other = workload.with_model(workload.reference().model)
    if other.model.device.type == "cpu":
        prepare_for_cpu(other.model, dtype)
    else:
        other.model.to(getattr(torch, dtype))
        if other.model.device.type == "cuda":
            prepare_for_gpu(other.model)
    return other


def _row(
    dtype: str, batch: int, captions: list[str], expected: list[str], seconds: dict[str, list[tuple[float, float]]]
) -> dict[str, Any]:
    rules = NamingRules.ours()
    pairs = list(zip(captions, expected, strict=True))
    return {
        "dtype": dtype,
        "batch": batch,
        "reference": len(expected) / sum(wall for wall, _ in seconds["reference"]),
        "recap": len(expected) / sum(wall for wall, _ in seconds[dtype]),
        **{
            name: statistics.median(
                theirs[kind] / ours[kind] for theirs, ours in zip(seconds["reference"], seconds[dtype], strict=True)
            )
            for kind, name in enumerate(("ratio", "cpu_ratio"))
        },
        "identical": sum(ours == theirs for ours, theirs in pairs) / len(pairs),
        "same_events": sum(rules.named(ours) == rules.named(theirs) for ours, theirs in pairs) / len(pairs),
    }
