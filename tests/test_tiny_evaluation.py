"""Figures of recap-tiny's evaluation, by hand; its lists and degradations, deterministic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from recap_hf.tiny.evaluation_sets import degrade_waveform, mixture_hash, mixture_list, mixtures, no_events
from recap_hf.tiny.naming import NamingRules, Outcome, bootstrap, figures, names_special, order_said, outcome


@pytest.fixture(scope="module")
def rules() -> NamingRules:
    return NamingRules.ours()


def test_outcome_by_hand(rules):
    assert outcome("a dog barking and a cello", {"dog_bark", "rain"}, rules) == Outcome(1, 1, 1, 2, False)
    assert outcome("a DOG barking", {"dog_bark"}, rules) == Outcome(1, 0, 0, 1, True)
    # A sound that is no event is a false one.
    assert outcome("a dog barking and a door slamming", {"dog_bark"}, rules) == Outcome(1, 1, 0, 2, False)
    assert outcome("an unrecognised sound", {"dog_bark"}, rules) == Outcome(0, 0, 1, 0, False)
    assert outcome("silence", set(), rules).exact


def test_figures_by_hand():
    outcomes = [
        Outcome(1, 1, 0, 2, False),
        Outcome(1, 0, 1, 1, False),
        Outcome(1, 0, 0, 1, True),
        Outcome(0, 0, 1, 0, False),
    ]
    result = figures(outcomes)
    assert result["precision"] == pytest.approx(3 / 4)
    assert result["recall"] == pytest.approx(3 / 5)
    assert result["f1"] == pytest.approx(6 / 9)
    assert result["exact_set"] == pytest.approx(1 / 4)
    assert result["events_per_caption"] == pytest.approx(1.0)
    assert figures([Outcome(0, 0, 1, 0, False)])["precision"] == 0.0


def test_bootstrap_of_proportions_and_pairs():
    """Exact-set rate of 40 in 100: the percentile interval is near the normal one, 0.4 +- 1.96 x 0.049."""
    outcomes = [Outcome(1, 0, 0, 1, True)] * 40 + [Outcome(0, 1, 1, 1, False)] * 60
    low, high = bootstrap(outcomes)["exact_set"]
    assert low == pytest.approx(0.4 - 0.096, abs=0.02) and high == pytest.approx(0.4 + 0.096, abs=0.02)
    # The same clips, all better by one missed event: the paired difference in recall cannot touch 0.
    assert bootstrap(outcomes, outcomes)["f1"] == (0.0, 0.0)
    better = [Outcome(1, 0, 0, 1, True)] * 100
    assert bootstrap(better, outcomes)["f1"][0] > 0.4


def test_order(rules):
    assert order_said("a dog barking, then rain", "dog_bark", "rain", rules) is True
    assert order_said("a dog barking followed by rain", "rain", "dog_bark", rules) is False
    assert order_said("rain after a dog barking", "dog_bark", "rain", rules) is True
    assert order_said("rain and a dog barking", "dog_bark", "rain", rules) is None
    assert order_said("rain", "dog_bark", "rain", rules) is None


def test_rules_from_a_file(tmp_path, shared_dir):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"events": {"rain": "rain"}}))
    with pytest.raises(ValueError, match="no file of naming rules"):
        NamingRules.read(path)
    path.write_text(json.dumps({"events": {"rain": "rain"}, "foreign": "cat"}))
    with pytest.raises(ValueError, match="no expression for"):
        NamingRules.read(path)
    assert len(NamingRules.read(shared_dir / "data" / "keywords.json").events) == 21
    assert names_special("an unrecognised sound") and not names_special("a dog barking")


def test_mixture_list_is_fixed_and_balanced(shared_dir):
    sounds = shared_dir / "data" / "sound_events"
    entries = mixture_list(sounds, 5)
    assert len(entries) == 300 and [entry["kind"] for entry in entries].count("overlap") == 150
    assert all(entry["events"][0] != entry["events"][1] for entry in entries)
    assert all(-6 <= entry["gain_db"] <= 6 for entry in entries)
    assert mixture_hash(entries) == mixture_hash(mixture_list(sounds, 5)) != mixture_hash(mixture_list(sounds, 4))
    items = mixtures(sounds, [entries[0], entries[-1]])
    assert all(np.abs(item.waveform).max() <= 1 for item in items)
    assert not items[0].sequence and items[1].sequence
    assert 6 * 48_000 <= len(items[1].waveform) <= 10 * 48_000


def test_sounds_that_are_no_event_differ_by_fold():
    four, five = no_events(4), no_events(5)
    assert {item.name.split("/")[0] for item in five} == {"silence", "noise", "tone", "unknown"}
    assert not {item.name for item in four if "silence" not in item.name} & {item.name for item in five}


def test_degradations():
    waveform = np.random.default_rng(0).standard_normal(48_000) * 0.1
    assert np.sqrt(np.mean(degrade_waveform(waveform, "-20 dB") ** 2)) == pytest.approx(0.01, rel=0.02)
    narrow = np.abs(np.fft.rfft(degrade_waveform(waveform, "16 kHz")))
    assert narrow[9000:].mean() < 0.02 * narrow[:7000].mean()
    assert len(degrade_waveform(waveform, "codec")) >= 47_000
    with pytest.raises(ValueError, match="no degradation"):
        degrade_waveform(waveform, "vinyl")
