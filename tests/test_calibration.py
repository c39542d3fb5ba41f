"""Confidences: the logistic calibration, its measures by hand, and its way into the pipeline."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from recap_hf import AudioCaptioningPipeline, RecapConfig
from recap_hf.calibration import (
    Observation,
    calibration_error,
    discrimination,
    fit,
    main,
    measure,
    read_observations,
    reliability,
    write_observations,
)
from recap_hf.modeling.confidence_recap import ConfidenceModel, caption_features

CALIBRATION = {"weights": {"log_score": 1.5, "similarity": 4.0, "retrieval_score": 0.0}, "intercept": -1.0}


def simulate(count: int, seed: int = 0) -> list[Observation]:
    """Captions whose chance to be right is 1 / (1 + exp(-(1 + 1.5 log_score + 4 similarity)))."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        log_score, similarity, retrieval = rng.normal(-1, 0.7), rng.normal(0.2, 0.3), rng.normal(0.5, 0.2)
        chance = 1 / (1 + math.exp(-(1 + 1.5 * log_score + 4 * similarity)))
        rows.append(Observation(f"clip {index}", "a", log_score, similarity, retrieval, int(rng.random() < chance)))
    return rows


def test_confidence_by_hand():
    model = ConfidenceModel.of(CALIBRATION)
    features = caption_features(math.exp(-2), 0.5, [{"caption": "x", "score": 0.9}, {"caption": "y", "score": 0.8}])
    assert features == {"log_score": pytest.approx(-2), "similarity": 0.5, "retrieval_score": 0.9}
    # -1 + 1.5 * -2 + 4 * 0.5 = -2.
    assert model(features) == pytest.approx(1 / (1 + math.exp(2)))
    assert ConfidenceModel({}, 800.0)({}) == 1.0 and ConfidenceModel({}, -800.0)({}) == 0.0
    assert caption_features(0.0, 0.1, [])["retrieval_score"] == 0.0
    assert ConfidenceModel.of(model.to_dict()) == model and ConfidenceModel.of(None) is None


@pytest.mark.parametrize("wrong", [{}, {"weights": {"loudness": 1.0}, "intercept": 0.0}, {"weights": {}}, [1]])
def test_wrong_calibrations_are_refused(wrong):
    with pytest.raises(ValueError, match="confidence"):
        RecapConfig(confidence=wrong)


def test_fit_finds_the_weights():
    model = fit(simulate(20_000))
    assert model.weights["log_score"] == pytest.approx(1.5, abs=0.1)
    assert model.weights["similarity"] == pytest.approx(4.0, abs=0.2)
    assert model.weights["retrieval_score"] == pytest.approx(0.0, abs=0.2)
    assert model.intercept == pytest.approx(1.0, abs=0.2)


def test_fit_survives_separable_and_constant_features():
    rows = [Observation("", "", float(i), 0.3, 0.0, int(i > 5)) for i in range(12)]
    model = fit(rows)
    assert all(math.isfinite(weight) for weight in model.weights.values()) and model.weights["log_score"] > 0
    with pytest.raises(ValueError, match="12 of 12 captions are right"):
        fit([Observation("", "", 0.0, 0.0, 0.0, 1)] * 12)


