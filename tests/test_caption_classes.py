"""Soft targets: how well a caption fits a recording by classes, and a training towards them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_mobilenet_config
from safetensors.torch import load_file
from training_parts import write_clip

from recap_hf import RecapFeatureExtractor
from recap_hf.data import load_captions
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel
from recap_hf.training.run import train
from recap_hf.training.tasks.caption_classes import CaptionClasses, agreement
from recap_hf.training.tasks.clap import ClapTrainingConfig

TABLE = """name,words,parents
Animal,\\banimals?\\b,
Dog,\\bdogs?\\b,Animal
Bark,\\bbark,Dog
Rain,\\brain,
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "classes.csv").write_text(TABLE)
    return tmp_path / "classes.csv"


def test_what_captions_name_and_what_that_implies(table: Path):
    """A caption names its most specific classes; the others are covered."""
    named, covered = CaptionClasses.from_csv(table).named(["A dog barks in the rain", "An animal", "Nothing"])
    assert named.astype(int).tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert covered.astype(int).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_a_specific_class_implies_its_parents(table: Path):
    classes = CaptionClasses.from_csv(table)
    assert classes.scores([{"Bark": 0.5, "Animal": 0.7}]).tolist() == [pytest.approx([0.7, 0.5, 0.5, 0.0])]
    with pytest.raises(ValueError, match="the class 'Cat', which is not among"):
        classes.scores([{"Cat": 1.0}])


