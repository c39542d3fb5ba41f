"""Work in parts on the processes of Ray, on one machine or a cluster: `recap caption --engine ray`,
`recap datastore build --engine ray`.

Every part is done by one process and leaves its whole result or none: doing it twice changes nothing. When a process
dies, Ray starts another, which does its part again; when the run itself is cut off, the next one does what is left. On
several machines the folder of the work must be one that all of them see.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recap_hf.modeling.captioning_recap import CaptionResult, recordings_together
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.recordings import reason_of

LOG_NAME = "workers.log"
_PLAN_NAME = "plan.json"
Note = Callable[[str], None]


def run_parts(
    make_worker: Callable[[], Callable[[Any], None]],
    parts: Sequence[Any],
    work: Path,
    num_workers: int = 2,
    address: str | None = None,
    note: Note = lambda message: None,
) -> Iterator[int]:
    """Does every part in one of Ray's processes and yields its number when it is done, in any order.

    Args:
        make_worker: makes, once in each process, what does a part; must be picklable.
        parts: what it is called with.
        work: folder for the log of the processes: a line with time, host, process and part whenever one is begun.
        num_workers: processes.
        address: of a Ray cluster, "auto" for the one that this machine belongs to; by default Ray starts here.
        note: is told of parts that were done again because a process was lost.

    Raises:
        ImportError: without Ray.
    """
    ray = _ray()
    work.mkdir(parents=True, exist_ok=True)
    log = (work / LOG_NAME).resolve()
    log.unlink(missing_ok=True)
    started = not ray.is_initialized()
    if started:
        own = {"include_dashboard": False} if address is None else {}
        # A worker each, whatever the machine has: on a small one they share its cores.
        own |= {"num_cpus": num_workers} if address is None else {}
        ray.init(address=address, logging_level="warning", **own)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        numbers = ray.data.from_items([{"part": n} for n in range(len(parts))], override_num_blocks=len(parts))
        done = numbers.map_batches(
            _Worker,
            fn_constructor_args=(make_worker, list(parts), str(log), num_workers),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, max(len(parts), 1))),
        )
        for row in done.iter_rows():
            yield int(row["part"])
    finally:
        if started:
            ray.shutdown()
    for part, tries in sorted(begun(log).items()):
        if tries > 1:
            note(f"Part {part} was begun {tries} times: a process was lost on the way (see {log})")


def _ray() -> Any:
    # Nothing is reported to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On a busy machine its server takes longer to start than it waits by default.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("The engine 'ray' needs Ray: pip install recap-hf[ray]") from error
    return ray


def begun(log: Path) -> Counter[int]:
    """How often each part was begun."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return Counter(int(line.split("\t")[3]) for line in lines)


class _Worker:
    """One of Ray's processes."""

    def __init__(self, make_worker: Callable[[], Any], parts: list[Any], log: str, num_workers: int) -> None:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
        self.parts = parts
        self.log = log
        self.work = make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part in batch["part"]:
            line = f"{time.strftime('%H:%M:%S')}\t{socket.gethostname()}\t{os.getpid()}\t{part}\n"
            # Appended in one write: the lines of several processes do not mix.
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(line)
            self.work(self.parts[part])
        return batch


# ---------------------------------------------------------------- captioning


class CaptionWorker:
    """Makes what captions the recordings of a part into a file of its own.

    Args:
        options: of `recap caption`.
        work: folder of the files.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work

    def __call__(self) -> Callable[[tuple[int, list[str]]], None]:
        from recap_cli.options import load_captioner

        captioner = load_captioner(self.options)

        def caption(part: tuple[int, list[str]]) -> None:
            number, names = part
            target = part_path(self.work, number)
            temporary = target.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                for name, result in captioner.caption_stream(names, self.options.batch_size):
                    failed = isinstance(result, Exception)
                    row = {"error": reason_of(name, result)} if failed else result.to_dict()
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            os.replace(temporary, target)

        return caption


def part_path(work: Path, number: int) -> Path:
    """The file of a part's captions."""
    return work / f"part-{number:06d}.jsonl"


def caption_files_with_ray(
    options: argparse.Namespace, names: Sequence[str], note: Note
) -> Iterator[tuple[str, CaptionResult | Exception]]:
    """Captions recordings in order, as `Captioner.caption_stream` does.

    Args:
        options: of `recap caption`: those of the captioner, `batch_size`, `num_workers`, `ray_address`, `work_dir`
            (by default beside `output`) and `part_size`, recordings a part.
        names: paths and URLs.
        note: is told what happens.

    Raises:
        ValueError: for standard input, which other processes cannot read, or without a folder for the work.
    """
    if "-" in names:
        raise ValueError("standard input cannot be read by other processes: give files, or leave --engine ray out")
    if not (options.work_dir or options.output):
        raise ValueError("--engine ray needs --output FILE, or --work-dir DIR for what is done so far")
    work = Path(options.work_dir or f"{options.output}.parts").resolve()
    # Recordings stand together as they would without Ray.
    together = recordings_together(options.batch_size)
    size = -(-options.part_size // together) * together
    parts = [(start // size, list(names[start : start + size])) for start in range(0, len(names), size)]
    take_up(work, _caption_key(options, names, size), note)
    left = [part for part in parts if not part_path(work, part[0]).is_file()]
    if len(left) < len(parts):
        note(f"Taking up a run that was cut off: {len(parts) - len(left)} of {len(parts)} parts are there")
    if left:
        # Relative names are those of this process.
        left = [(number, [_absolute(name) for name in part]) for number, part in left]
        make = CaptionWorker(options, work)
        for done, _ in enumerate(run_parts(make, left, work, options.num_workers, options.ray_address, note), 1):
            note(f"Captioned {len(parts) - len(left) + done} of {len(parts)} parts")
    for number, part in parts:
        with open(part_path(work, number), encoding="utf-8") as file:
            for name, line in zip(part, file, strict=True):
                row = json.loads(line)
                yield name, ValueError(row["error"]) if "error" in row else CaptionResult(**row)
    shutil.rmtree(work)


def _absolute(name: str) -> str:
    return name if "://" in name else str(Path(name).absolute())


# What the captions depend on.
_CAPTION_SETTINGS = ("model", "datastore", *CaptionOptions.names(), "batch_size", "dtype")


def _caption_key(options: argparse.Namespace, names: Sequence[str], size: int) -> str:
    state = [(name, *_state(name)) for name in names]
    settings = json.dumps([{key: getattr(options, key, None) for key in _CAPTION_SETTINGS}, size, state], default=str)
    return hashlib.sha256(settings.encode()).hexdigest()


def _state(name: str) -> tuple[int, int]:
    try:
        found = os.stat(name)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def take_up(work: Path, key: str, note: Note) -> None:
    """Makes the folder of the work; what another command left in it is deleted."""
    plan = work / _PLAN_NAME
    if plan.is_file() and json.loads(plan.read_text(encoding="utf-8"))["key"] == key:
        return
    if work.is_dir() and any(work.iterdir()):
        if not plan.is_file():
            raise ValueError(f"{work} is not empty and not of an earlier run: give another --work-dir")
        note(f"{work} is of another command, and begun anew")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps({"key": key}), encoding="utf-8")


__all__ = ["LOG_NAME", "begun", "caption_files_with_ray", "run_parts", "take_up"]
