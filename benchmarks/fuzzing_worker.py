"""A process that files are tried in, one after the other, and what becomes of it: crash, hang, memory."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
import traceback
from pathlib import Path
from typing import Any

# Of processor time; by the clock three times as many, for a busy machine.
SECONDS, GIGABYTES = 10, 3


def serve(connection: Any, trials: Any, arguments: tuple[Any, ...]) -> None:
    """Takes pairs of a method's name and a path, and sends its outcome and the reason."""
    # What libraries in C print.
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    trials = trials(*arguments)
    connection.send(("ready", ""))
    while True:
        name, path = connection.recv()
        try:
            outcome = getattr(trials, name)(path)
        except Exception:
            outcome = ("traceback", traceback.format_exc())
        connection.send(outcome)


class Worker:
    """A process for many files, started again when it died or was ended.

    Args:
        trials: a class whose methods take a path and return an outcome and the reason.
        arguments: of the class.
    """

    def __init__(self, trials: Any, *arguments: Any) -> None:
        self.trials, self.arguments, self.process = trials, arguments, None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, self.trials, self.arguments), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def try_one(self, name: str, path: Path) -> tuple[str, str, float]:
        """The outcome of a file, its reason, and the seconds of processor time that it took."""
        if self.process is None:
            self._start()
        started, used = time.monotonic(), self._processor_s()
        self.connection.send((name, str(path)))
        outcome = None
        while outcome is None:
            seconds, waited = self._processor_s() - used, time.monotonic() - started
            if self.connection.poll(0.1):
                try:
                    outcome = self.connection.recv()
                except EOFError:
                    self.process.join()
                    outcome = ("crash", f"exit code {self.process.exitcode}")
            elif seconds > SECONDS or waited > 3 * SECONDS:
                outcome = ("hang", f"{seconds:.1f} s of the processor in {waited:.1f} s")
            peak = self._peak_gb()
            if peak > GIGABYTES:
                outcome = ("memory", f"{peak:.1f} GB")
        seconds = self._processor_s() - used
        if outcome[0] in ("crash", "hang", "memory"):
            self.stop()
        return *outcome, seconds

    def _processor_s(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        # User and system time.
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _peak_gb(self) -> float:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return 0.0
        found = re.search(r"VmHWM:\s+(\d+)", status)
        return int(found[1]) * 1024 / 1e9 if found else 0.0
