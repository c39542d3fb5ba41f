"""Exit statuses of commands; errors are one line and not a traceback."""

from __future__ import annotations

import warnings

import pytest

from recap_cli.status import exit_status


def test_a_warning_is_one_line(capsys):
    def warned():
        warnings.warn("a.wav\n\x1b[2J is cut off", stacklevel=1)

    before = warnings.showwarning
    assert exit_status("recap x", warned) == 0
    assert capsys.readouterr().err == "recap x: warning: a.wav\\x0a\\x1b[2J is cut off\n"
    assert warnings.showwarning is before


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
