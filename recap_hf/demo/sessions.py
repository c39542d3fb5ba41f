"""What the page remembers of a visitor, in memory only and not for long."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .recordings import Recording


@dataclass
class Session:
    """One visitor.

    Attributes:
        recording: the recording on the page.
        choice: name of the captions to retrieve from.
        own: the visitor's own captions as a datastore.
        captions: what the recording was captioned with each choice of captions, in the order of the choices.
        last_used: on the store's clock.
    """

    recording: Recording | None = None
    choice: str | None = None
    own: Any = None
    captions: dict[str, str] = field(default_factory=dict)
    last_used: float = 0.0


class Sessions:
    """Sessions by their key; those not used for `keep_seconds`, and the oldest of too many, are dropped.

    Args:
        keep_seconds: how long an idle session is remembered.
        capacity: most sessions; each holds at most one recording.
        clock: seconds, for tests.
    """

    def __init__(self, keep_seconds: float, capacity: int = 100, clock: Callable[[], float] = time.monotonic) -> None:
        self.keep_seconds = keep_seconds
        self.capacity = capacity
        self.clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, key: str) -> Session:
        """The session of `key`, a new one if there is none."""
        self.sweep()
        with self._lock:
            session = self._sessions.setdefault(key, Session())
            session.last_used = self.clock()
            self._sessions.move_to_end(key)
            while len(self._sessions) > self.capacity:
                self._sessions.popitem(last=False)
            return session

    def forget(self, key: str) -> None:
        """Drops the session of `key`, if there is one."""
        with self._lock:
            self._sessions.pop(key, None)

    def sweep(self) -> None:
        """Drops what has not been used for `keep_seconds`."""
        with self._lock:
            latest = self.clock() - self.keep_seconds
            for key in [key for key, session in self._sessions.items() if session.last_used < latest]:
                del self._sessions[key]

    def sweep_regularly(self, stop: threading.Event) -> None:
        """Sweeps in the background until `stop` is set, so that nothing waits for the next visitor."""

        def run() -> None:
            while not stop.wait(min(60.0, self.keep_seconds / 2)):
                self.sweep()

        threading.Thread(target=run, name="recap-demo-sweeper", daemon=True).start()
