"""Comparisons of two systems: intersection of the clips, paired bootstrap intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from recap_cli import main
from recap_hf.scoring import bootstrap_intervals, compare_tables, paired_bootstrap, score_captions
from recap_hf.scoring.metrics import METRIC_LABELS, METRICS, Metric, MetricScores, mean_scores

pytest.importorskip("pycocoevalcap", reason='needs pycocoevalcap: pip install "recap-hf[eval]"')

WORDS = ["a", "dog", "barks", "while", "rain", "falls", "on", "metal", "roofs", "and", "people", "talk", "far", "away"]


def captions(number: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(number)]


def test_interval_of_a_mean_agrees_with_its_standard_error():
    generator = np.random.default_rng(1)
    first, second = generator.normal(0, 1, 400), generator.normal(0.5, 1, 400)
    row = paired_bootstrap({"x": mean_scores(first)}, {"x": mean_scores(second)}, resamples=4000)["x"]
    difference = second - first
    half = 1.96 * difference.std() / np.sqrt(400)
    assert row.difference == pytest.approx(difference.mean())
    assert (row.low, row.high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.02)
    assert row.excludes_zero


def test_constant_and_absent_differences():
    values = np.linspace(0, 1, 50)
    scores = {"same": mean_scores(values), "shifted": mean_scores(values)}
    other = {"same": mean_scores(values), "shifted": mean_scores(values + 0.25), "alone": mean_scores(values)}
    rows = paired_bootstrap(scores, other, resamples=200)
    assert set(rows) == {"same", "shifted"}
    assert (rows["same"].low, rows["same"].high) == (0, 0) and not rows["same"].excludes_zero
    assert (rows["shifted"].low, rows["shifted"].high) == pytest.approx((0.25, 0.25))
    # A difference within rounding is none.
    rounded = paired_bootstrap(scores, {"same": mean_scores(values + 1e-11)}, resamples=200)["same"]
    assert rounded.low > 0 and not rounded.excludes_zero


def test_bootstrap_rescores_bleu_instead_of_averaging_it():
    """Every resampled BLEU equals BLEU of the resampled captions."""
    predictions, references = captions(30, 0), [captions(3, seed) for seed in range(1, 31)]
    score = score_captions(predictions, references, metrics=("bleu",), pretokenized=True).metrics["bleu_2"]
    drawn = np.random.default_rng(5).integers(30, size=30)
    counts = np.bincount(drawn, minlength=30)
    resampled = score_captions(
        [predictions[n] for n in drawn], [references[n] for n in drawn], metrics=("bleu",), pretokenized=True
    )
    assert score.aggregate(counts @ score.statistics, 30) == pytest.approx(resampled.corpus["bleu_2"], abs=1e-12)
    assert score.corpus != pytest.approx(score.clips.mean(), abs=1e-3)


def test_intervals_of_one_system_hold_the_score_and_repeat():
    score = {"x": mean_scores(np.random.default_rng(0).normal(size=200))}
    low, high = bootstrap_intervals(score, resamples=1000, seed=3)["x"]
    assert low < score["x"].corpus < high
    assert bootstrap_intervals(score, resamples=1000, seed=3)["x"] == (low, high)


def test_wrong_bootstraps_are_refused():
    one, two = {"x": mean_scores([0.0, 1.0])}, {"x": mean_scores([0.0, 1.0, 2.0])}
    with pytest.raises(ValueError, match=r"they have \[2, 3\] clips"):
        paired_bootstrap(one, two)
    with pytest.raises(ValueError, match="expected at least 100"):
        paired_bootstrap(one, one, resamples=10)
    with pytest.raises(ValueError, match="expected a share"):
        paired_bootstrap(one, one, confidence=95)
    assert isinstance(one["x"], MetricScores)


def table(predictions, references, clip_ids=None):
    rows = [{"prediction": text, "references": refs} for text, refs in zip(predictions, references, strict=True)]
    return [row | {"clip_id": name} for row, name in zip(rows, clip_ids, strict=True)] if clip_ids else rows


def test_systems_are_compared_on_their_intersection():
    first = table(["a dog", "rain falls", "wind"], [["a dog"], ["rain falls"], ["x"]], ["a.wav", "b.wav", "c.wav"])
    second = table(["rain", "a dog"], [["rain falls"], ["the dog"]], ["x/b.flac", "a.flac"])
    result = compare_tables(first, second, metrics=("rouge_l",), pretokenized=True, resamples=200)
    assert (result["num_clips"], result["only_in_first"], result["only_in_second"]) == (2, 1, 0)
    assert result["metrics"]["rouge_l"]["first"] == pytest.approx(1)
    # "rain" against "rain falls": precision 1, recall 1/2, beta 1.2; "a dog" is scored with the first file's "a dog".
    assert result["metrics"]["rouge_l"]["second"] == pytest.approx((1 + 2.44 * 0.5 / (0.5 + 1.44)) / 2)
    assert result["notes"] == ["the references of 1 of 2 clips differ between the files; the first file's serve both"]


def test_files_without_names_need_equal_references():
    first = table(["a", "b"], [["a"], ["b"]])
    other = table(["a", "b"], [["a"], ["c"]])
    with pytest.raises(ValueError, match="name the column of clip names"):
        compare_tables(first, other, metrics=("bleu",), pretokenized=True)
    same = table(["a", "x"], [["a"], ["b"]])
    result = compare_tables(first, same, metrics=("bleu",), pretokenized=True)
    assert result["metrics"]["bleu_1"]["difference"] < 0


@pytest.fixture
def two_files(tmp_path):
    """A good and a bad system on 30 clips, and a list of 20 of them."""
    references = [captions(3, seed) for seed in range(30)]
    paths = []
    for name, texts in (("good", [refs[0] for refs in references]), ("bad", captions(30, 99))):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"clip_id": f"clip {n}.wav", "prediction": text, "references": refs}
            for n, (text, refs) in enumerate(zip(texts, references, strict=True))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    listed = tmp_path / "twenty.txt"
    listed.write_text("\n".join(f"clip_{n}" for n in range(20)))
    return [*paths, str(listed)]


def test_command_compares(two_files, tmp_path, capsys):
    good, bad, listed = two_files
    output = tmp_path / "out.json"
    metrics = ["--metrics", "bleu", "cider_d", "rouge_l", "--pretokenized", "--resamples", "500"]
    assert main(["compare", bad, good, "--clip-list", listed, "--output", str(output), *metrics]) == 0
    printed = capsys.readouterr()
    assert "B - A  95% interval" in printed.out
    assert "20 clips in both" in printed.err
    content = json.loads(output.read_text())
    assert content["num_clips"] == 20
    assert set(content["metrics"]) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"}
    assert all(row["low"] > 0 and row["excludes_zero"] for row in content["metrics"].values())
    assert main(["compare", good, good, *metrics]) == 0
    assert "+0.0000  [+0.0000, +0.0000]  (includes 0)" in capsys.readouterr().out


def test_a_metric_is_added_in_one_place(monkeypatch, two_files, capsys):
    """An entry in the table of metrics is computed, bootstrapped and printed."""

    def exact(run):
        equal = [text in refs for text, refs in zip(run.captions, run.references, strict=True)]
        return {"exact": mean_scores(equal)}

    monkeypatch.setitem(METRICS, "exact", Metric(exact, {"exact": "Exact match"}))
    assert "exact" not in METRIC_LABELS
    good, bad, _ = two_files
    assert main(["compare", bad, good, "--metrics", "exact", "--pretokenized", "--resamples", "200"]) == 0
    assert "exact        0.0000   1.0000   +1.0000  [+1.0000, +1.0000]" in capsys.readouterr().out
    assert main(["score", good, "--metrics", "exact", "--pretokenized"]) == 0
    assert capsys.readouterr().out.startswith("exact      1.0000")