def test_agreement_by_hand(table: Path):
    """A dog, and rain with the score 0.25, of which the root counts."""
    classes = CaptionClasses.from_csv(table)
    scores = classes.scores([{"Dog": 1.0, "Rain": 0.25}])
    found = agreement(scores, *classes.named(["a dog", "a dog in the rain", "an animal", "rain", "a cat"]))[0]
    # Roots of the scores: animal 1, dog 1, bark 0, rain 0.5; together 2.5.
    precisions, recalls = (1, 0.75, 1, 0.5), (2 / 2.5, 1, 1 / 2.5, 0.5 / 2.5)
    expected = [(2 * p * r / (p + r)) ** 3 for p, r in zip(precisions, recalls, strict=True)]
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected the columns name and words, found a, b"),
        ("name,words\nDog,(\n", r"the expression '\(' does not compile"),
        ("name,words\nDog,a\nDog,b\n", "the class 'Dog' is there twice"),
        ("name,words,parents\nDog,a,Cat\n", "the parent 'Cat' of 'Dog' is none of the classes"),
    ],
)
def test_tables_that_make_no_sense(tmp_path: Path, text: str, message: str):
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        CaptionClasses.from_csv(tmp_path / "classes.csv")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A MobileNet CLAP without a tokenizer, and an audiofolder whose clips have classes."""
    folder = tmp_path_factory.mktemp("targets")
    torch.manual_seed(0)
    MobileNetClapModel(tiny_mobilenet_config()).save_pretrained(folder / "tower")
    settings = MobileNetClapModel.feature_settings(tiny_mobilenet_config())
    RecapFeatureExtractor(**settings).save_pretrained(folder / "tower")
    (folder / "data").mkdir()
    words = ("dog barks", "rain falls", "bell rings")
    rows = []
    for number in range(9):
        write_clip(folder / "data" / f"{number}.wav", number, seconds=1.0 + number)
        name, kind = words[number % 3], ("Dog", "Rain", "Bell")[number % 3]
        row = {"file_name": f"{number}.wav", "captions": [f"a {name} in take {number}", f"the {name} {number} times"]}
        rows.append(row | {"classes": [kind], "class_scores": [0.9]})
    (folder / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "classes.csv").write_text("name,words\nDog,dog\nRain,rain\nBell,bell\n")
    return folder


def config(start: Path, output: Path, **changes) -> ClapTrainingConfig:
    settings = {
        "dataset": ["audiofolder"],
        "data_dir": [str(start / "data")],
        "clap": str(start / "tower"),
        "validation_split": "none",
        "vocab_size": 380,
        "feature_cache": str(start / "cache"),
        "output_dir": str(output),
        "batch_size": 9,
        "max_steps": 12,
        "learning_rate": 5e-4,
        "warmup_steps": 1,
        "caption_classes": str(start / "classes.csv"),
        "device": "cpu",
    }
    return ClapTrainingConfig(**{**settings, **changes}).validate()


def test_a_frozen_tower_learns_which_captions_fit(start: Path, tmp_path: Path):
    """The first stage of a CLAP on a converted tower: new tokenizer and text tower, the tower itself unchanged."""
    from transformers import AutoModel, AutoTokenizer

    train(config(start, tmp_path, freeze="audio_model", max_steps=60))
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "tower", tmp_path))
    for name, tensor in before.items():
        if name.startswith("audio_model."):
            assert torch.equal(tensor, after[name]), name
    clap, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    texts = clap.embed_captions(
        ["a dog barks in take 0", "a rain falls in take 1", "a bell rings in take 2"], tokenizer
    )
    similarity = texts @ texts.T
    # Captions of different classes are told apart.
    assert similarity[np.triu_indices(3, 1)].max() < 0.9


def test_class_scores_train_the_head_and_the_tower(start: Path, tmp_path: Path):
    report = train(config(start, tmp_path, class_loss_weight=1.0, random_gain_db=6.0))
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "tower", tmp_path))
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    name = "audio_model.layers.0.convolution.weight"
    assert not torch.equal(before[name], after[name])
    assert report["steps"] == 12


def test_classes_that_the_head_lacks_are_added(start: Path, tmp_path: Path):
    """The classes of the head stay as they were; the new one starts as a rare one, whatever the sound."""
    from transformers import AutoModel

    rows = [json.loads(line) for line in (start / "data" / "metadata.jsonl").read_text().splitlines()]
    rows[0]["classes"], rows[0]["class_scores"] = ["Dog", "Whistle"], [0.9, 0.4]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (tmp_path / row["file_name"]).symlink_to(start / "data" / row["file_name"])
    settings = {"data_dir": [str(tmp_path)], "caption_classes": "", "max_steps": 1, "learning_rate": 1e-12}
    train(config(start, tmp_path / "out", class_loss_weight=1.0, **settings))
    before, after = (AutoModel.from_pretrained(folder).eval() for folder in (start / "tower", tmp_path / "out"))
    names = list(before.config.id2label.values())
    assert list(after.config.id2label.values()) == [*names, "Whistle"]
    windows = torch.randn(2, 1, 1008, 64)
    with torch.no_grad():
        old, new = (clap.classify_features(clap.audio_features(windows)) for clap in (before, after))
    torch.testing.assert_close(new[..., :-1], old)
    torch.testing.assert_close(new[..., -1], torch.full(new.shape[:-1], 1 / (1 + math.exp(5))))


def test_targets_need_what_they_are_made_of(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="need an audio tower that is trained"):
        config(start, tmp_path, freeze="audio", random_gain_db=3.0)
    rows = [json.loads(line) for line in (start / "data" / "metadata.jsonl").read_text().splitlines()]
    plain = [{**row, "classes": [], "class_scores": []} for row in rows]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    for number in range(9):
        (tmp_path / f"{number}.wav").symlink_to(start / "data" / f"{number}.wav")
    with pytest.raises(ValueError, match="need the columns classes and class_scores"):
        train(config(start, tmp_path / "out", data_dir=[str(tmp_path)]))


def test_classes_in_a_csv_file(tmp_path: Path):
    (tmp_path / "metadata.csv").write_text("file_name,caption,classes,class_scores\na.wav,a dog,Dog; Rain,0.5;1\n")
    data = load_captions("audiofolder", tmp_path, needs_audio=False).dataset
    assert (data["classes"][0], data["class_scores"][0]) == (["Dog", "Rain"], [0.5, 1.0])


def test_scores_that_do_not_fit_the_classes_are_refused(start: Path, tmp_path: Path):
    row = {"file_name": "0.wav", "caption": "a dog", "classes": ["Dog"], "class_scores": [1.4]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "0.wav").symlink_to(start / "data" / "0.wav")
    with pytest.raises(ValueError, match="a number from 0 to 1 for each of the 1 `classes`"):
        train(config(start, tmp_path / "out", data_dir=[str(tmp_path)]))