def test_calibration_error_by_hand():
    """Two bins: 0.2 said, 1 of 2 right; 0.9 said, 2 of 2 right: (0.3 + 0.1) / 2."""
    confidence, correct = np.array([0.9, 0.1, 0.3, 0.9]), np.array([1.0, 0.0, 1.0, 1.0])
    table = reliability(confidence, correct, bins=2)
    assert [row["correct"] for row in table] == [0.5, 1.0]
    assert [row["confidence"] for row in table] == pytest.approx([0.2, 0.9])
    assert calibration_error(confidence, correct, bins=2) == pytest.approx(0.2)
    # Right: 0.9, 0.3, 0.9; wrong: 0.1.
    assert discrimination(confidence, correct) == 1.0
    assert discrimination(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == 0.5


def test_measures_of_true_and_of_boasting_confidences():
    rng = np.random.default_rng(1)
    chance = rng.random(800)
    correct = (rng.random(800) < chance).astype(float)
    true, boasting = measure(chance, correct, samples=200), measure(np.sqrt(chance), correct, samples=200)
    assert true["ece"]["value"] < true["ece_if_perfect"]["95 %"] * 1.3
    assert boasting["ece"]["interval"][0] > true["ece"]["interval"][1] > true["ece"]["interval"][0]
    # Uniform chances: Brier 1/6, AUC 5/6.
    assert true["brier"]["value"] == pytest.approx(1 / 6, abs=0.02)
    assert true["auc"]["value"] == pytest.approx(5 / 6, abs=0.03) == boasting["auc"]["value"]


def test_pipeline_gives_confidence_where_there_is_a_calibration(tiny_model, tiny_processor, tmp_path):
    clip = np.random.default_rng(0).standard_normal(96_000).astype(np.float32) * 0.1
    silence = np.zeros(48_000, dtype=np.float32)
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, max_new_tokens=5)
    assert "confidence" not in pipe(clip) and "confidence" not in pipe(silence)
    tiny_model.config.confidence = CALIBRATION
    plain, reranked = pipe(clip), pipe(clip, rerank="clap", candidates=1)
    similarity = reranked["similarity"]
    value = -1.0 + 1.5 * math.log(plain["score"]) + 4.0 * similarity
    assert plain["confidence"] == pytest.approx(1 / (1 + math.exp(-value)), rel=1e-3)
    assert pipe(silence)["confidence"] == 1.0
    tiny_model.config.save_pretrained(tmp_path)
    assert RecapConfig.from_pretrained(tmp_path).confidence == CALIBRATION


def test_commands_on_judged_captions(tmp_path, capsys):
    write_observations(simulate(400), tmp_path / "judged.csv")
    write_observations(simulate(400, seed=1), tmp_path / "others.csv")
    assert [row.correct for row in read_observations(tmp_path / "judged.csv")] == [r.correct for r in simulate(400)]
    RecapConfig().save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert main(["fit", "--observations", str(tmp_path / "judged.csv"), "--model", str(tmp_path), "--save"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    config = RecapConfig.from_pretrained(tmp_path)
    assert config.confidence == fitted and fitted["captions"] == 400
    after = json.loads((tmp_path / "config.json").read_text())
    assert {key: value for key, value in after.items() if key != "confidence"} == {
        key: value for key, value in before.items() if key != "confidence"
    }
    other = tmp_path / "other"
    RecapConfig().save_pretrained(other)
    assert main(["fit", "--observations", str(tmp_path / "judged.csv"), "--save", str(other)]) == 0
    assert json.loads(capsys.readouterr().out) == fitted == RecapConfig.from_pretrained(other).confidence
    pytest.importorskip("matplotlib", reason="pictures need the explain extra")
    plot = tmp_path / "reliability.png"
    arguments = ["test", "--observations", str(tmp_path / "others.csv"), "--model", str(tmp_path), "--plot", str(plot)]
    assert main([*arguments, "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["confidence"]["ece"]["value"] < result["score, uncalibrated"]["ece"]["value"]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert main(arguments) == 0
    assert "| confidence | 0." in capsys.readouterr().out


def test_commands_refuse(tmp_path, capsys):
    assert main(["fit", "--sounds", "x"]) == 1
    assert "Say where the calibration goes" in capsys.readouterr().err
    for save in (["--save"], ["--save", str(tmp_path)], ["--model", str(tmp_path), "--save"]):
        assert main(["fit", "--sounds", "x", *save]) == 1
        assert "--save needs a checkpoint folder" in capsys.readouterr().err
    (tmp_path / "wrong.csv").write_text("log_score,similarity,retrieval_score,correct\n-1,0.2,0.5,maybe\n")
    assert main(["fit", "--observations", str(tmp_path / "wrong.csv"), "--output", str(tmp_path / "c.json")]) == 1
    assert "line 2" in capsys.readouterr().err
    RecapConfig().save_pretrained(tmp_path)
    assert main(["test", "--model", str(tmp_path), "--observations", str(tmp_path / "wrong.csv")]) == 1
    assert "no calibration" in capsys.readouterr().err
