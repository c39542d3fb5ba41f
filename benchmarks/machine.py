"""What a measurement ran on, the time and memory that it took, and its rows as a table."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, the device's part included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and seconds of processor time of all threads, which a busy machine changes less."""
    cpu = time.process_time()
    return seconds_of(work, device), time.process_time() - cpu


def describe(device: torch.device) -> dict[str, Any]:
    """Name, cores, threads and versions, for a report."""
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    """Lines of a file of the kernel; none where the system is another."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def peak_memory_gb(device: torch.device) -> float:
    """The highest memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_mb() -> float:
    """The memory that this process has now; its highest so far where the system does not tell."""
    for line in _lines("/proc/self/statm"):
        return int(line.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 1e3 * peak_memory_gb(torch.device("cpu"))


def format_rows(rows: Sequence[dict[str, Any]], title: str = "") -> str:
    """Rows as a table, a column for each key; `_ms` at the end of a key is left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    heads = [name.removesuffix("_ms") for name in names]
    widths = [max(len(text) for text in column) + 2 for column in zip(heads, *cells, strict=True)]
    lines = ["".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in [heads, *cells]]
    return "\n".join([title, *lines] if title else lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)
