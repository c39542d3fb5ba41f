"""Cards: what is known is said, what is not known is not claimed, and huggingface_hub reads it all back."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData

from recap_hf.hub import (
    KNOWN_LICENCES,
    CardFacts,
    DataSource,
    DatastoreFacts,
    ModelDescription,
    Result,
    licence_identifier,
    read_scores,
    render_datastore_card,
    render_model_card,
)
from recap_hf.hub.cards import eval_results, is_unedited, save_card, size_category
from recap_hf.hub.licences import forbids_commercial_use

PROMPT = "Audios similar to this audio sounds like: caption 1, caption 2. This audio sounds like:"
TUT = "Tampere University licence (attribution, non-commercial)"
CODE = "pycocoevalcap 1.2, PTB tokenizer"


@pytest.fixture
def description():
    return ModelDescription({"encoder": "CLAP | small", "decoder": "GPT-2"}, PROMPT, 2)


@pytest.fixture
def datastore():
    sources = (
        DataSource("AudioCaps", "MIT", captions=49_838),
        DataSource("Clotho", TUT, captions=19_195),
        DataSource("own", None, captions=7),
    )
    return DatastoreFacts(69_040, 512, "exact search", sources)


@pytest.fixture
def facts():
    return CardFacts(
        licence="CC BY-NC 4.0",
        training_data=[DataSource("Clotho development", TUT, 3_839, 19_195, use="cross-attention")],
        training={"optimiser": "Adam, 5e-5", "epochs": 100},
        results=[
            Result("SPIDEr", 0.25, "Clotho", CODE, split="evaluation", clips=1_045, low=0.24, high=0.26),
            Result("FENSE", 0.5, "Clotho", "fense 0.2", split="evaluation", clips=1_045),
            Result("SPIDEr", 0.21, "Clotho", CODE, split="evaluation", clips=1_045, system="first retrieved caption"),
            Result("SPIDEr", 0.4, "AudioCaps", CODE, clips=957, clip_list="audiocaps-957"),
        ],
        limits=["It has heard no whales."],
        tags=["whales"],
    )


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("MIT", "mit"),
        ("Apache 2.0", "apache-2.0"),
        ("Apache License 2.0", "apache-2.0"),
        ("CC BY 3.0", "cc-by-3.0"),
        ("CC-BY-NC-SA 4.0", "cc-by-nc-sa-4.0"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("CC0", "cc0-1.0"),
        ("CC0 1.0 Universal", "cc0-1.0"),
        ("https://creativecommons.org/licenses/by-nc/3.0/", "cc-by-nc-3.0"),
        ("http://creativecommons.org/publicdomain/zero/1.0/", "cc0-1.0"),
        ("CC BY", None),
        (TUT, None),
        ("public domain", None),
        ("other", None),
        ("", None),
        (None, None),
    ],
)
def test_licence_names_become_identifiers_of_the_hub(name, identifier):
    assert licence_identifier(name) == identifier
    assert identifier is None or identifier in KNOWN_LICENCES


def test_every_known_identifier_is_its_own():
    assert {name: licence_identifier(name) for name in KNOWN_LICENCES - {"other", "unknown"}} == {
        name: name for name in KNOWN_LICENCES - {"other", "unknown"}
    }


@pytest.mark.parametrize("name", ["cc-by-nc-4.0", "CC BY-NC-SA 3.0", TUT, "WavCaps (academic use only)"])
def test_licences_that_forbid_commercial_use_are_recognised(name):
    assert forbids_commercial_use(name)


@pytest.mark.parametrize("name", ["MIT", "CC BY-SA 4.0", None, "Princeton licence"])
def test_other_licences_are_not_said_to_forbid_it(name):
    assert not forbids_commercial_use(name)


def test_metadata_is_read_back_as_it_was_meant(description, facts, datastore, tmp_path):
    card = render_model_card("user/recap", description, facts, datastore, ("user/captions", "abc123"))
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "cc-by-nc-4.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "audio-text-to-text"
    assert "audio-captioning" in data.tags and "whales" in data.tags
    assert data.datasets == ["user/captions"]
    assert data.language == ["en"]
    assert data.metrics == ["spider", "fense"]
    assert data.model_name == "recap"


def test_figures_survive_the_model_index(description, facts):
    """Every field that went in comes out, and the controls are no results of the model."""
    read = ModelCard(str(render_model_card("user/recap", description, facts))).data.eval_results
    assert len(read) == 3 and all(isinstance(result, EvalResult) for result in read)
    first = read[0]
    assert (first.task_type, first.task_name) == ("audio-text-to-text", "Audio captioning")
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("clotho", "Clotho", "evaluation")
    assert (first.metric_type, first.metric_name, first.metric_value) == ("spider", "SPIDEr", 0.25)
    assert first.metric_args == {"implementation": CODE, "low": 0.24, "high": 0.26}
    assert first.dataset_args == {"clips": 1_045}
    assert read[2].dataset_config == "audiocaps-957"
    assert 0.21 not in [result.metric_value for result in read]


def test_metadata_goes_through_model_card_data_unchanged(description, facts):
    card = render_model_card("user/recap", description, facts)
    again = ModelCardData(**json.loads(json.dumps(card.data.to_dict())))
    assert again.to_dict() == card.data.to_dict()
    assert again.eval_results == card.data.eval_results


def test_test_sets_that_the_model_index_would_merge_are_refused():
    same = [Result("SPIDEr", 0.1, "AudioCaps", CODE, clips=975), Result("SPIDEr", 0.2, "AudioCaps", CODE, clips=912)]
    with pytest.raises(ValueError, match=re.escape("Give each its own `clip_list`")):
        eval_results(same)
    apart = [dataclasses.replace(result, clip_list=str(result.clips)) for result in same]
    assert len(eval_results(apart)) == 2


def test_the_table_has_the_controls_beside_the_model(description, facts):
    text = str(render_model_card("user/recap", description, facts))
    assert "Clotho (evaluation split), 1,045 clips:" in text
    assert (
        "| system | SPIDEr | FENSE |\n| --- | ---: | ---: |\n| **this model** | 0.250 [0.240, 0.260] | 0.500 |" in text
    )
    assert "| first retrieved caption | 0.210 | – |" in text
    assert f"Computed with {CODE} (SPIDEr); fense 0.2 (FENSE)." in text
    assert "AudioCaps (test split), 957 clips, clip list `audiocaps-957`:" in text


def test_licences_of_captions_are_said(description, datastore):
    text = str(render_model_card("user/recap", description, datastore=datastore))
    assert f"| Clotho | 19,195 | {TUT} |" in text
    assert "The captions of Clotho are not free for commercial use." in text
    assert "For 7 of the captions no licence is recorded" in text
    assert "| own | 7 | not stated |" in text


def test_nothing_is_claimed_that_is_not_known(description):
    card = render_model_card("user/recap", description)
    text = str(card)
    assert card.data.license is None and "license" not in card.data.to_dict()
    assert "model-index" not in text
    assert "No licence is stated for the weights" in text
    assert "What it was trained on is not recorded." in text
    assert "No figures are recorded for this checkpoint." in text
    assert "No datastore comes with this checkpoint" in text
    assert "None" not in text and "undefined" not in text


def test_an_unknown_licence_is_other_with_its_name(description):
    data = render_model_card("user/recap", description, CardFacts(licence="Whale Licence 7")).data
    assert (data.license, data.license_name) == ("other", "whale-licence-7")


def test_a_model_without_retrieval_does_not_promise_it():
    description = ModelDescription({"decoder": "GPT-2"}, "This audio sounds like:", 0)
    text = str(render_model_card("user/recap", description))
    assert "Nothing is retrieved: the decoder is prompted with `This audio sounds like:` alone." in text
    assert "No datastore comes" not in text


def test_names_cannot_break_the_page(description):
    hostile = DataSource("<img src=x> [x](y)", licence="*MIT* `x`", url="javascript:alert(1)")
    facts = CardFacts(training_data=[DataSource("a | b\nc", url="https://example.org"), hostile], licence="<b>Mine")
    text = str(render_model_card("user/recap", description, facts))
    assert "| [a \\| b c](https://example.org) | – | – | not stated | training |" in text
    assert r"| \<img src=x\> \[x\](y) | – | – | \*MIT\* \`x\` | training |" in text
    assert r"released under \<b\>Mine." in text and "javascript" not in text
    assert "| encoder | CLAP \\| small |" in text


def test_names_of_sources_and_licences_are_text_and_no_markup(description):
    """Markup, HTML and links in names are shown, not followed."""
    bad = "x](https://evil.example) <img src=x> **b** `c` [d"
    shown = "x\\](https://evil.example) \\<img src=x\\> \\*\\*b\\*\\* \\`c\\` \\[d"
    sources = (
        DataSource(bad, bad, captions=1, url="javascript:alert(1)"),
        DataSource(bad, "CC BY-NC 4.0", url="https://a.b/c)d"),
    )
    store = DatastoreFacts(1, 2, "exact search", sources)
    facts = CardFacts(licence=bad, training_data=list(sources), training={bad: bad})
    for card in (
        render_model_card("user/recap", description, facts, store),
        render_datastore_card("user/captions", store, "data/*.parquet", ["caption"], [bad], facts=facts),
    ):
        text = str(card).split("---\n", 2)[2]
        assert shown in text and bad not in text and "javascript" not in text
        assert "(https://a.b/c%29d)" in text


def test_pages_have_no_gaps_and_no_leftovers(description, facts, datastore):
    for card in (
        render_model_card("user/recap", description, facts, datastore),
        render_model_card("user/recap", description),
        render_datastore_card("user/captions", datastore, "data/*.parquet", ["caption"], ["rain falls"]),
    ):
        text = str(card)
        assert "\n\n\n" not in text.split("---\n", 2)[2] and "{%" not in text and "{{ " not in text
        # Every table row has as many cells as its header.
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
            assert len(set(cells)) == 1, table


def test_a_datastore_card_names_its_files_sizes_task_and_licences(datastore, tmp_path):
    card = render_datastore_card(
        "user/captions", datastore, "data/train-*.parquet", ["caption", "source"], ["rain falls"]
    )
    card.save(tmp_path / "README.md")
    data = DatasetCard.load(tmp_path / "README.md").data.to_dict()
    assert data["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert data["size_categories"] == ["10K<n<100K"]
    assert data["task_categories"] == ["text-retrieval"]
    assert data["license"] == ["mit", "other", "unknown"]
    assert data["caption_sources"] == [
        {"name": "AudioCaps", "captions": 49_838, "license": "MIT"},
        {"name": "Clotho", "captions": 19_195, "license": TUT},
        {"name": "own", "captions": 7, "license": "unknown"},
    ]
    assert "- rain falls" in str(card)


@pytest.mark.parametrize(
    ("number", "category"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (79_573, "10K<n<100K"),
        (600_000, "100K<n<1M"),
        (10**8, "100M<n<1B"),
    ],
)
def test_size_categories(number, category):
    assert size_category(number) == category


def test_facts_come_from_json_and_yaml(tmp_path, facts):
    plain = dataclasses.asdict(facts)
    (tmp_path / "facts.json").write_text(json.dumps(plain), encoding="utf-8")
    assert CardFacts.from_file(tmp_path / "facts.json") == facts
    (tmp_path / "facts.yaml").write_text(
        "licence: MIT\nresults:\n- {metric: F1, value: 1, dataset: d, implementation: i}\n"
    )
    assert CardFacts.from_file(tmp_path / "facts.yaml").results == [Result("F1", 1, "d", "i")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"license": "mit"}', "has unknown keys license; known are title, summary, licence"),
        ('{"results": [{"metric": "F1"}]}', "an entry of 'results' is incomplete"),
        ('{"results": [3]}', "an entry of 'results' must be a mapping, got 3"),
        ("[]", "must hold a mapping of facts, it holds a list"),
        ("{", "does not parse"),
    ],
)
def test_facts_that_are_none_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        CardFacts.from_file(path)
    assert str(path) in str(refusal.value)


CODE_OF_SCORES = {"recap_hf": "0.1.0", "bleu, cider_d": "pycocoevalcap 1.2", "tokenizer": "PTB", "fense": "fense 0.2"}


def test_scores_become_figures_with_their_implementation(tmp_path):
    """The layout of `recap evaluate`: several systems, intervals, metrics that were skipped."""
    scores = {
        "clip_list": {"name": "clotho-evaluation", "num_clips": 1_045, "sha256": "0" * 64},
        "implementation": CODE_OF_SCORES,
        "notes": ["3 clips retrieved one of their own references"],
        "systems": {
            "recap": {
                "corpus": {"bleu_1": 0.5, "cider_d": 0.4, "spice": None, "fense": 0.3},
                "intervals": {"bleu_1": [0.45, 0.55]},
            },
            "no_retrieval": {"corpus": {"bleu_1": 0.4}, "intervals": {}},
        },
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    results, notes = read_scores(tmp_path / "scores.json", "Clotho", "evaluation")
    assert notes == scores["notes"]
    own = {"dataset": "Clotho", "split": "evaluation", "clips": 1_045, "clip_list": "clotho-evaluation"}
    assert results == [
        Result("BLEU-1", 0.5, implementation="pycocoevalcap 1.2, PTB", low=0.45, high=0.55, **own),
        Result("CIDEr-D", 0.4, implementation="pycocoevalcap 1.2, PTB", **own),
        Result("FENSE", 0.3, implementation="fense 0.2, PTB", **own),
        Result("BLEU-1", 0.4, implementation="pycocoevalcap 1.2, PTB", system="no retrieval", **own),
    ]


def test_scores_of_one_system_name_their_list_by_its_hash(tmp_path):
    scores = {
        "corpus": {"bleu_4": 0.25},
        "clip_list": {"name": None, "num_clips": 2, "sha256": "abcdef0123456789"},
        "implementation": CODE_OF_SCORES,
    }
    (tmp_path / "ours.json").write_text(json.dumps(scores))
    ((result,), notes) = read_scores(tmp_path / "ours.json")
    assert (result.clip_list, result.dataset, notes) == ("sha256 abcdef012345", tmp_path.name, [])
    (tmp_path / "ours.json").write_text("[1]")
    with pytest.raises(ValueError, match=re.escape("ours.json is no file of scores")):
        read_scores(tmp_path / "ours.json")


def test_an_edited_card_is_told_from_one_that_nobody_touched(description, tmp_path):
    path = save_card(render_model_card("user/recap", description), tmp_path)
    assert is_unedited(path)
    assert ModelCard.load(path).data.library_name == "transformers"
    path.write_text(path.read_text().replace("user/recap", "my captioner", 1))
    assert not is_unedited(path)
    path.write_text("# My model")
    assert not is_unedited(path)


RENDER = """
import sys
from pathlib import Path
import recap_hf.model_cards
from recap_hf.hub import ModelDescription, render_model_card
assert Path(recap_hf.model_cards.__file__).is_relative_to(sys.argv[1]), recap_hf.model_cards.__file__
print(render_model_card("user/recap", ModelDescription({"decoder": "GPT-2"}, "prompt", 1)))
"""


def test_cards_render_from_an_installed_wheel(tmp_path):
    """The wheel's own files, unpacked apart from the source tree, hold the templates."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    ignored = shutil.ignore_patterns("__pycache__", "assets", "*.egg-info")
    for name in ("recap_hf", "recap_cli", "modeling", "conversion", "model_cards"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    (source / "recap_hf" / "assets").mkdir()
    shutil.copy(REPOSITORY / "recap_hf" / "assets" / "__init__.py", source / "recap_hf" / "assets")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, unpacked, "zip")
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(unpacked)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ModelCard(done.stdout).data.pipeline_tag == "audio-text-to-text"
    assert "retrieves the caption that fits it best" in done.stdout


def test_the_documented_facts_are_facts(tmp_path):
    text = (REPOSITORY / "docs" / "sharing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "facts.yaml").write_text(block, encoding="utf-8")
    facts = CardFacts.from_file(tmp_path / "facts.yaml")
    assert facts.training_data[0].clips == 812 and facts.results[1].system == "first retrieved caption"


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (None, "exact search"),
        ({"kind": "IVF64,SQ8"}, "approximate search, FAISS IVF64,SQ8"),
        (
            {"kind": "HNSW32", "recall": {"k": 4, "text": 0.98, "gap": 0.951}},
            "approximate search, FAISS HNSW32, recall@4 at least 0.951 on queries held out",
        ),
    ],
)
def test_the_search_is_named_with_its_measured_recall(index, text):
    from recap_hf.hub.describe import index_text

    assert index_text(index) == text
