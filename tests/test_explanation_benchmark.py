"""The benchmark of explanations: its chance tests by hand, and a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.explanation_chance import Look, caption_weights, correlation, shuffled_maps, swapped_maps
from benchmarks.explanations import format_result, run_benchmark
from recap_hf import Captioner

EDGES = np.append(np.arange(30) * 0.3125, 9.25)
FIRST, SECOND = (0.0, 4.5), (4.75, 9.25)


def looks(place_of) -> list[Look]:
    """60 looks; the event of every second one comes first. Each map has one peak."""
    found = []
    for index in range(60):
        first = index % 2 == 0
        second = place_of(first)
        density = ((EDGES[:-1] <= second) & (EDGES[1:] > second)).astype(float)
        found.append(Look(density, EDGES, *((FIRST, SECOND) if first else (SECOND, FIRST)), index, 0))
    return found


def test_chance_tests_by_hand():
    result = shuffled_maps(looks(lambda first: 2.0 if first else 7.0), permutations=500)
    assert result["rate"] == 1.0 and result["shuffled"] == pytest.approx(0.5, abs=0.05)
    assert result["p"] == pytest.approx(1 / 501) and result["recordings"] == 60
    # h = 2 asin(1) - 2 asin(sqrt(0.5)) = pi / 2.
    assert result["cohens_h"] == pytest.approx(np.pi / 2, abs=0.1)
    # A map that is always at the beginning is right half of the time, shuffled or not.
    always = shuffled_maps(looks(lambda _: 1.0), permutations=200)
    assert always["difference"] == pytest.approx(0) and always["p"] == 1.0
    salient = looks(lambda _: 2.0)
    assert swapped_maps(list(zip(salient[::2], salient[1::2], strict=True)), 200)["p"] == 1.0
    weights = caption_weights([np.array([0.7, 0.1, 0.1, 0.1])] * 30, [np.array([True, False, False, False])] * 30, 500)
    assert weights["share"] == pytest.approx(0.7) and weights["shuffled"] == pytest.approx(0.25, abs=0.01)
    # Ranks 1, 2.5, 2.5, 4 against 4, 3, 2, 1: -0.9487 (by hand).
    assert correlation([1, 2, 2, 3], [9, 8, 7, 6], 50)["rho"] == pytest.approx(-0.9487, abs=1e-4)


def test_benchmark_runs(shared_dir, tiny_model, tiny_processor):
    torch.manual_seed(0)
    captioner, sounds = Captioner(tiny_model, tiny_processor), shared_dir / "data" / "sound_events"
    result = run_benchmark(captioner, sounds, 5, ("gradient",), limit=2, permutations=20)
    tests = result["methods"]["gradient"]
    assert tests["given captions"]["looks"] == 8 and tests["two words of a caption"]["captions"] == 4
    assert "| gradient | given | 8 |" in format_result(result)


@pytest.mark.slow
def test_explanations_of_the_default_model_are_better_than_chance(shared_dir):
    """At least 100 mixtures, p < 0.01."""
    sounds = shared_dir / "data" / "sound_events"
    result = run_benchmark(Captioner.from_pretrained(device="cpu"), sounds, 5, ("gradient",), 100, 2000)
    for name in ("given captions", "own captions"):
        test = result["methods"]["gradient"][name]
        assert test["p"] < 0.01 and test["difference"] > 0.1
    assert result["methods"]["gradient"]["given captions"]["recordings"] >= 100
