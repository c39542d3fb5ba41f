"""Time and memory, as benchmarks of datastores state them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def single_query_ms(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of one query at a time, in milliseconds."""
    times = []
    for query in queries:
        started = time.perf_counter()
        search(query[None])
        times.append(1000 * (time.perf_counter() - started))
    return {"median": round(float(np.median(times)), 3), "p95": round(float(np.percentile(times, 95)), 3)}


def resident_mb() -> dict[str, float]:
    """Memory of this process: `anonymous` is its own, `file` is mapped and may be dropped by the system (Linux)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = {"total": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: round(int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024) for name, key in fields.items()}


__all__ = ["resident_mb", "single_query_ms"]
