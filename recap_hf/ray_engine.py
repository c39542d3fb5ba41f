"""Work in parts on the processes of Ray, on one machine or a cluster: `recap caption --engine ray`,
`recap datastore build --engine ray`.

A part may be done twice: its whole result is there, or none of it. When a process dies, Ray starts another, which does
its part again. When the run is interrupted, the next run does the parts that are left. On several machines the work
folder must be on a file system that all of them share.
"""

import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recap_hf.modeling.captioning_recap import Captioner, CaptionResult
from recap_hf.recordings import reason_of
from recap_hf.streaming import recordings_together

LOG_NAME = "workers.log"
Note = Callable[[str], None]


def run_parts(
    make_worker: Callable[[], Callable[[Any], None]],
    parts: Sequence[Any],
    work: Path,
    num_workers: int = 2,
    address: str | None = None,
    note: Note = lambda message: None,
) -> Iterator[int]:
    """Does every part in a process of Ray and yields its index when it is done, in any order.

    Args:
        make_worker: called once in each process; returns the function that does a part. Must be picklable.
        parts: arguments of that function.
        work: folder of the log: time, host, process and part, one line when a part begins.
        num_workers: number of processes. Those on this machine share its cores.
        address: of a Ray cluster; "auto" is the cluster of this machine, and by default Ray starts here.
        note: receives a message about parts that were begun again because a process died.

    Raises:
        ImportError: without Ray.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("The engine 'ray' needs Ray: pip install recap-hf[ray]") from error
    work.mkdir(parents=True, exist_ok=True)
    log = (work / LOG_NAME).resolve()
    log.unlink(missing_ok=True)
    started = not ray.is_initialized()
    if started:
        # Here, one process of Ray for each worker, also on a machine with fewer cores.
        here = {"include_dashboard": False, "num_cpus": num_workers} if address is None else {}
        ray.init(address=address, logging_level="warning", **here)
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    try:
        numbers = ray.data.from_items([{"part": n} for n in range(len(parts))], override_num_blocks=len(parts))
        done = numbers.map_batches(
            _Worker,
            fn_constructor_args=(make_worker, list(parts), str(log)),
            batch_size=1,
            num_cpus=1,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, max(len(parts), 1))),
        )
        # Of this data set alone: other code of the process may use Ray, too.
        done.context.enable_progress_bars = done.context.print_on_execution_start = False
        for row in done.iter_rows():
            yield int(row["part"])
    finally:
        if started:
            ray.shutdown()
    for part, tries in sorted(begun(log).items()):
        if tries > 1:
            note(f"Part {part} was begun {tries} times, because a process died (see {log})")


def begun(log: Path) -> Counter[int]:
    """The number of times that each part was begun."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return Counter(int(line.split("\t")[3]) for line in lines)


class _Worker:
    """A process of Ray."""

    def __init__(self, make_worker: Callable[[], Any], parts: list[Any], log: str) -> None:
        self.parts, self.log = parts, log
        self.work = make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part in batch["part"]:
            # Appended in one write: the lines of several processes do not mix.
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')}\t{socket.gethostname()}\t{os.getpid()}\t{part}\n")
            self.work(self.parts[part])
        return batch


@dataclass(frozen=True)
class RayOptions:
    """How Ray captions recordings.

    Args:
        num_workers: number of processes.
        address: of a Ray cluster; "auto" is the cluster of this machine, and by default Ray starts here.
        batch_size: recordings that are encoded together.
        part_size: recordings of a part, rounded up to whole batches.
    """

    num_workers: int = 2
    address: str | None = None
    batch_size: int = 8
    part_size: int = 64


