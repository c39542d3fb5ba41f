"""The benchmark's ruler: boundaries and names against known times, and recordings that hold what their plan says."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import soundfile

from recap_hf.timeline.benchmark import compare_formats
from recap_hf.timeline.formats import SUFFIXES, WRITERS
from recap_hf.timeline.scoring import boundary_figures, naming_figures
from recap_hf.timeline.synthesis import PlacedEvent, plan_recording, read_plan, render_recording, write_plan


def event(start, end, name):
    return PlacedEvent(start, end, name, f"{name}.ogg", 1.0, 0, 0)


def timeline(*rows):
    return [
        {"start": start, "end": end, "caption": caption, "score": 0.5, "retrieved": []} for start, end, caption in rows
    ]


EVENTS = [event(10, 15, "dog"), event(15, 20, "rain"), event(30, 35, "bell")]


def test_boundaries_by_hand():
    segments = timeline((0, 10.4, ""), (10.4, 15, ""), (15, 21.5, ""), (21.5, 30.0, ""), (30.0, 40, ""))
    figures = boundary_figures(segments, EVENTS)
    # Found: 10.4, 15, 21.5, 30. True: 10, 15, 20, 30, 35; the dog and the rain touch.
    assert (figures["boundaries"], figures["truth"], figures["without_gap"]) == (4, 5, 2)
    assert figures["0.5"]["both_ends"] == pytest.approx(1 / 3)
    assert figures["0.5"]["starts"] == 1.0
    assert figures["0.5"]["ends"] == pytest.approx(1 / 3)
    assert figures["0.5"]["precision"] == 0.75
    assert figures["2"]["both_ends"] == pytest.approx(2 / 3)
    assert figures["2"]["both_ends_without_gap"] == 1.0
    # Four boundaries evenly over 40 s lie at 8, 16, 24, 32: near the dog's ends and the start of the bell.
    assert figures["2"]["evenly_spaced"] == pytest.approx(1 / 3)
    assert figures["0.25"]["evenly_spaced"] == 0.0


def test_naming_by_hand():
    segments = timeline(
        (0, 5, "a bell"), (5, 10, "silence"), (10, 15, "a dog"), (15, 20, "a dog"), (20, 29, ""), (29, 36, "a bell")
    )
    figures = naming_figures(segments, EVENTS, lambda caption: set(caption.split()) & {"dog", "rain", "bell"})
    assert figures["recall"] == pytest.approx(2 / 3)
    assert figures["recall_per_event"] == {"bell": 1.0, "dog": 1.0, "rain": 0.0}
    # Four names, of which the first bell and the second dog are wrong.
    assert (figures["precision"], figures["names"]) == (0.5, 4)
    # 21 s without an event, in 5 + 1 + 1 of which one is named.
    assert figures["false_naming_between_events"] == pytest.approx(7 / 21, abs=0.01)


def test_files_that_do_not_equal_the_json_are_told(tmp_path):
    pytest.importorskip("pandas", reason="pandas is not installed")
    segments = timeline((0, 1, "a dog"), (1, 2.5, "NA"))
    for kind, suffix in SUFFIXES.items():
        with open(tmp_path / f"r{suffix}", "w", newline="") as file:
            writer = WRITERS[kind](file)
            writer.begin("r.flac")
            for entry in segments:
                writer.write(entry)
            writer.end(None)
            writer.close()
    for text in compare_formats(tmp_path / "r", segments).values():
        assert text == "equal" or text.startswith("not compared: No module named")
    moved = timeline((0, 1, "a dog"), (1, 2.6, "NA"))
    assert compare_formats(tmp_path / "r", moved)["audacity"].startswith("cue 1:")
    assert compare_formats(tmp_path / "r", segments[:1])["raven"] == "2 cues, expected 1"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Six recordings of three events: clicks, tones and noise, with silence around."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    rows = ["file_name,event,fold,source"]
    for name in ("click", "tone", "noise"):
        for index in range(2):
            sound = {
                "click": np.sign(rng.standard_normal(20_000)),
                "tone": np.sin(np.arange(60_000) / 10),
                "noise": rng.standard_normal(90_000) / 4,
            }[name]
            soundfile.write(folder / f"{name}{index}.wav", np.pad(0.3 * sound, (24_000, 12_000)), 48_000)
            rows.append(f"{name}{index}.wav,{name},1,made")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_recording_holds_what_its_plan_says(sounds, tmp_path):
    events = plan_recording(sounds, 1, 1.0, seed=3)
    assert events == plan_recording(sounds, 1, 1.0, seed=3)
    assert len(events) > 6
    for before, after in itertools.pairwise(events):
        assert before.end <= after.start + 1e-9
        assert before.event != after.event
    assert any(after.start - before.end < 1e-3 for before, after in itertools.pairwise(events))
    # Without the half second before and the quarter after.
    assert {round(e.end - e.start, 2) for e in events if e.event == "tone"} == {1.25}
    write_plan(events, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == events
    assert json.loads((tmp_path / "plan.json").read_text())[0]["event"] == events[0].event
    render_recording(sounds, events, 1.0, tmp_path / "r.wav", seed=3)
    waveform, rate = soundfile.read(tmp_path / "r.wav")
    assert (len(waveform), rate) == (60 * 48_000, 48_000)
    level = 10 * np.log10(np.square(waveform).reshape(-1, 480).mean(axis=1))
    inside = np.zeros(len(level), bool)
    for entry in events:
        inside[round(entry.start * 100) + 1 : round(entry.end * 100) - 1] = True
    outside = np.ones(len(level), bool)
    for entry in events:
        outside[int(entry.start * 100) - 1 : int(entry.end * 100) + 2] = False
    assert np.median(level[inside]) > -34
    assert -75 < level[outside].mean() < -45
    assert level[outside].max() < -40


def test_folders_that_cannot_make_a_timeline(sounds):
    with pytest.raises(ValueError, match="fewer than two kinds"):
        plan_recording(sounds, 2, 1.0)
    with pytest.raises(FileNotFoundError, match="metadata"):
        plan_recording(sounds / "none", 1, 1.0)
