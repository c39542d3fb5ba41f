"""Whole runs of `recap pretrain`: they learn, resume exactly, and what they leave goes into `recap train`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_parts import captions_of, make_captioner, write_clip, write_clotho

from recap_cli import build_parser, main
from recap_hf import CaptionDatastore, RecapFeatureExtractor
from recap_hf.training.checkpoints import load_checkpoint
from recap_hf.training.config import load_config
from recap_hf.training.run import train
from recap_hf.training.tasks.bases import new_captioner
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig
from recap_hf.training.tasks.clap import ClapTrainingConfig
from recap_hf.training.tasks.language_model import LanguageModelTrainingConfig

TINY = {
    "audio_config": {
        "patch_size": 8,
        "patch_stride": [8, 8],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 32,
        "depths": [1, 1, 1],
        "num_hidden_layers": 3,
        "num_attention_heads": [1, 2, 2],
        "hidden_dropout_prob": 0.0,
    },
    "text_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 80,
    },
    "projection_dim": 16,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    write_clotho(folder / "clotho", train=12, validation=4)
    write_clip(folder / "clotho" / "development" / "clip 0.wav", 0, seconds=12.0)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def clap_config(start: Path, output: Path, **changes: Any) -> ClapTrainingConfig:
    settings = {
        "dataset": ["clotho"],
        "data_dir": [str(start / "clotho")],
        "clap_config": str(start / "tiny.json"),
        "vocab_size": 400,
        "feature_cache": str(start / "mels"),
        "output_dir": str(output),
        "batch_size": 6,
        "num_train_epochs": 3,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 99,
        "device": "cpu",
    }
    return ClapTrainingConfig(**{**settings, **changes}).validate()


def lm_config(start: Path, output: Path, **changes: Any) -> LanguageModelTrainingConfig:
    settings = {
        "dataset": ["clotho"],
        "data_dir": [str(start / "clotho")],
        "output_dir": str(output),
        "vocab_size": 400,
        "num_layers": 1,
        "width": 32,
        "num_heads": 2,
        "max_positions": 256,
        "batch_size": 16,
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "logging_steps": 2,
        "save_steps": 3,
        "save_total_limit": 99,
        "device": "cpu",
    }
    return LanguageModelTrainingConfig(**{**settings, **changes}).validate()


@pytest.fixture(scope="module")
def clap(start: Path) -> tuple[Path, dict[str, Any]]:
    return start / "clap", train(clap_config(start, start / "clap"))


@pytest.fixture(scope="module")
def language_model(start: Path) -> tuple[Path, dict[str, Any]]:
    return start / "lm", train(lm_config(start, start / "lm"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------- CLAP


def test_clap_learns_and_reports_retrieval(clap):
    report = clap[1]
    assert report["losses"][-1]["loss"] < report["losses"][0]["loss"]
    names = {
        f"{way}_{metric}" for way in ("audio_to_text", "text_to_audio") for metric in ("r1", "r5", "r10", "map10")
    }
    assert names | {"loss", "map10"} <= set(report["evaluations"][-1])
    assert [entry["step"] for entry in report["evaluations"]] == [0, 2, 4, 6]
    assert report["best"]["value"] == max(entry["map10"] for entry in report["evaluations"][1:])
    assert report["data"]["splits"]["train"]["clips"] == 12
    assert json.loads((clap[0] / "report.json").read_text())["kind"] == "clap"


def test_clap_loads_by_the_stock_classes(clap):
    from transformers import AutoTokenizer, ClapModel

    model = ClapModel.from_pretrained(clap[0])
    assert model.config.audio_config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(clap[0])("a dog barks")["input_ids"][0] == 0
    assert RecapFeatureExtractor.from_clap_pretrained(clap[0]).frequency_max == 14_000


@pytest.mark.parametrize("step", [1, 4])
def test_clap_resumes_exactly(start: Path, clap, tmp_path: Path, step: int):
    (tmp_path / "checkpoints").mkdir()
    for kept in range(1, step + 1):
        shutil.copy(clap[0] / "checkpoints" / f"checkpoint-{kept}.pt", tmp_path / "checkpoints")
    if clap[1]["best"]["step"] <= step:
        shutil.copy(clap[0] / "checkpoints" / "best.pt", tmp_path / "checkpoints")
    report = train(clap_config(start, tmp_path, resume=True))
    assert report["losses"] == clap[1]["losses"]
    assert report["evaluations"] == clap[1]["evaluations"]
    one, two = (load_checkpoint(folder / "checkpoints/checkpoint-6.pt")["weights"] for folder in (clap[0], tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_passes_compare_the_clips_of_all(start: Path, clap, tmp_path: Path):
    """Two passes of three clips are one step of six, not two steps of three."""
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4}
    report = train(clap_config(start, tmp_path, lr_scheduler_type="constant", **changes))
    whole = train(clap_config(start, tmp_path / "whole", lr_scheduler_type="constant", max_steps=4))
    assert report["global_batch_size"] == 6
    for ours, expected in zip(report["losses"], whole["losses"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_fine_tuning_starts_from_the_given_clap(start: Path, clap, tmp_path: Path):
    changes = {"clap": str(clap[0]), "clap_config": "", "freeze": "text", "max_steps": 1, "warmup_steps": 0}
    report = train(clap_config(start, tmp_path, **changes))
    before = next(entry for entry in clap[1]["evaluations"] if entry["step"] == clap[1]["best"]["step"])
    assert report["evaluations"][0]["map10"] == pytest.approx(before["map10"])
    old, new = weights(clap[0]), weights(tmp_path)
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert any(name.startswith("audio_model.") for name in changed)
    assert not any(name.startswith(("text_model.", "text_projection.")) or "batch_norm" in name for name in changed)


def test_fine_tuning_the_clap_of_a_captioner(start: Path, tmp_path: Path):
    model, processor = make_captioner()
    model.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    train(clap_config(start, tmp_path / "out", clap=str(tmp_path / "captioner"), clap_config="", max_steps=1))
    assert weights(tmp_path / "out")["text_model.embeddings.word_embeddings.weight"].shape[1] == 16


def test_one_clip_cannot_be_told_from_others(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="at least two clips"):
        train(clap_config(start, tmp_path, max_train_clips=1))
    with pytest.raises(ValueError, match=re.escape("6 clips in a step are too few for 4 passes")):
        train(clap_config(start, tmp_path / "b", gradient_accumulation_steps=4))


# --------------------------------------------------------------- language model


def test_perplexity_falls(language_model):
    evaluations = language_model[1]["evaluations"]
    assert [entry["step"] for entry in evaluations] == [0, 4, 8, 12, 16]
    assert evaluations[-1]["perplexity"] < evaluations[1]["perplexity"] < evaluations[0]["perplexity"] / 2
    # An untrained model of 400 tokens knows as much as a die of 400 faces.
    assert evaluations[0]["perplexity"] == pytest.approx(400, rel=0.15)
    assert "perplexity_without_captions" in evaluations[-1]


def test_language_model_loads_and_has_no_cross_attention(language_model):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(language_model[0])
    tokenizer = AutoTokenizer.from_pretrained(language_model[0])
    assert not model.config.add_cross_attention
    ids = tokenizer("This audio sounds like:", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("This audio sounds like:")


@pytest.mark.parametrize("step", [3, 6])
def test_language_model_resumes_exactly(start: Path, language_model, tmp_path: Path, step: int):
    folder, whole = language_model
    (tmp_path / "checkpoints").mkdir()
    for path in (folder / "checkpoints").glob("checkpoint-*.pt"):
        if int(path.stem.rpartition("-")[2]) <= step:
            shutil.copy(path, tmp_path / "checkpoints")
    report = train(lm_config(start, tmp_path, resume=True))
    assert report["losses"] == whole["losses"]
    assert report["evaluations"] == whole["evaluations"]
    assert same(folder, tmp_path)


def test_activations_computed_again_give_the_same_losses(start: Path, language_model, tmp_path: Path):
    report = train(lm_config(start, tmp_path, gradient_checkpointing=True))
    for ours, whole in zip(report["losses"], language_model[1]["losses"], strict=True):
        assert ours["loss"] == pytest.approx(whole["loss"], abs=1e-4)


def test_accumulated_passes_give_the_same_losses(start: Path, language_model, tmp_path: Path):
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    report = train(lm_config(start, tmp_path, **changes))
    for ours, whole in zip(report["losses"], language_model[1]["losses"], strict=True):
        assert ours["loss"] == pytest.approx(whole["loss"], abs=1e-4)


def test_prompts_of_nearest_captions(start: Path, clap, tmp_path: Path):
    """Of the training captions embedded by a CLAP, and of a datastore as it is."""
    report = train(lm_config(start, tmp_path / "a", clap=str(clap[0]), draw_from=8, max_steps=2))
    assert report["steps"] == 2
    config = CaptionerTrainingConfig(dataset=["x"], output_dir="x", clap=str(clap[0]), decoder=str(tmp_path / "a"))
    captioner = new_captioner(config)
    captions = [{"caption": text, "clip_id": str(n)} for n in range(12) for text in captions_of(n)]
    CaptionDatastore.from_captions(captions, *captioner).save_pretrained(tmp_path / "store")
    # The datastore as the corpus, without recordings.
    store = str(tmp_path / "store")
    settings = {"dataset": [store], "data_dir": [], "datastore": store, "clap": str(clap[0])}
    report = train(lm_config(start, tmp_path / "b", **settings, validation_share=0.25, max_steps=2))
    assert report["data"]["splits"] == {
        "validation": {"clips": 3, "captions": 15},
        "train": {"clips": 9, "captions": 45},
    }
    with pytest.raises(ValueError, match="--datastore is searched by embeddings of captions: give --clap"):
        lm_config(start, tmp_path / "c", datastore=store)


def test_a_file_of_captions_and_an_existing_decoder(start: Path, clap, language_model, tmp_path: Path):
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(text for number in range(12) for text in captions_of(number)) + "\n")
    settings = {"dataset": [str(path)], "data_dir": [], "datastore": str(path), "clap": str(clap[0])}
    settings |= {"validation_share": 0.05}
    report = train(lm_config(start, tmp_path / "out", **settings, decoder=str(language_model[0]), max_steps=1))
    assert report["data"]["splits"]["train"]["captions"] + report["data"]["splits"]["validation"]["captions"] == 60
    # It goes on where the given one was: far from a die of 400 faces.
    assert report["evaluations"][0]["perplexity"] < 100


def test_captions_without_company_are_told(start: Path, tmp_path: Path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("recap_hf"), "propagate", True)
    lines = "".join(f"{n},{'x' * 10}{n},0,a sound of kind {n}\n" for n in range(9))
    (tmp_path / "train.csv").write_text("audiocap_id,youtube_id,start_time,caption\n" + lines)
    settings = {"dataset": ["audiocaps"], "data_dir": [str(tmp_path)], "validation_share": 0.25, "max_steps": 1}
    train(lm_config(start, tmp_path / "out", **settings))
    assert "7 of 7 captions are the only ones of their clip" in caplog.text


# -------------------------------------------------------------------- together


def test_both_bases_go_straight_into_training(start: Path, clap, language_model, tmp_path: Path):
    from transformers import pipeline

    config = CaptionerTrainingConfig(
        dataset=["clotho"],
        data_dir=[str(start / "clotho")],
        clap=str(clap[0]),
        decoder=str(language_model[0]),
        output_dir=str(tmp_path),
        batch_size=12,
        learning_rate=5e-3,
        num_train_epochs=2,
        logging_steps=1,
        device="cpu",
    ).validate()
    report = train(config)
    # Of whole epochs: batches differ in the length of their captions.
    losses = [one["loss"] for one in report["losses"]]
    assert len(losses) == 10 and sum(losses[5:]) < sum(losses[:5])
    result = pipeline("audio-captioning", model=str(tmp_path))(str(start / "clotho" / "validation" / "clip 12.wav"))
    assert isinstance(result["caption"], str)


# ---------------------------------------------------------------------- the command


def test_flags_and_recipes(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 128\nfreeze: text\n")
    base = ["pretrain", "clap", "--dataset", "clotho", "--data-dir", "d", "--output-dir", "o"]
    args = build_parser("pretrain").parse_args(
        [*base, "--config", str(recipe), "--batch-size", "8", "--max_steps", "3"]
    )
    config = load_config(args, ClapTrainingConfig)
    assert (config.batch_size, config.freeze, config.max_steps) == (8, "text", 3)
    # Every setting of the language model is a flag, and none of audio.
    flags = build_parser("pretrain").parse_args(["pretrain", "language-model", "--prompt-weight", "0.5"])
    assert flags.prompt_weight == 0.5
    with pytest.raises(SystemExit):
        build_parser("pretrain").parse_args(["pretrain", "language-model", "--encode-batch-size", "4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clap", "--output-dir", "o"], "no --dataset given"),
        (["clap", "--clap", "a", "--clap-config", "b", "--output-dir", "o"], "give either --clap"),
        (["language-model", "--output-dir", "o"], "no --dataset given"),
        (["language-model", "--width", "30", "--num-heads", "4", "--output-dir", "o"], "--width must be a multiple"),
        (["language-model", "--max-positions", "64", "--output-dir", "o"], "--max-positions must be at least 120"),
    ],
)
def test_what_does_not_fit_is_explained(arguments: list[str], message: str, capsys):
    assert main(["pretrain", *arguments]) == 1
    assert message in capsys.readouterr().err
