"""The server's side of the worker: it starts the process, passes requests and answers, and starts it again."""

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from recap_hf.serving.worker import Job, Models, RequestError, work

# Seconds between two starts of a worker that ends before it is ready: doubled each time, up to the second.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


def worker_lost() -> RequestError:
    """What a request gets whose worker has ended."""
    return RequestError(503, "worker_lost", "The process of the model ended. It is started again: try again.")


class WorkerProcess:
    """A worker that is started again when it ends.

    Args:
        models ([`Models`]): what it loads.
        stalled_s (`float`): a worker that has requests and gives no answer for this time is killed.
        note (`Callable[[str], None]`): receives a message about each end and start.
    """

    def __init__(self, models: Models, stalled_s: float, note: Callable[[str], None]) -> None:
        self.models, self.stalled_s, self.note = models, stalled_s, note
        self.facts: dict[str, Any] = {}
        self.ready = False
        self.seconds_per_answer = 1.0
        self._numbers = itertools.count()
        self._waiting: dict[int, Future] = {}
        # What the worker has not answered yet, also to requests that have timed out.
        self._unanswered: set[int] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._process: Any = None
        self._connection: Any = None

    @property
    def waiting(self) -> int:
        """Requests without an answer."""
        return len(self._waiting)

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process and waits until the models are loaded. Raises `ValueError` if they cannot be."""
        reason = self._launch()
        if reason is not None:
            raise ValueError(reason)
        threading.Thread(target=self._supervise, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Ends the process."""
        self._stopped.set()
        self._process.terminate()
        self._process.join(5)

    def submit(self, kind: str, path: str | None, name: str, fields: dict[str, Any]) -> tuple[int, Future]:
        """Passes a request on; returns its number and the future answer. Raises [`RequestError`] 503 while there is no
        worker."""
        number, future = next(self._numbers), Future()
        with self._lock:
            if not self.ready:
                raise worker_lost()
            if not self._unanswered:
                self._answered = time.monotonic()
            self._unanswered.add(number)
            self._waiting[number] = future
            self._send(Job(number, kind, path, name, fields))
        return number, future

    def cancel(self, number: int) -> None:
        """Forgets a request; the worker leaves it out if it has not begun."""
        with self._lock:
            if self._waiting.pop(number, None) is not None:
                self._send(number)

    def _send(self, message: Any) -> None:
        # Of a process that has just ended the other thread tells.
        with suppress(OSError):
            self._connection.send(message)

    def _launch(self) -> str | None:
        """Starts a process; the reason why its models cannot be loaded, if so."""
        context = multiprocessing.get_context("spawn")
        try:
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(theirs, self.models), daemon=True)
            self._process.start()
            theirs.close()
        except OSError as error:
            return f"no process can be started: {error}"
        try:
            state, said = self._connection.recv()
        except (EOFError, OSError):
            return "the process of the model ended before the model was loaded"
        if state == "failed":
            return said
        self.facts = said
        self._answered = time.monotonic()
        self.ready = True
        return None

    def _supervise(self) -> None:
        """Passes answers on until the process ends, and starts another."""
        while True:
            with suppress(EOFError, OSError):
                while True:
                    self._answer(*self._connection.recv())
            with self._lock:
                self.ready = False
                lost, self._waiting = self._waiting, {}
                self._unanswered.clear()
            for future in lost.values():
                _settle(future, worker_lost())
            if self._stopped.is_set():
                return
            self._process.join()
            self.note(f"the process of the model ended ({self._process.exitcode}), requests lost: {len(lost)}")
            pause = _FIRST_PAUSE_S
            while (reason := self._launch()) is not None and not self._stopped.wait(pause):
                self.note(f"it could not be started again: {reason}")
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            if self._stopped.is_set():
                return
            self.note("it is back")

    def _answer(self, number: int, answer: Any) -> None:
        now = time.monotonic()
        with self._lock:
            future = self._waiting.pop(number, None)
            self._unanswered.discard(number)
            self.seconds_per_answer += 0.1 * (now - self._answered - self.seconds_per_answer)
            self._answered = now
        if future is not None:
            _settle(future, answer)

    def _watch(self) -> None:
        """Kills a process that no longer answers, such as one with a decoder that does not end."""
        while not self._stopped.wait(min(1.0, self.stalled_s / 4)):
            with self._lock:
                stalled = self.ready and self._unanswered and time.monotonic() - self._answered > self.stalled_s
            if stalled:
                self.note(f"no answer for {self.stalled_s:g} s: the process of the model is killed")
                self._process.kill()
                self._answered = time.monotonic()


def _settle(future: Future, answer: Any) -> None:
    # Its request may have timed out just now.
    with suppress(InvalidStateError):
        (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)
