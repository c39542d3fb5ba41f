"""Mixtures in the mel power domain: the features that inference hears, and audible causes for what captions say."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest

from recap_hf.tiny.grammar import Part
from recap_hf.tiny.mixtures import (
    MixtureConfig,
    draw_example,
    low_pass,
    repeat_pad,
    smear,
    to_decibels,
)
from recap_hf.tiny.procedural import PROCEDURAL, synthesise
from recap_hf.tiny.sounds import FRAMES, SoundBank, find_bursts, load_mono, mel_power, read_metadata

RATE = 48_000


@pytest.fixture(scope="module")
def bank() -> SoundBank:
    """Five "recordings" that are nothing but procedural sounds under names of events."""
    from recap_hf.tiny.sounds import Clip

    clips = []
    for index, event in enumerate(("dog_bark", "rain", "cello", "noise", "tone", "unknown")):
        kind = ("unknown", "noise", "tone")[index % 3]
        power = mel_power(synthesise(kind, index))
        if event == "dog_bark":
            power = power[:60].copy()
            power[:10] = 1e-9
            power[40:] = 1e-9
        clips.append(Clip(event, event, 1, "test", power, find_bursts(power)))
    return SoundBank(clips)


def _stock_features(waveform: np.ndarray) -> np.ndarray:
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
    return extractor(waveform, sampling_rate=RATE, return_tensors="np")["input_features"][0, 0]


def test_a_full_clip_has_the_features_of_the_stock_extractor():
    waveform = np.random.default_rng(0).standard_normal(10 * RATE) * 0.1
    assert np.abs(to_decibels(mel_power(waveform)) - _stock_features(waveform)).max() < 1e-3


def test_a_short_clip_is_repeated_as_the_stock_extractor_repeats_it():
    """Equal but for the few frames at the seams, where frames straddle two repetitions."""
    time = np.arange(3 * RATE) / RATE
    waveform = 0.2 * np.sin(2 * np.pi * 700 * time) * np.exp(-time) + 0.01 * np.sin(2 * np.pi * 3000 * time)
    ours, stock = to_decibels(repeat_pad(mel_power(waveform))), _stock_features(waveform)
    difference = np.abs(ours - stock)
    seams = np.zeros(FRAMES, dtype=bool)
    for seam in (0, 300, 600, 900):
        seams[max(0, seam - 3) : seam + 4] = True
    assert difference[~seams].max() < 1e-3
    assert ours[905:].max() < -99.99 and stock[905:].max() < -99.99


def test_adding_powers_is_adding_waveforms():
    """Of independent sounds: within 1.5 dB on average over the bins, within 0.15 dB of the mean level."""
    rng = np.random.default_rng(1)
    first = rng.standard_normal(10 * RATE) * 0.1
    second = synthesise("unknown", 3)
    second = np.resize(second, len(first))
    true = to_decibels(mel_power(first + 0.5 * second))
    added = to_decibels(mel_power(first) + 0.25 * mel_power(second))
    assert np.abs(true - added).mean() < 1.5
    assert abs(true.mean() - added.mean()) < 0.15


def test_gain_offset_and_filter_by_hand():
    power = np.zeros((300, 64), dtype=np.float32)
    power[10] = 1.0
    wet = smear(power, seconds=1.0)
    assert (wet[:10] == 0).all()
    # 60 dB in 1 s = 100 frames: 0.6 dB a frame.
    assert 10 * np.log10(wet[110] / wet[10]) == pytest.approx(-60, abs=0.05)
    factors = 10 * np.log10(low_pass(1000.0, 24.0))
    assert factors[0] == 0
    assert factors[-1] == pytest.approx(-24 * np.log2(13_467 / 1000), rel=0.02)


def _draw(bank, kind, count=60, **settings):
    plain = {
        "noise_share": 0.0,
        "low_pass_share": 0.0,
        "level_share": 0.0,
        "mask_share": 0.0,
        "far_share": 0.0,
        "background_share": 0.0,
    }
    config = MixtureConfig(scenes=((kind, 1.0),), **(plain | settings))
    events = ("dog_bark", "rain", "cello")
    return [draw_example(bank, (1,), np.random.default_rng([5, i]), config, events) for i in range(count)]


def test_examples_are_valid_and_deterministic(bank):
    for kind in ("single", "count", "overlap", "sequence", "three", "special"):
        for first, again in zip(
            _draw(bank, kind, 8, level_share=1.0), _draw(bank, kind, 8, level_share=1.0), strict=True
        ):
            assert first.power.shape == (FRAMES, 64) and first.power.dtype == np.float32
            assert np.isfinite(first.power).all() and (first.power >= 0).all()
            np.testing.assert_array_equal(first.power, again.power)
            assert set(first.activity) == set(first.scene.keys)
            assert all(active.any() for active in first.activity.values())


def test_strong_variation_keeps_every_share_of_scenes_and_the_truth(bank):
    plain, strong = MixtureConfig(), MixtureConfig().strongly_varied()
    assert strong.scenes == plain.scenes and strong.overlap_gain == plain.overlap_gain
    assert strong.blend_share > plain.blend_share == 0 and strong.shift > plain.shift and strong.speed > plain.speed
    # Two recordings of one event are still that event, alone.
    for example in _draw(bank, "single", 10, blend_share=1.0):
        assert len(example.scene.parts) == 1 and set(example.activity) == set(example.scene.keys)


def test_blending_adds_another_recording_of_the_event_within_6_db():
    from recap_hf.tiny.sounds import Clip

    low, high = np.zeros((2, 300, 64), dtype=np.float32)
    low[:, :32], high[:, 32:] = 2.0, 5.0
    two = SoundBank([Clip("low", "rain", 1, "x", low, ()), Clip("high", "rain", 1, "x", high, ())])
    zero = ("noise_share", "low_pass_share", "level_share", "mask_share", "far_share", "speed_share", "shift_share")
    config = MixtureConfig(
        scenes=(("single", 1.0),), blend_share=1.0, equaliser=0.0, level=(0.0, 0.0), **dict.fromkeys(zero, 0.0)
    )
    gains = []
    for seed in range(40):
        power = draw_example(two, (1,), np.random.default_rng(seed), config, ("rain",)).power
        below, above = power[:, :32].sum(axis=1), power[:, 32:].sum(axis=1)
        both = (below > 0) & (above > 0)
        if both.any():
            gains.append(np.abs(10 * np.log10(above[both] / below[both])).max())
    # Half of the pairs are one recording twice; the gains of the others lie between -6 and 6 dB.
    assert 10 <= len(gains) <= 30 and 4 < max(gains) <= 6.001


def test_a_sequence_is_in_the_order_that_its_scene_says(bank):
    for example in _draw(bank, "sequence"):
        first, second = (example.activity[key] for key in example.scene.order)
        assert np.flatnonzero(first)[0] < np.flatnonzero(second)[0]
        assert np.flatnonzero(first)[-1] <= np.flatnonzero(second)[-1]


def test_counts_are_as_many_bursts_as_said(bank):
    seen = set()
    for example in _draw(bank, "count"):
        (name,) = example.scene.parts[0].attributes
        bursts = len(find_bursts(example.power, gap=8, floor_db=30))
        seen.add(name)
        assert {"once": bursts == 1, "twice": bursts == 2, "repeatedly": bursts >= 4}[name], (name, bursts)
    assert seen == {"once", "twice", "repeatedly"}


def test_far_and_background_are_caused_by_the_synthesis(bank):
    assert all(part == Part(part.key) for example in _draw(bank, "single") for part in example.scene.parts)
    far = _draw(bank, "single", far_share=1.0)
    assert all(example.scene.parts[0].attributes == {"far"} for example in far)

    def brightness(examples):
        total = sum(example.power.sum(axis=0) / example.power.sum() for example in examples)
        return total[40:].sum() / total.sum()

    assert brightness(far) < 0.3 * brightness(_draw(bank, "single"))
    behind = _draw(bank, "overlap", background_share=1.0)
    assert all(example.scene.parts[-1].attributes == {"background"} for example in behind)


def test_bank_reads_a_folder_and_its_cache(tmp_path, shared_dir):
    source = shared_dir / "data" / "sound_events"
    rows = read_metadata(source)[:2]
    (tmp_path / "sounds").mkdir()
    for row in rows:
        (tmp_path / "sounds" / row["file_name"]).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / row["file_name"], tmp_path / "sounds" / row["file_name"])
    with open(tmp_path / "sounds" / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    fresh = SoundBank.load(tmp_path / "sounds", tmp_path / "cache", PROCEDURAL[:2])
    cached = SoundBank.load(tmp_path / "sounds", tmp_path / "cache", PROCEDURAL[:2])
    assert len(fresh.clips) == 4 == len(cached.clips)
    for one, other in zip(fresh.clips, cached.clips, strict=True):
        assert (one.name, one.event, one.fold, one.bursts) == (other.name, other.event, other.fold, other.bursts)
        np.testing.assert_array_equal(one.power, other.power)
    # The cached route of a real recording ends in the features that inference computes.
    waveform = load_mono(source / rows[0]["file_name"])
    difference = np.abs(to_decibels(repeat_pad(fresh.clips[0].power)) - _stock_features(waveform))
    assert np.median(difference) < 1e-3 and np.mean(difference > 0.01) < 0.05


def test_a_folder_without_metadata_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv"):
        read_metadata(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,event\na.wav,rain\n")
    with pytest.raises(ValueError, match="columns event, file_name, fold, source"):
        read_metadata(tmp_path)
