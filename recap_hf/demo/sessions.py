"""What the page remembers of its visitors: in memory, for a limited time."""

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
        captions: the caption of the recording for each choice, in the order of the choices.
        last_used: time in seconds.
    """

    recording: Recording | None = None
    choice: str | None = None
    own: Any = None
    captions: dict[str, str] = field(default_factory=dict)
    last_used: float = 0.0


class Sessions:
    """Sessions by key. Those not used for `keep_seconds` are deleted, and the oldest above `capacity`."""

    def __init__(self, keep_seconds: float, capacity: int = 100, clock: Callable[[], float] = time.monotonic) -> None:
        self.keep_seconds, self.capacity, self.clock = keep_seconds, capacity, clock
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
        """Deletes the session of `key`, if there is one."""
        with self._lock:
            self._sessions.pop(key, None)

    def sweep(self) -> None:
        """Deletes the sessions that were not used for `keep_seconds`."""
        with self._lock:
            latest = self.clock() - self.keep_seconds
            for key in [key for key, session in self._sessions.items() if session.last_used < latest]:
                del self._sessions[key]

    def sweep_until(self, stop: threading.Event) -> None:
        """Sweeps regularly until `stop` is set: without visitors, too, nothing is kept for longer."""
        while not stop.wait(min(60.0, self.keep_seconds / 2)):
            self.sweep()
