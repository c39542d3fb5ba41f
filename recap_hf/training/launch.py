"""How the commands start a run: in this process, or in several processes on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys

from .config import TrainingConfig


def launch(config: TrainingConfig) -> int:
    """Run a training as the main program of a process; returns the exit status.

    Threads, log and environment of the process are set for the run.

    Raises:
        RuntimeError: if the number of processes is not that of `--num-processes`, or there are too few GPUs.
    """
    if config.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        return _start_processes(config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.num_processes and world != config.num_processes:
        raise RuntimeError(
            f"--num-processes {config.num_processes}, but this was launched as {world} (WORLD_SIZE): give one of both"
        )
    import torch

    from .run import train

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    _log_to_stderr(int(os.environ.get("RANK", "0")) == 0)
    # Workers of the data loader are forked; a tokenizer's threads do not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(config)
    return 0


def _log_to_stderr(is_main: bool) -> None:
    """Log lines of the main process, errors of the others."""
    import datasets
    import transformers

    log = logging.getLogger("recap_hf")
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    if not is_main or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _start_processes(config: TrainingConfig) -> int:
    """Start the processes and wait for them; when one fails, the others are ended, and with this one all of them."""
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException

    count, devices = config.num_processes, torch.cuda.device_count()
    on_cpu = config.device == "cpu" or not devices
    if not on_cpu and devices < count:
        raise RuntimeError(
            f"--num-processes {count}, but there are {devices} GPUs: ask for {devices}, or give --device cpu"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    threads = config.num_threads or (max(1, (os.cpu_count() or 1) // count) if on_cpu else 1)
    try:
        torch.multiprocessing.spawn(_process, (config, environment, threads), nprocs=count)
    except ProcessExitedException:
        return 1
    return 0


def _process(rank: int, config: TrainingConfig, environment: dict[str, object], threads: int) -> None:
    import torch

    os.environ |= {name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()}
    torch.set_num_threads(threads)
    try:
        status = launch(config)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
