"""Whole runs of a tiny captioner: it learns, resumes exactly, reports, and its folder loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_parts import SHORT_RUN, make_captioner, write_clotho

from recap_hf import RecapForConditionalGeneration, RecapProcessor
from recap_hf.training.checkpoints import Checkpoints, load_checkpoint
from recap_hf.training.collator import PromptOptions
from recap_hf.training.plans import Row
from recap_hf.training.run import train
from recap_hf.training.tasks.bases import new_captioner
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig, build_corpus


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with an untrained captioner, data in Clotho's layout, and a cache of features."""
    folder = tmp_path_factory.mktemp("training")
    model, processor = make_captioner()
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    write_clotho(folder / "clotho")
    return folder


def config(start: Path, output: Path, **changes: Any) -> CaptionerTrainingConfig:
    settings = {
        "dataset": ["clotho"],
        "data_dir": [str(start / "clotho")],
        "model": str(start / "untrained"),
        "feature_cache": str(start / "features"),
        "output_dir": str(output),
        "learning_rate": 5e-3,
    }
    return CaptionerTrainingConfig(**{**SHORT_RUN, **settings, **changes}).validate()


@pytest.fixture(scope="module")
def finished(start: Path) -> tuple[Path, dict[str, Any]]:
    output = start / "finished"
    return output, train(config(start, output))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_validation_loss_falls(finished):
    losses = [entry["loss"] for entry in finished[1]["evaluations"]]
    assert [entry["step"] for entry in finished[1]["evaluations"]] == [0, 5, 10]
    assert losses[2] < losses[1] < losses[0]


def test_training_prompts_hold_the_nearest_captions_and_options_arrive(start: Path, tmp_path: Path):
    settings = config(
        start,
        tmp_path,
        draw_from=6,
        shuffle_prompt=True,
        vary_num_retrieved=True,
        audio_dropout=0.25,
        prompt_dropout=0.5,
        seed=11,
    )
    builder = build_corpus(settings, *new_captioner(settings))[0]["train"]
    shares = {"audio_dropout": 0.25, "prompt_dropout": 0.5}
    assert builder.options == PromptOptions(k=4, draw_from=6, shuffle=True, vary_k=True, **shares, seed=11)
    plain = config(start, tmp_path)
    builder = build_corpus(plain, *new_captioner(plain))[0]["train"]
    assert all(len(builder.retrieved(row, epoch=0)) == 4 for row in (Row(0, (0,)), Row(5, (2,)), Row(7, (4,))))


def test_only_the_cross_attention_changes(start: Path, finished):
    before, after = weights(start / "untrained"), weights(finished[0])
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(
        re.fullmatch(r"decoder\.transformer\.h\.\d+\.crossattention\.\w+\.(weight|bias)", name) for name in changed
    )


def test_the_bases_of_a_checkpoint_start_with_fresh_cross_attention(start: Path, finished):
    """The default where no model is named; a checkpoint that is named goes on from its own."""
    model, _ = new_captioner(config(start, start / "x", model=str(finished[0]), keep_cross_attention=False))
    kept, _ = new_captioner(config(start, start / "x", model=str(finished[0])))
    trained = weights(finished[0])
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
    same_again, _ = new_captioner(config(start, start / "x", model=str(finished[0]), keep_cross_attention=False))
    for name in trained:
        assert torch.equal(kept.state_dict()[name], trained[name])
        assert torch.equal(same_again.state_dict()[name], fresh[name])
        if ".crossattention." not in name:
            assert torch.equal(fresh[name], trained[name])
    weight = fresh["decoder.transformer.h.0.crossattention.c_attn.weight"]
    assert not torch.equal(weight, trained["decoder.transformer.h.0.crossattention.c_attn.weight"])
    # GPT-2's scheme: standard deviation 0.02, no bias.
    assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not fresh["decoder.transformer.h.0.crossattention.c_attn.bias"].any()


def test_the_folder_captions_through_the_pipeline(start: Path, finished):
    from transformers import pipeline

    clip = str(start / "clotho" / "validation" / "clip 8.wav")
    result = pipeline("audio-captioning", model=str(finished[0]))(clip)
    assert isinstance(result["caption"], str)
    assert len(result["retrieved"]) == 4
    processor = RecapProcessor.from_pretrained(finished[0])
    assert len(processor.datastore) == 40
    assert {"clip_id", "source", "licence"} <= set(processor.datastore.records[0])
    RecapForConditionalGeneration.from_pretrained(finished[0])


