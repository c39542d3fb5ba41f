"""Bad input to any command, `recap` or `python -m`, is told in a line, never by a traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from recap_cli.status import exit_status

PROJECT = Path(__file__).resolve().parents[1]
BAD_CALLS = {
    "recap_hf.datastore.benchmark": ["/no/such.txt", "--work", "work"],
    "recap_hf.datastore.diversity": ["--sounds", "/no/such"],
    "recap_hf.evaluation.stand_ins": ["/no/such", "out"],
}


def test_every_module_that_runs_is_called_here():
    runs = {
        ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        for path in (PROJECT / "recap_hf").rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert runs - {"recap_cli.__main__"} == BAD_CALLS.keys()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", BAD_CALLS)
def test_bad_input_is_told_in_a_line(module, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *BAD_CALLS[module]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "error: " in error and "/no/such" in error and "Traceback" not in error


def test_statuses(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def wrong():
        raise ValueError("3 is no share")

    def broken():
        raise AssertionError

    assert exit_status("recap x", lambda: None) == 0
    assert exit_status("recap x", lambda: 2) == 2
    assert exit_status("recap x", interrupted) == 130
    assert exit_status("recap x", wrong) == 1
    assert capsys.readouterr().err == "recap x: interrupted\nrecap x: error: 3 is no share\n"
    # What can only be a mistake of ours keeps its traceback.
    with pytest.raises(AssertionError):
        exit_status("recap x", broken)
