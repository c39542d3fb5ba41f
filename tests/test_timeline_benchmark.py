"""The benchmark of timelines: boundaries and names against known times, and recordings that agree with their plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import soundfile

from benchmarks.timeline_recordings import PlacedEvent, plan_recording, read_plan, render_recording, write_plan
from benchmarks.timeline_scores import boundary_figures, naming_figures


def test_figures_by_hand():
    events = [PlacedEvent(*row, "x.ogg", 1.0, 0, 0) for row in ((10, 15, "dog"), (15, 20, "rain"), (30, 35, "bell"))]
    rows = ((0, 10.4, ""), (10.4, 15, "dog"), (15, 21.5, "dog"), (21.5, 30.0, "bell"), (30.0, 40, "bell"))
    segments = [dict(zip(("start", "end", "caption"), row, strict=True)) for row in rows]
    boundaries = boundary_figures(segments, events)
    # Found: 10.4, 15, 21.5, 30. True: 10, 15, 20, 30, 35; the dog and the rain touch.
    assert (boundaries["boundaries"], boundaries["truth"], boundaries["without_gap"]) == (4, 5, 2)
    assert (boundaries["0.5"]["starts"], boundaries["0.5"]["precision"]) == (1.0, 0.75)
    assert boundaries["0.5"]["both_ends"] == boundaries["0.5"]["ends"] == pytest.approx(1 / 3)
    # Four boundaries at equal distances over 40 s are at 8, 16, 24, 32: near both ends of the dog alone.
    assert boundaries["2"]["evenly_spaced"] == pytest.approx(1 / 3)
    names = naming_figures(segments, events, lambda caption: set(caption.split()))
    # Of the four names the second dog and the first bell are wrong.
    assert (names["recall"], names["precision"], names["names"]) == (pytest.approx(2 / 3), 0.5, 4)


def test_a_recording_agrees_with_its_plan(tmp_path):
    rng, rows = np.random.default_rng(0), ["file_name,event,fold,source"]
    for name, sound in (("tone", np.sin(np.arange(60_000) / 10)), ("noise", rng.standard_normal(90_000) / 4)):
        soundfile.write(tmp_path / f"{name}.wav", np.pad(0.3 * sound, (24_000, 12_000)), 48_000)
        rows.append(f"{name}.wav,{name},1,made")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    events = plan_recording(tmp_path, 1, 1.0, seed=3)
    write_plan(events, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == events
    for before, after in itertools.pairwise(events):
        assert before.end <= after.start + 1e-9 and before.event != after.event
    # Without the half second before and the quarter after.
    assert {round(e.end - e.start, 2) for e in events if e.event == "tone"} == {1.25}
    render_recording(tmp_path, events, 1.0, tmp_path / "r.wav", seed=3)
    waveform, _ = soundfile.read(tmp_path / "r.wav")
    level = 10 * np.log10(np.square(waveform).reshape(-1, 480).mean(axis=1))
    outside = np.ones(len(level), bool)
    for entry in events:
        outside[int(entry.start * 100) - 1 : int(entry.end * 100) + 2] = False
        assert np.median(level[round(entry.start * 100) + 1 : round(entry.end * 100) - 1]) > -34
    assert level[outside].max() < -40
