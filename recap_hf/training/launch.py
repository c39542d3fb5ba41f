"""Starting a run: in this process, or in as many processes as were asked for."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .options import RunConfig

logger = logging.getLogger(__name__)

_PARENT = "RECAP_TRAINING_PARENT"


def launch(config: RunConfig, train: Callable[[Any], Any], command: Sequence[str] = ("train",)) -> int:
    """Run a training as configured; the exit status.

    Args:
        config: the settings.
        train: what trains with them.
        command: the sub-command of `recap` that does the same, for the processes that are started.

    Raises:
        RuntimeError: where another number of processes runs than `--num-processes` says.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        return _start_processes(config, command)
    if config.num_processes and world != config.num_processes:
        raise RuntimeError(
            f"--num-processes {config.num_processes}, but this was launched as {world} (WORLD_SIZE): "
            "leave one of the two away"
        )
    follow_parent()
    train(config)
    return 0


def _start_processes(config: RunConfig, command: Sequence[str]) -> int:
    """Start the processes on this machine, wait for all, end the others when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "config.json"
        recipe.write_text(json.dumps(asdict(config)), encoding="utf-8")
        arguments = [*command, "--config", str(recipe)]
        return run_processes(config.num_processes, arguments, config.device == "cpu", config.num_threads)


def run_processes(
    count: int, command: Sequence[str], on_cpu: bool = False, num_threads: int = 0, stdout: int | None = None
) -> int:
    """Run a sub-command of `recap` in several processes of one group on this machine; the exit status.

    The others end when one fails, and all of them with this process where they call [`follow_parent`].

    Args:
        count: how many, with the environment that `torchrun` gives.
        command: the sub-command with its arguments.
        on_cpu: none of them may use a GPU; without one none does.
        num_threads: of each; 0: the cores of the machine shared out, one with GPUs.
        stdout: of each, as `subprocess.Popen` takes it; None: that of this process.

    Raises:
        RuntimeError: there are GPUs, but fewer than processes.
    """
    import torch

    devices = torch.cuda.device_count()
    on_cpu = on_cpu or not devices
    if not on_cpu and devices < count:
        raise RuntimeError(
            f"--num-processes {count}, but there are {devices} GPUs: ask for {devices}, or give --device cpu"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = num_threads or (max(1, (os.cpu_count() or 1) // count) if on_cpu else 1)
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
            _PARENT: str(os.getpid()),
        }
        if on_cpu:
            environment["ACCELERATE_USE_CPU"] = "true"
        arguments = [sys.executable, "-m", "recap_cli", *command]
        processes.append(subprocess.Popen(arguments, env=environment, stdout=stdout))
    return _wait(processes)


def _wait(processes: list[subprocess.Popen]) -> int:
    try:
        while any(process.poll() is None for process in processes):
            failed = [process.returncode for process in processes if process.poll() not in (None, 0)]
            if failed:
                return 1
            time.sleep(0.2)
        return max(abs(process.returncode) for process in processes) and 1
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def follow_parent() -> None:
    """End with the process that started this one: an orphan would go on writing into the run's folder."""
    parent = os.environ.get(_PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
