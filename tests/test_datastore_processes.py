"""No process that embeds outlives a build that is killed."""

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
from functools import partial
from datastore_parts import WordEmbedder
from test_datastore_processes import BusyEmbedder
from recap_hf.datastore import BuildOptions, build_datastore
if __name__ == "__main__":
    embedder = WordEmbedder()
    embedder.recipe = partial(BusyEmbedder, {notes!r})
    build_datastore([{captions!r}], {store!r}, embedder, options=BuildOptions(processes=2, chunk_captions=5))
"""


class BusyEmbedder:
    """Embeds for longer than any test, and notes in which process."""

    def __init__(self, folder, number):
        self.folder = folder

    def embed(self, captions):
        Path(self.folder, str(os.getpid())).touch()
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
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"sound {number}\n" for number in range(10)))
    places = {"notes": str(noted), "captions": str(captions), "store": str(tmp_path / "store")}
    script.write_text(_PARENT.format(tests=str(Path(__file__).parent), **places))
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
