"""What no file may do to the package, in a module that a process imports in no time."""

from __future__ import annotations

import os
import signal
import time


class Faulty:
    def crash(self, path):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self, path):
        time.sleep(60)

    def memory(self, path):
        self.held = bytearray(os.urandom(1 << 20) * 300)
        return "read", ""

    def traceback(self, path):
        raise KeyError(path)

    def fine(self, path):
        return "read", path
