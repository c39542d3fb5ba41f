"""The benchmark of archives runs, and its figures are right by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from benchmarks import archive
from benchmarks.timeline_recordings import PlacedEvent
from recap_hf.archive.duplicates import correlation
from recap_hf.modeling.audio_recap import resample


def test_figures_by_hand(tmp_path):
    assert archive.average_precision([True, False, True, False]) == pytest.approx((1 + 2 / 3) / 2)
    assert archive.query_of("acoustic_guitar") == "an acoustic guitar"
    assert archive.query_of("church_bells") == "church bells ringing"
    rng = np.random.default_rng(0)
    waveform = (rng.standard_normal(16_000) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", waveform, 8_000)
    for kind in ("gain", "mp3", "vorbis", "opus", "cut", "resampled"):
        copy, rate = soundfile.read(archive.planted(tmp_path / "a.wav", tmp_path / kind, kind, rng))
        similarity, _ = correlation(waveform, resample(copy.astype(np.float32), rate, 8_000))
        assert similarity > 0.7, kind
        assert (len(copy) / rate < 1.95) == (kind == "cut")


def test_places_of_a_recording(shared_dir, monkeypatch, capsys, tmp_path):
    """A minute with one event: its place is found where it is, and evenly spaced places are in the middle."""
    path = shared_dir / "data" / "sound_events"
    rows = [row for row in archive.read_metadata(path) if row["event"] == "rooster" and row["fold"] == "5"]
    event = PlacedEvent(40.0, 43.0, "rooster", rows[0]["file_name"], 1.0, 0, 3 * 48_000)
    monkeypatch.setattr(archive, "plan_recording", lambda *args: [event])
    assert archive.main(["places", "--data", str(shared_dir / "data"), "--work", str(tmp_path), "--minutes", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["events"], found["middle_within_2_s"], found["evenly_spaced_middles"]) == (1, 1.0, 0.0)
    assert list(tmp_path.iterdir()) == []
