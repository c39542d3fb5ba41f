"""A small run of the fuzzing command, and that it notices what it is there for."""

from __future__ import annotations

import json
import warnings

import pytest
from fuzzing_parts import Faulty

from benchmarks import fuzzing, fuzzing_mutants, fuzzing_worker
from recap_hf import load_audio

pytest.importorskip("av", reason='makes recordings of all formats: pip install "recap-hf[av]"')


def test_every_kind_of_finding_is_noticed(monkeypatch):
    monkeypatch.setattr(fuzzing_worker, "SECONDS", 2)
    worker = fuzzing_worker.Worker(Faulty)
    try:
        for name in ("fine", "crash", "hang", "traceback", "fine"):
            outcome = worker.try_one(name, "a.wav")[0]
            assert outcome == {"fine": "read"}.get(name, name)
        peak = worker._peak_gb()
        monkeypatch.setattr(fuzzing_worker, "GIGABYTES", peak + 0.2)
        assert worker.try_one("memory", "a.wav")[0] == "memory"
        assert worker.try_one("fine", "a.wav")[:2] == ("read", "a.wav")
    finally:
        worker.stop()


def test_a_small_run(model_folder, tmp_path, capsys):
    """Each number is a share of the command's in docs/reliability.md."""
    numbers = ["--audio", "60", "--checkpoints", "12", "--datastores", "12", "--agreement", "8"]
    report = tmp_path / "report.json"
    arguments = [*numbers, "--seconds", "0.5", "--model", model_folder, "--output", str(report)]
    assert fuzzing.main(arguments) == 0, capsys.readouterr().err
    contents = json.loads(report.read_text())
    assert contents["findings"] == []
    assert [row["mutants"] for row in contents["rows"]] == [60, 12, 12]
    for row in contents["rows"]:
        assert sum(row[name] for name in fuzzing.GOOD) == row["mutants"]
        assert row["refused"] > 0 and row["read"] > 0
    assert [row["captioned"] + row["refused"] for row in contents["agreement"]] == [8] * 5
    assert contents["agreement"][0]["captioned"] == 8
    assert "| recording | 60 |" in capsys.readouterr().out


def test_valid_recordings_are_read_whole(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in fuzzing_mutants.valid_recordings(tmp_path, 0.5, ("clock",)):
            waveform, rate = load_audio(path)
            assert waveform.shape[1] / rate == pytest.approx(0.5, abs=0.15), path.name