def caption_files_with_ray(
    make_captioner: Callable[[], Captioner],
    names: Sequence[str],
    work: Path,
    settings: Mapping[str, Any],
    options: RayOptions | None = None,
    note: Note = lambda message: None,
) -> Iterator[tuple[str, CaptionResult | Exception]]:
    """Captions paths and URLs in order, as `Captioner.caption_stream` does.

    Args:
        make_captioner: called once in each process of Ray. Must be picklable.
        names: paths and URLs.
        work: folder of the finished parts, deleted at the end.
        settings: what the captions depend on, as JSON: a run with other settings starts over.
        options: number of processes, sizes.
        note: receives messages about the progress.

    Raises:
        ImportError: without Ray.
        ValueError: the work folder holds other files.
    """
    # The recordings of an encoder batch are the same as without Ray.
    options = options or RayOptions()
    together = recordings_together(options.batch_size)
    size = -(-options.part_size // together) * together
    parts = [(start // size, list(names[start : start + size])) for start in range(0, len(names), size)]
    sizes = {"batch_size": options.batch_size, "part_size": size}
    resume(work, {**settings, **sizes, "recordings": _recordings(names)}, note)
    left = [part for part in parts if not _part_path(work, part[0]).is_file()]
    if len(left) < len(parts):
        note(f"Resuming an interrupted run: {len(parts) - len(left)} of {len(parts)} parts are done")
    if left:
        # Ray's processes have another working directory.
        left = [(n, [name if "://" in name else os.path.abspath(name) for name in part]) for n, part in left]
        make = partial(_make_caption_worker, make_captioner, work, options.batch_size)
        for done, _ in enumerate(run_parts(make, left, work, options.num_workers, options.address, note), 1):
            note(f"Captioned {len(parts) - len(left) + done} of {len(parts)} parts")
    for number, part in parts:
        with open(_part_path(work, number), encoding="utf-8") as file:
            for name, line in zip(part, file, strict=True):
                row = json.loads(line)
                yield name, ValueError(row["error"]) if "error" in row else CaptionResult(**row)
    _clear(work)
    with suppress(OSError):
        # It holds files of others.
        work.rmdir()


def _make_caption_worker(
    make_captioner: Callable[[], Captioner], work: Path, batch_size: int
) -> Callable[[tuple[int, list[str]]], None]:
    captioner = make_captioner()

    def caption(part: tuple[int, list[str]]) -> None:
        target = _part_path(work, part[0])
        temporary = target.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            for name, result in captioner.caption_stream(part[1], batch_size):
                row = {"error": reason_of(name, result)} if isinstance(result, Exception) else result.to_dict()
                file.write(json.dumps(row) + "\n")
        os.replace(temporary, target)

    return caption


def _part_path(work: Path, number: int) -> Path:
    return work / f"part-{number:06d}.jsonl"


def _recordings(names: Sequence[str]) -> str:
    """The number of recordings and a hash of their names, sizes and times."""
    files = [(name, os.path.getsize(name), os.path.getmtime(name)) if os.path.isfile(name) else name for name in names]
    return f"{len(names)} ({hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]})"


def _clear(work: Path) -> None:
    """Deletes what this module wrote into a folder."""
    for path in (*work.glob("part-*"), work / LOG_NAME, work / "plan.json"):
        path.unlink(missing_ok=True)


def resume(work: Path, settings: dict[str, Any], note: Note) -> None:
    """Prepares a work folder. The parts of a run with the same settings stay, those of another run are deleted, and
    `note` receives the settings that differ. Raises `ValueError` if the folder has other files."""
    plan = work / "plan.json"
    if plan.is_file():
        try:
            earlier = dict(json.loads(plan.read_text(encoding="utf-8"))["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{plan} is not of an earlier run: give another --work-dir") from error
        names = [name for name in {**settings, **earlier} if settings.get(name) != earlier.get(name)]
        if not names:
            return
        changes = (f"{n} was {earlier.get(n, 'the default')}, is {settings.get(n, 'the default')}" for n in names)
        note(f"Starting over: {work} holds a run with other settings ({'; '.join(changes)})")
        _clear(work)
    elif work.is_dir() and any(work.iterdir()):
        raise ValueError(f"{work} is not empty and not of an earlier run: give another --work-dir")
    work.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps({"settings": settings}), encoding="utf-8")
