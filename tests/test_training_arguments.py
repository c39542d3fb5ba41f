"""Settings: the paper's by default, from recipes and flags, with the spellings of the Hugging Face examples."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import recap_hf.training
from recap_cli import build_parser
from recap_hf.data.schema import column_mapping
from recap_hf.training.config import load_config, read_recipe
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig

BASE = ["--dataset", "clotho", "--data-dir", "d", "--output-dir", "o"]


def parse(*flags: str) -> CaptionerTrainingConfig:
    arguments = build_parser("train").parse_args(["train", *BASE, *flags])
    return load_config(arguments, CaptionerTrainingConfig)


def test_defaults_are_the_papers():
    config = parse()
    assert (config.learning_rate, config.batch_size, config.num_train_epochs) == (5e-5, 32, 100)
    assert (config.num_retrieved, config.cross_attention_reduce_factor, config.weight_decay) == (4, 4, 0)
    assert not config.train_decoder


def test_the_paper_recipe_says_the_defaults():
    recipe = Path(recap_hf.training.__file__).parent / "recipes" / "paper.yaml"
    assert set(yaml.safe_load(recipe.read_text())) == set(read_recipe(recipe, CaptionerTrainingConfig))
    assert parse("--config", str(recipe)) == parse()


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--per_device_train_batch_size", "4"], "per_device_train_batch_size", 4),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps", 2),
        (["--max_train_steps", "7"], "max_steps", 7),
        (["--max-steps", "7"], "max_steps", 7),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint", "x"),
        (["--report_to", "tensorboard"], "report_to", ["tensorboard"]),
        (["--push_to_hub"], "push_to_hub", True),
        (["--hub_model_id", "a/b"], "hub_model_id", "a/b"),
        (["--hub_datastore_id", "a/c"], "hub_datastore_id", "a/c"),
        (["--save_total_limit", "5"], "save_total_limit", 5),
        (["--num_train_epochs", "0.5"], "num_train_epochs", 0.5),
        (["--mixed_precision", "bf16"], "mixed_precision", "bf16"),
        (["--no-train-decoder"], "train_decoder", False),
        (["--k", "2"], "num_retrieved", 2),
        (["--dataloader_num_workers", "3"], "num_workers", 3),
        (["--columns", "caption=text", "audio=sound"], "columns", ["caption=text", "audio=sound"]),
    ],
)
def test_flags(flags: list[str], name: str, value: object):
    assert getattr(parse(*flags), name) == value


def test_mixed_precision_is_the_launchers_unless_given():
    assert parse().mixed_precision is None


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_every_field_is_a_key_and_flags_win(tmp_path: Path, suffix: str):
    values = {"learning_rate": "5e-4", "k": 3, "train-decoder": True, "dataset": ["audiocaps"], "max_train_steps": 9}
    path = tmp_path / f"recipe{suffix}"
    path.write_text(yaml.safe_dump(values) if suffix == ".yaml" else json.dumps(values))
    config = parse("--config", str(path), "--k", "2")
    assert (config.learning_rate, config.num_retrieved, config.train_decoder, config.max_steps) == (5e-4, 2, True, 9)
    known = {item.name for item in fields(CaptionerTrainingConfig)}
    everything = tmp_path / f"all{suffix}"
    everything.write_text(json.dumps({name: getattr(config, name) for name in known}))
    assert load_config({"config": str(everything)}, CaptionerTrainingConfig) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unrecognized arguments: --learning-rat=1"),
        ("batch_size: many", "argument --batch-size/--train-batch-size: invalid int value: 'many'"),
        ("batch_size: 1.5", "invalid int value: '1.5'"),
        ("train_decoder: 1", "argument --train-decoder/--no-train-decoder: ignored explicit argument '1'"),
        ("model: [a, b]", "unrecognized arguments: b"),
        ("mixed_precision: int8", "argument --mixed-precision: invalid choice: 'int8'"),
        ("- a list", "expected names and values"),
        ("a: [", "does not parse"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(path, CaptionerTrainingConfig)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rate", "0"], "--learning-rate must be more than 0, got 0.0"),
        (["--draw-from", "3"], "--draw-from must be 0, or at least --num-retrieved (4), got 3"),
        (["--audio-dropout", "1"], "--audio-dropout must be at least 0 and less than 1, got 1.0"),
        (["--clap", "x"], "--clap and --decoder go together"),
        (["--clap", "x", "--decoder", "y", "--model", "z"], "either --model, or --clap and --decoder"),
    ],
)
def test_settings_that_do_not_fit(flags: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*flags)


def test_datasets_and_their_folders():
    config = load_config(
        argparse.Namespace(
            dataset=["clotho", "user/set", "audiocaps"],
            data_dir=["a", "b"],
            audio_dir=["c"],
            output_dir="o",
            config=None,
        ),
        CaptionerTrainingConfig,
    )
    assert config.sources() == [("clotho", "a", "c"), ("user/set", None, None), ("audiocaps", "b", None)]
    config.data_dir = ["a"]
    with pytest.raises(ValueError, match=re.escape("2 datasets in folders (clotho, audiocaps), but 1 --data-dir")):
        config.sources()
    config.columns = ["caption"]
    with pytest.raises(ValueError, match="OURS=THEIRS"):
        column_mapping(config.columns)
