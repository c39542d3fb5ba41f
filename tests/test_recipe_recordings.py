"""The recipe's recordings: mixtures, degraded recordings, what they hold and which captions fit."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from recipes.recap_tiny import lexicon, prepare
from recipes.recap_tiny.recordings import RATE, Mixture, Recording, course, degrade, level, plan_mixtures, render
from recipes.recap_tiny.synthetic import KINDS, make


def burst(frequency: float, seconds: float = 1.0, peak: float = 0.5) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return (peak * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def test_files_of_other_arguments_are_not_taken(tmp_path):
    arguments = argparse.Namespace(out=str(tmp_path), folds=[1, 2], seed=0)
    prepare.keep_plan(tmp_path, arguments)
    prepare.keep_plan(tmp_path, arguments)
    with pytest.raises(ValueError, match="is of other arguments"):
        prepare.keep_plan(tmp_path, argparse.Namespace(out=str(tmp_path), folds=[1, 2, 3], seed=0))


def test_mixtures_join_different_groups_and_labels():
    recordings = [
        Recording(str(n), "", label, group) for n, (label, group) in enumerate(["aa", "ab", "ba", "bb", "cc"])
    ]
    planned = plan_mixtures(recordings, [1.0] * 5, range(5), 200, seed=3)
    assert planned == plan_mixtures(recordings, [1.0] * 5, range(5), 200, seed=3)
    for mixture in planned:
        first, second = (recordings[part] for part in mixture.parts)
        assert first.group != second.group and first.label != second.label
        assert mixture.starts[0] == 0.0
        # In sequence, the second begins when the first is nearly over.
        assert mixture.starts[1] >= 0.3 if mixture.in_sequence else mixture.starts[1] <= 0.3
    assert 60 < sum(mixture.in_sequence for mixture in planned) < 140


def test_parts_are_mixed_at_their_gains():
    """Two tones of different levels, one after the other: equal but for the gain of -6 dB."""
    waveforms = [burst(400, peak=0.9), burst(1_000, peak=0.01)]
    mixture = Mixture("m", (0, 1), (0.0, 2.0), (0.0, -6.0), True)
    mixed = render(mixture, waveforms, np.random.default_rng(0))
    assert len(mixed) == 3 * RATE
    assert np.abs(mixed).max() <= 0.95
    first, second = (
        np.sqrt((mixed[start : start + RATE // 2] ** 2).mean()) for start in (RATE // 4, 2 * RATE + RATE // 4)
    )
    assert 20 * np.log10(second / first) == pytest.approx(-6.0, abs=0.2)
    assert not mixed[RATE + 10 : 2 * RATE - 10].any()


def test_degraded_recordings_are_finite_and_keep_their_length():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = degrade(burst(700), rng)
        assert found.dtype == np.float32 and len(found) == RATE
        assert np.isfinite(found).all() and 0 < np.abs(found).max() <= 1.0


def test_how_often_a_sound_comes():
    pause = np.zeros(RATE // 2, dtype=np.float32)
    assert course(burst(500)) == {"steady": True}
    assert course(np.concatenate([burst(500, 0.3), pause])) == {"count": 1}
    assert course(np.concatenate([burst(500, 0.3), pause] * 3)) == {"count": 3}
    assert course(np.concatenate([burst(500, 0.3), pause] * 4)) == {"count": "several"}
    assert course(np.concatenate([burst(500, 0.3), pause] * 8)) == {"count": "repeated"}
    # 40 dB below the others it is not heard beside them.
    assert course(np.concatenate([burst(500, 0.3), pause, burst(500, 0.3, peak=0.005), pause])) == {"count": 1}


def test_captions_of_a_corpus_to_learn_from(tmp_path):
    kept = [f"A dog barks at {where}" for where in ("a cat", "a bird", "a car", "a man", "a horse")]
    others = ["A dog barks", "A man talks as another man talks", "A dogg barks at a cat"]
    others += [f"A music is played at a {what}" for what in ("cat", "bird", "car", "man", "horse")]
    # So that each word of the captions to keep is in five.
    spare = [f"The {what} number {n}" for what in ("cat", "bird", "car", "man", "horse") for n in range(5)]
    path = tmp_path / "captions.csv"
    path.write_text("caption\n" + "".join(f"{text}\n" for text in kept + kept[:2] + others + spare), encoding="utf-8")
    assert prepare.read_corpus(path) == kept + others + spare
    assert prepare.well_written(prepare.read_corpus(path)) == kept


def test_the_level_of_loud_parts():
    quiet_then_loud = np.concatenate([burst(500, peak=0.001), burst(500, peak=0.3)])
    loud = level(quiet_then_loud)[RATE:]
    assert 20 * np.log10(np.sqrt((loud**2).mean())) == pytest.approx(-20.0, abs=0.1)


def test_a_label_is_certain_and_the_teacher_counts_half_beside_it():
    scores = np.zeros(521, dtype=np.float32)
    names = [entry.name for entry in lexicon.classes()]
    scores[names.index("Speech")] = 0.8
    found = prepare.class_scores(scores, "dog_bark")
    head = names[lexicon.labels()["dog_bark"].classes[0]]
    assert found[head] == 1.0 and found["Animal"] == 1.0
    assert found["Speech"] == pytest.approx(0.4)
    assert prepare.class_scores(scores, "") == {"Speech": pytest.approx(0.8)}


def test_what_an_unlabelled_recording_is_described_as():
    names = [entry.name for entry in lexicon.classes()]
    scores = np.zeros(521, dtype=np.float32)
    assert prepare.sound_of(scores, "") is None
    # The specific class, though the teacher is surer of the vaguer one.
    scores[names.index("Animal")], scores[names.index("Dog")] = 0.95, 0.7
    assert prepare.sound_of(scores, "") == names.index("Dog")
    assert prepare.sound_of(scores, "rain") == "rain"


def test_captions_of_a_corpus_that_fit():
    captions = ["A dog barks", "A dog barking at a cat", "Rain falls", "A man speaks", "A dog"] * 30
    captions = [f"{text} {number}" for number, text in enumerate(captions)]
    corpus = prepare.Corpus(prepare.caption_classes(), captions)
    dog = dict.fromkeys(("Dog", "Bark", "Bow-wow", "Canidae, dogs, wolves"), 1.0)
    [found] = corpus.fitting([dog], 5, [[0]])
    assert len(found) == 5
    assert all(text.startswith("A dog") for text in found)
    assert corpus.fitting([dog], 5, [[0]]) == [found]


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_sounds(kind: str):
    waveform = make(kind, np.random.default_rng(1))
    assert waveform.dtype == np.float32 and 2 * RATE <= len(waveform) <= 10 * RATE
    assert np.isfinite(waveform).all() and 0 < np.abs(waveform).max() < 0.8
    assert set(KINDS[kind][0]) <= {entry.name for entry in lexicon.classes()}


def test_captions_that_name_a_label_are_left_out():
    """The label itself, its other classes and what implies one of them; captions of other sounds stay."""
    texts = ["A dog barks", "A puppy yelps", "A seal barks in the distance", "Rain falls on a roof", "A hot dog stand"]
    assert prepare.silenced(texts, []) == texts
    kept = prepare.silenced(texts, ["dog_bark"])
    assert "A dog barks" not in kept and "A puppy yelps" not in kept
    assert "Rain falls on a roof" in kept
    assert prepare.silenced(["A steady drizzle", "A cat meows"], ["rain"]) == ["A cat meows"]


def test_the_clap_keeps_what_the_captioner_must_not_write(tmp_path):
    """Also a recording of which the captioner reads nothing."""
    dog, both = ["A dog barks"], ["A dog barks", "Rain falls"]
    examples = [
        prepare.Example(name, f"{name}.wav", "", "", {"Dog": 1.0}, captions=list(texts), pairs=list(texts))
        for name, texts in (("dog", dog), ("both", both), ("none", []))
    ]
    assert prepare.write_tables(examples, tmp_path, ["dog_bark"]) == 1

    def captions(name):
        lines = (tmp_path / name / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["clip_id"]: row["captions"] for row in map(json.loads, lines)}

    assert captions("train") == {"both": ["Rain falls"]}
    assert captions("pairs") == {"dog": dog, "both": both}
