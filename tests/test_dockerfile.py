"""The steps of the Dockerfile, run without Docker: in a fresh environment and a folder with what it copies."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
STEPS = [line.split(" ", 1) for line in TEXT.splitlines() if line and not line.startswith("#")]


def steps(kind):
    return [text for name, text in STEPS if name == kind]


def test_what_it_copies_is_there_and_is_what_the_package_needs():
    copied = {word for text in steps("COPY") for word in text.split()[:-1]}
    assert all((REPOSITORY / name).exists() for name in copied)
    roots = re.findall(r"^    recap_\S+ = (\w+)$", (REPOSITORY / "setup.cfg").read_text(), flags=re.MULTILINE)
    assert {*roots, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= copied


@pytest.mark.slow
def test_its_steps_make_a_service(tmp_path):
    """`useradd`, `USER` and ports are Docker's own; Python's version is that of the tests."""
    source, binaries = tmp_path / "src", tmp_path / "venv" / "bin"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(binaries.parent)], check=True)
    for text in steps("COPY"):
        *names, target = text.split()
        for name in names:
            if (REPOSITORY / name).is_dir():
                shutil.copytree(REPOSITORY / name, source / target)
            else:
                shutil.copy(REPOSITORY / name, source / target)
    # The index of this machine has a torch for CPUs, or may be the only one that it reaches.
    index = (
        os.environ.get("PIP_INDEX_URL")
        or subprocess.run(
            [binaries / "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    settings = dict(pair.split("=", 1) for text in steps("ENV") for pair in text.split())
    environment = {**os.environ, **settings, "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment["TORCH_INDEX"] = index or "https://pypi.org/simple"
    for command in steps("RUN"):
        if not command.startswith("useradd"):
            subprocess.run(command, shell=True, cwd=source, env=environment, check=True)
    [entry], [command] = ([json.loads(text) for text in steps(kind)] for kind in ("ENTRYPOINT", "CMD"))
    home = tmp_path / "home"
    home.mkdir()
    words = [*entry, *command, "--port", "8765"]
    process = subprocess.Popen([binaries / words[0], *words[1:]], cwd=home, env=environment)
    try:
        latest = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen("http://127.0.0.1:8765/health") as response:
                    assert json.load(response)["status"] == "ok"
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < latest
                time.sleep(0.5)
    finally:
        process.terminate()
        process.wait()