def test_the_report_tells_what_happened(finished):
    folder, report = finished
    written = json.loads((folder / "report.json").read_text())
    assert {name: written[name] for name in report} == report
    assert report["data"]["splits"]["train"]["captions"] == 40
    assert (report["steps"], report["steps_per_epoch"], report["global_batch_size"]) == (10, 5, 8)
    assert report["machine"]["world_size"] == 1
    assert [entry["step"] for entry in report["losses"]] == [2, 4, 6, 8, 10]
    assert report["best"]["value"] == min(entry["loss"] for entry in report["evaluations"])
    card = (folder / "README.md").read_text()
    assert "clotho" in card
    assert "Tampere University" in card


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_resumed_run_ends_with_the_same_weights(start: Path, finished, tmp_path: Path, step: int):
    """The state in which a SIGKILL after the checkpoint of `step` leaves the folder."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for kept in (3, 5, 6):
        if kept <= step:
            shutil.copy(finished[0] / "checkpoints" / f"checkpoint-{kept}.pt", checkpoints)
    (checkpoints / ".checkpoint-9.pt.1.tmp").write_bytes(b"half")
    report = train(config(start, tmp_path, resume=True))
    assert same(weights(tmp_path), weights(finished[0]))
    # Losses too, those from before the kill included.
    assert report["losses"] == finished[1]["losses"]
    assert report["evaluations"] == finished[1]["evaluations"]
    assert not list(checkpoints.glob(".*.tmp"))


def test_a_folder_with_checkpoints_is_not_overwritten_by_accident(start: Path, finished):
    with pytest.raises(ValueError, match=re.escape("holds checkpoints of a run (up to checkpoint-10.pt)")):
        train(config(start, finished[0]))


def test_a_changed_setting_is_named_on_resume(start: Path, finished, tmp_path: Path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("recap_hf"), "propagate", True)
    checkpoint = str(finished[0] / "checkpoints" / "checkpoint-6.pt")
    train(config(start, tmp_path, resume_from_checkpoint=checkpoint, learning_rate=1e-3, max_steps=7))
    assert "learning_rate 0.005 -> 0.001" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(start: Path, finished, tmp_path: Path):
    checkpoint = str(finished[0] / "checkpoints" / "checkpoint-6.pt")
    with pytest.raises(ValueError, match="was written by a run that trained other parts of the model"):
        train(config(start, tmp_path, resume_from_checkpoint=checkpoint, train_decoder=True))


def test_going_back_to_a_checkpoint(start: Path, finished, tmp_path: Path):
    """Not in a folder with later ones, and with the best weights of the steps before it."""
    source = finished[0] / "checkpoints"
    with pytest.raises(ValueError, match=re.escape("(up to step 10): delete those, or give another --output-dir")):
        train(config(start, finished[0], resume_from_checkpoint=str(source / "checkpoint-6.pt")))
    states = {step: load_checkpoint(source / f"checkpoint-{step}.pt") for step in (5, 6)}
    assert states[6]["progress"]["best_step"] == 5
    other = Checkpoints(tmp_path / "other")
    other.save(6, states[6])

    def trained_by(output: Path) -> list[int]:
        """The steps whose weights a run saves that goes on from there, and has nothing left to do."""
        train(config(start, output, resume_from_checkpoint=str(other.latest()), max_steps=6))
        saved = weights(output)
        return [
            step
            for step, state in states.items()
            if all(torch.equal(saved[n], w) for n, w in state["weights"].items())
        ]

    other.save_best(5, states[5]["weights"])
    assert trained_by(tmp_path / "with best") == [5]
    assert Checkpoints(tmp_path / "with best" / "checkpoints").load_best(5) is not None
    # That of a later step is not the best up to this one.
    other.save_best(10, states[5]["weights"])
    assert trained_by(tmp_path / "without") == [6]


def test_a_wrong_call_deletes_no_checkpoint(start: Path, finished, tmp_path: Path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    with pytest.raises(OSError, match="nowhere"):
        train(config(start, tmp_path, data_dir=[str(tmp_path / "nowhere")], overwrite_output_dir=True))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before


def test_accumulated_passes_give_the_same_losses(start: Path, finished, tmp_path: Path):
    report = train(config(start, tmp_path, batch_size=1, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    assert report["global_batch_size"] == 8
    for ours, whole in zip(report["losses"], finished[1]["losses"], strict=True):
        assert ours["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert report["best"]["value"] == pytest.approx(finished[1]["best"]["value"], abs=1e-4)


def test_the_options_for_transfer_run_and_repeat(start: Path, tmp_path: Path):
    changes = {
        "draw_from": 15,
        "shuffle_prompt": True,
        "audio_dropout": 0.3,
        "dropout": 0.1,
        "train_decoder": True,
        "share_prompts": True,
        "gradient_checkpointing": True,
        "max_steps": 3,
        "warmup_steps": 1,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
    }
    first = train(config(start, tmp_path / "a", **changes))
    second = train(config(start, tmp_path / "b", **changes))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert first["losses"] == second["losses"]
    before, after = weights(start / "untrained"), weights(tmp_path / "a")
    assert not torch.equal(before["decoder.transformer.wte.weight"], after["decoder.transformer.wte.weight"])
    assert torch.equal(before["clap.audio_projection.linear1.weight"], after["clap.audio_projection.linear1.weight"])


def test_no_retrieval_trains_and_saves_a_captioner_without_captions(start: Path, tmp_path: Path):
    train(config(start, tmp_path, num_retrieved=0, max_steps=2))
    processor = RecapProcessor.from_pretrained(tmp_path)
    assert processor.num_retrieved_captions == 0
    assert processor.datastore is None


def test_another_datastore_and_turns_between_two(start: Path, tmp_path: Path):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"an aeroplane passes {number} times" for number in range(9)) + "\n")
    train(config(start, tmp_path / "one", datastore=[str(captions)], max_steps=1))
    store = RecapProcessor.from_pretrained(tmp_path / "one").datastore
    assert store.captions[0] == "an aeroplane passes 0 times"
    # The first of several goes with the captioner; the second epoch is prompted from the other.
    report = train(config(start, tmp_path / "two", datastore=["training", str(captions)], max_steps=6))
    assert report["datastore_captions"] == 40
    only_training = train(config(start, tmp_path / "three", max_steps=6))
    assert report["losses"][:2] == only_training["losses"][:2]
    assert report["losses"][2]["loss"] != only_training["losses"][2]["loss"]


def test_early_stopping(start: Path, tmp_path: Path):
    report = train(config(start, tmp_path, early_stopping_patience=1, learning_rate=30.0, num_train_epochs=9))
    assert report["stopped_early"]
    assert report["steps"] < 45
    # What is saved is the best, not the last.
    assert report["best"]["step"] < report["steps"]


def test_missing_and_broken_clips_are_counted(start: Path, tmp_path: Path):
    shutil.copytree(start / "clotho", tmp_path / "clotho")
    (tmp_path / "clotho" / "development" / "clip 1.wav").unlink()
    (tmp_path / "clotho" / "development" / "clip 2.wav").write_bytes(b"x")
    settings = {"data_dir": [str(tmp_path / "clotho")], "max_steps": 1}
    with pytest.raises(FileNotFoundError, match="1 clips have no audio file"):
        train(config(start, tmp_path / "out", **settings))
    report = train(config(start, tmp_path / "out", allow_missing=True, **settings))
    assert report["left_out"]["counts"] == {"missing": 1, "unreadable": 1}
    assert [item["clip_id"] for item in report["left_out"]["clips"]] == ["clip 1.wav", "clip 2.wav"]
    assert report["data"]["splits"]["train"]["clips"] == 6


def test_a_split_that_is_not_there_names_the_remedies(start: Path, tmp_path: Path):
    shutil.copytree(start / "clotho", tmp_path / "clotho")
    (tmp_path / "clotho" / "clotho_captions_validation.csv").unlink()
    settings = {"data_dir": [str(tmp_path / "clotho")], "max_steps": 1}
    with pytest.raises(FileNotFoundError, match=re.escape("give --validation-split none")):
        train(config(start, tmp_path / "out", **settings))
    report = train(config(start, tmp_path / "out", validation_share=0.25, **settings))
    assert report["data"]["splits"]["validation"]["clips"] == 2
    assert train(config(start, tmp_path / "none", validation_split="none", **settings))["evaluations"] == []


def test_trackers_get_the_figures(start: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = train(config(start, tmp_path, report_to=["tensorboard"], max_steps=2))
    # The settings lie in a folder of their own below.
    events = min(tmp_path.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))
    logged = EventAccumulator(str(events.parent))
    logged.Reload()
    losses = [(event.step, event.value) for event in logged.Scalars("train/loss")]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in report["losses"]]
    assert "validation/loss" in logged.Tags()["scalars"]


def test_a_tracker_that_is_not_there_is_refused(start: Path, tmp_path: Path):
    with pytest.raises(ImportError, match="--report-to dvclive: not installed"):
        train(config(start, tmp_path, report_to=["dvclive"]))


def test_a_push_without_a_login_is_refused_before_the_training(start: Path, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--push-to-hub needs a login"):
        train(config(start, tmp_path, push_to_hub=True))
