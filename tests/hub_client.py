"""Runs code in a fresh process whose `huggingface_hub` talks to the test Hub: it reads its settings when imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import WITHOUT_PACKAGE
from hub_server import HubServer

# A process in which the package cannot be imported, as on a machine where it is not installed.
PREAMBLE = """
import json, os, sys
def answer(value):
    print("ANSWER " + json.dumps(value))
def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
"""


class Client:
    """Runs Python code against a Hub.

    Args:
        hub: the Hub.
        home: the client's `HF_HOME`: its cache, its stored token.
    """

    def __init__(self, hub: HubServer, home: Path):
        self.hub, self.home = hub, home

    def run(self, code: str, *args: object, token: str | None = "hf_owner", package: bool = True, **variables: str):
        """Runs `code` with `args` as `sys.argv[1:]` and returns what it passed to `answer`."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= self.hub.environment(self.home, token) | {"OMP_NUM_THREADS": "1"} | variables
        script = ("" if package else WITHOUT_PACKAGE) + PREAMBLE + code
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            env=environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        return json.loads(answers[-1])
