"""Stand-in domains made from single sounds."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import soundfile

from benchmarks.grid_stand_ins import DOMAINS, Recipe, main, make_stand_ins, mix
from recap_hf.evaluation.grid_config import read_grid


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """One half-second sound of each event in each of folds 1, 4 and 5."""
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    lines = ["file_name,event,fold,source,licence"]
    for event in [event for events in DOMAINS.values() for event in events]:
        for fold in (1, 4, 5):
            soundfile.write(folder / f"{event}-{fold}.wav", 0.1 * generator.normal(size=8_000), 16_000)
            lines.append(f"{event}-{fold}.wav,{event},{fold},made here,CC0")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def rows(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_two_domains_and_a_grid(sounds, tmp_path):
    grid = read_grid(make_stand_ins(sounds, tmp_path, Recipe(mixtures=4, captions=2)))
    assert set(grid.domains) == set(DOMAINS) and grid.training_sets[-1] == tuple(DOMAINS)
    for name, events in DOMAINS.items():
        table = rows(tmp_path / name / "metadata.csv")
        # Per split one sound of each event, and 4, 2 and 4 mixtures.
        assert [sum(row["split"] == split for row in table) for split in ("train", "validation", "test")] == [
            len(events) + 4,
            len(events) + 2,
            len(events) + 4,
        ]
        assert all((tmp_path / name / row["file_name"]).is_file() and row["caption_2"] for row in table)
        counts = {row["clip_id"]: int(row["events"]) for row in rows(tmp_path / name / "events.csv")}
        assert all(count == 1 + ("mixture" in clip) for clip, count in counts.items()) and len(counts) == len(table)
    # Every sound stays in the split of its fold.
    assert (tmp_path / "outdoors" / "test-rain-5.flac").is_file()
    assert not (tmp_path / "outdoors" / "train-rain-5.flac").exists()


def test_captions_name_the_events(sounds, tmp_path):
    make_stand_ins(sounds, tmp_path, Recipe(mixtures=2, captions=1))
    captions = {row["file_name"]: row["caption_1"] for row in rows(tmp_path / "outdoors" / "metadata.csv")}
    assert "dog" in captions["test-dog_bark-5.flac"] and "helicopter" in captions["test-helicopter-5.flac"]
    indoors = " ".join(row["caption_1"] for row in rows(tmp_path / "indoors" / "metadata.csv"))
    assert not any(word in indoors for word in ("dog", "rain", "chainsaw", "rooster", "helicopter"))


def test_mixing():
    rate = 48_000
    tone, noise = np.sin(np.arange(2 * rate) / 20), np.random.default_rng(0).normal(size=rate)
    sequence = mix(tone, noise, "sequence")
    assert len(sequence) == int(3.5 * rate)
    assert np.abs(sequence[2 * rate : int(2.5 * rate)]).max() == 0
    parts = [np.sqrt(np.mean(part**2)) for part in (sequence[: 2 * rate], sequence[int(2.5 * rate) :])]
    assert parts == pytest.approx([0.1, 0.1], rel=1e-3)
    overlap = mix(tone, noise, "overlap")
    assert len(overlap) == 2 * rate
    # The shorter sound comes twice: half the sum of both at level 0.1.
    expected = 0.05 * (tone[rate:] / np.sqrt(np.mean(tone**2)) + noise / np.sqrt(np.mean(noise**2)))
    assert overlap[rate:] == pytest.approx(expected, abs=1e-6)
    assert len(mix(np.ones(20 * rate), np.ones(rate), "sequence")) <= 10 * rate


def test_wrong_folders_are_refused(tmp_path, sounds, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err
    few = tmp_path / "few"
    few.mkdir()
    (few / "metadata.csv").write_text("file_name,event,fold,source\nx.wav,rain,1,y\n")
    with pytest.raises(ValueError, match="fewer than two outdoors events in the folds 1, 2, 3"):
        make_stand_ins(few, tmp_path / "out")
