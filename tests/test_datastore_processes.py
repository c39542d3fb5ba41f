"""Worker processes: what they return, and that none outlives a parent that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks at processes as Linux shows them")

_PARENT = """
import sys
sys.path.insert(0, {tests!r})
from test_datastore_processes import count_and_note
from recap_hf.datastore.processes import process_pool
if __name__ == "__main__":
    with process_pool(2) as pool:
        list(pool.map(count_and_note, [{folder!r}] * 2))
"""


def count_and_note(folder):
    """Busy for longer than any test, as one that builds an index is."""
    Path(folder, str(os.getpid())).touch()
    end = time.monotonic() + 600
    while time.monotonic() < end:
        sum(range(10_000))


def is_alive(pid: int) -> bool:
    """A process that has ended and was not asked about yet does nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    noted = tmp_path / "pids"
    noted.mkdir()
    script.write_text(_PARENT.format(tests=str(Path(__file__).parent), folder=str(noted)))
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        assert wait_for(lambda: len(list(noted.iterdir())) == 2, 120)
        workers = [int(path.name) for path in noted.iterdir()]
        assert all(map(is_alive, workers))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_for(lambda: not any(map(is_alive, workers)), 20), "workers go on without their parent"
    finally:
        parent.kill()
