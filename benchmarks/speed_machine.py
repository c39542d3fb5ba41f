"""What the machine can do: its name, its memory bandwidth, its matrix products, and what a process takes of it."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Larger than most caches; repeated, the fastest pass counts.
_BANDWIDTH_MB = 256
_MATMUL_SIDE = 1024


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that the clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, the device's part included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of processor time over all threads: what is left to compare on a busy machine."""
    cpu = time.process_time()
    return seconds_of(work, device), time.process_time() - cpu


def bandwidth(device: torch.device, passes: int = 8) -> float:
    """Bytes read in a second, by summing a tensor that no cache holds."""
    block = torch.ones(_BANDWIDTH_MB * 2**20 // 4, device=device)
    block.sum()
    return _BANDWIDTH_MB * 2**20 / min(seconds_of(block.sum, device) for _ in range(passes))


def matmul_rate(device: torch.device, dtype: torch.dtype, passes: int = 8) -> float:
    """Floating-point operations in a second, by square matrix products."""
    side = _MATMUL_SIDE if device.type == "cpu" else 8 * _MATMUL_SIDE
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * side**3 / min(seconds_of(lambda: left @ right, device) for _ in range(passes))


def machine_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Name, cores, threads and versions, for a report."""
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the highest memory so far, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Not Linux, or not allowed: the peak is then that of the whole run.
        return


def peak_memory_gb(device: torch.device) -> float:
    """The highest memory since the last reset: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
