"""Training without audio: embeddings of captions stand for recordings, and everything else stays as it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_parts import SHORT_RUN, captions_of, make_captioner, write_clotho

from recap_hf import Captioner, RecapForConditionalGeneration
from recap_hf.training.collator import with_noise
from recap_hf.training.plans import Row
from recap_hf.training.run import train
from recap_hf.training.task import Key
from recap_hf.training.tasks.bases import new_captioner
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig, build_corpus
from recap_hf.training.text_only import PUBLISHED_NOISE, measured_gap


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with an untrained captioner, captions of 12 clips with ids, others without, and recordings."""
    folder = tmp_path_factory.mktemp("text-only")
    model, processor = make_captioner()
    for part in (model, processor):
        part.save_pretrained(folder / "bases")
    rows = [f'clip {number},"{text}"' for number in range(12) for text in captions_of(number, 3)]
    (folder / "captions.csv").write_text("clip_id,caption\n" + "\n".join(rows) + "\n")
    (folder / "more.txt").write_text("a bell rings in the fog\na clock strikes twelve\n")
    write_clotho(folder / "clotho", train=6, validation=2)
    return folder


def config(start: Path, output: Path, **changes: Any) -> CaptionerTrainingConfig:
    settings = {
        "text_only": [str(start / "captions.csv"), str(start / "more.txt")],
        "model": str(start / "bases"),
        "feature_cache": str(start / "cache"),
        "output_dir": str(output),
        "learning_rate": 2e-2,
        "seed": 3,
    }
    return CaptionerTrainingConfig(**{**SHORT_RUN, **settings, **changes}).validate()


@pytest.fixture(scope="module")
def finished(start: Path) -> tuple[Path, dict[str, Any]]:
    output = start / "finished"
    return output, train(config(start, output, validation_share=0.2))


def corpus(settings: CaptionerTrainingConfig) -> Any:
    return build_corpus(settings, *new_captioner(settings))[0]["train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_and_the_folder_captions_recordings(start: Path, finished):
    folder, report = finished
    losses = [entry["loss"] for entry in report["evaluations"]]
    assert losses[-1] < losses[0]
    assert report["data"]["splits"]["train"]["captions"] + report["data"]["splits"]["validation"]["captions"] == 38
    assert (report["encoder_states"], report["embedding_noise"]) == ("embedding", PUBLISHED_NOISE)
    assert "no audio was used" in (folder / "README.md").read_text()
    captioner = Captioner.from_pretrained(folder)
    assert captioner.model.config.encoder_states == "embedding"
    [(_, result)] = captioner.caption_stream([start / "clotho" / "validation" / "clip 6.wav"])
    assert isinstance(result.caption, str) and result.untrained is None and len(result.retrieved) == 4


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_ends_with_the_same_weights(start: Path, finished, tmp_path: Path, step: int):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(finished[0] / "checkpoints" / f"checkpoint-{step}.pt", tmp_path / "checkpoints")
    report = train(config(start, tmp_path, validation_share=0.2, resume=True))
    assert same(weights(tmp_path), weights(finished[0]))
    assert (report["losses"], report["evaluations"]) == (finished[1]["losses"], finished[1]["evaluations"])


def test_captions_are_embedded_once_and_no_audio_is_read(start: Path, tmp_path: Path, monkeypatch):
    settings = config(start, tmp_path, feature_cache=str(tmp_path / "cache"))
    embed, count = RecapForConditionalGeneration.embed_captions, []

    def counted(self, captions, *args, **kwargs):
        count.append(len(captions))
        return embed(self, captions, *args, **kwargs)

    monkeypatch.setattr(RecapForConditionalGeneration, "embed_captions", counted)
    monkeypatch.setattr(RecapForConditionalGeneration, "encode_audio", None)
    corpus(settings)
    assert count == [38]
    corpus(settings)
    assert count == [38]


def test_prompts_hold_no_caption_of_the_clip(start: Path, tmp_path: Path):
    """Neither the target nor the others of its clip, though each caption is an example of its own."""
    examples = corpus(config(start, tmp_path))
    assert len(examples.clips) == 38 and all(len(clip.captions) == 1 for clip in examples.clips)
    for number, clip in enumerate(examples.clips[:36]):
        prompt = examples.retrieved(Row(number, (0,)), epoch=0)
        assert len(prompt) == 4 and not set(prompt) & set(captions_of(int(clip.clip_id.split()[1]), 3))


def test_shared_prompts_keep_the_captions_of_a_clip_together(start: Path, tmp_path: Path):
    examples = corpus(config(start, tmp_path, share_prompts=True, embedding_noise=0.0))
    assert [len(clip.captions) for clip in examples.clips] == [3] * 12 + [1] * 2
    model, processor = make_captioner()
    texts = model.embed_captions(examples.clips[5].captions, processor)
    mean = texts.mean(axis=0) / np.linalg.norm(texts.mean(axis=0))
    states = examples[Key(Row(5, (0, 2)))].states
    np.testing.assert_allclose(states, mean[None] * texts.shape[1] ** 0.5, atol=2e-3)
    assert train(config(start, tmp_path / "run", share_prompts=True, max_steps=2))["steps"] == 2


def test_noise_is_drawn_anew_in_every_epoch_and_always_the_same(start: Path, tmp_path: Path):
    noisy = corpus(config(start, tmp_path))
    clean = corpus(config(start, tmp_path, embedding_noise=0.0))
    row = Row(7, (0,))
    first, again, later = (noisy[Key(row, epoch)].states for epoch in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, later)
    assert np.array_equal(clean[Key(row, 0)].states, clean[Key(row, 1)].states)
    # Queries have noise, too.
    assert not np.allclose(noisy.features.read("7", "embeds"), clean.features.read("7", "embeds"), atol=1e-2)
    assert np.array_equal(clean.features.read("7", "embeds")[0], clean.features.embeds[7])


def test_the_width_of_the_noise():
    """A unit vector with noise of width s in P dimensions has a cosine of 1 / sqrt(1 + P s^2) with itself."""
    embeds = np.zeros((2, 4096), dtype=np.float32)
    embeds[0, 5], embeds[1, 9] = 1.0, 3.0
    found = with_noise(embeds, 0.02, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose([found[0, 5], found[1, 9] / 3], [1 / np.sqrt(1 + 4096 * 0.0004)] * 2, atol=0.03)
    assert np.array_equal(with_noise(embeds, 0.0, np.random.default_rng(0)), embeds)


def test_the_measured_gap_moves_captions_to_their_recordings(start: Path, tmp_path: Path):
    model, processor = make_captioner()
    texts = ["a dog barks", "rain falls"]
    (tmp_path / "metadata.csv").write_text("file_name,caption\nclip 0.wav,a dog barks\nclip 1.wav,rain falls\n")
    captioner, audio = Captioner(model, processor), []
    for number in range(2):
        path = shutil.copy(start / "clotho" / "development" / f"clip {number}.wav", tmp_path)
        audio.append(captioner.encode([captioner.read(path)]).audio_embeds[0, 0].numpy())
    audio, text = np.stack(audio), np.stack([model.embed_captions([each], processor)[0] for each in texts])
    if (audio * text).sum() < 0:
        turn_texts_around(model)
        text = -text
    gap = measured_gap(str(tmp_path), model, processor)
    np.testing.assert_allclose(gap.shift, [(a + b) / 2 for a, b in zip(*(audio - text), strict=True)], atol=1e-6)
    moved = [vector / np.linalg.norm(vector) for vector in text + gap.shift]
    mean = np.mean([a @ b for a, b in zip(audio, moved, strict=True)])
    assert 1 / np.sqrt(1 + 16 * gap.noise**2) == pytest.approx(mean, rel=1e-4)
    turn_texts_around(model)
    with pytest.raises(ValueError, match="have a mean cosine of -"):
        measured_gap(str(tmp_path), model, processor)


def turn_texts_around(model) -> None:
    with torch.no_grad():
        model.clap.text_projection.linear2.weight.neg_()
        model.clap.text_projection.linear2.bias.neg_()


def test_a_run_conditions_on_shifted_captions(start: Path, tmp_path: Path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "metadata.csv").write_text("file_name,caption\nclip 0.wav,a dog barks\n")
    shutil.copy(start / "clotho" / "development" / "clip 0.wav", pairs)
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog barks\nrain falls\n")
    settings = config(start, tmp_path / "out", text_only=[str(captions)], gap_pairs=str(pairs))
    model, processor = new_captioner(settings)
    captioner = Captioner(model, processor)
    audio = captioner.encode([captioner.read(pairs / "clip 0.wav")]).audio_embeds[0, 0].numpy()
    if model.embed_captions(["a dog barks"], processor)[0] @ audio < 0:
        turn_texts_around(model)
    examples, _, _ = build_corpus(settings, model, processor)
    store = examples["train"].features
    # The one pair's caption lies on its recording, and other captions are moved by the same difference.
    np.testing.assert_allclose(store.embeds[0], audio, atol=1e-5)
    bark, rain = model.embed_captions(["a dog barks", "rain falls"], processor)
    rain = rain + audio - bark
    np.testing.assert_allclose(store.embeds[1], rain / np.linalg.norm(rain), atol=1e-5)


def test_a_few_recordings_go_on_from_there(start: Path, finished, tmp_path: Path):
    paired = {"text_only": [], "dataset": ["clotho"], "data_dir": [str(start / "clotho")], "model": str(finished[0])}
    settings = config(start, tmp_path, max_steps=2, **paired)
    model, _ = new_captioner(settings)
    before = weights(finished[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)
    report = train(settings)
    assert (report["encoder_states"], report["embedding_noise"]) == ("embedding", 0.0)
    changed = [name for name, tensor in weights(tmp_path).items() if not torch.equal(tensor, before[name])]
    assert changed and all(".crossattention." in name for name in changed)


def test_an_untrained_assembly_gets_cross_attention(start: Path, tmp_path: Path):
    from recap_hf.conversion.untrained import assemble

    assemble(str(start / "bases"), str(start / "bases"), start / "more.txt", tmp_path / "untrained")
    model, _ = new_captioner(config(start, tmp_path, model=str(tmp_path / "untrained")))
    assert (model.config.conditioning, model.config.encoder_states) == ("cross_attention", "embedding")
    paired = {"text_only": [], "dataset": ["clotho"], "data_dir": [str(start / "clotho")]}
    model, _ = new_captioner(config(start, tmp_path, model=str(tmp_path / "untrained"), **paired))
    assert (model.config.conditioning, model.config.encoder_states) == ("cross_attention", "hidden")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ["clotho"], "data_dir": ["x"]}, "not together with --dataset"),
        ({"encoder_states": "hidden"}, "not together with --dataset, --encoder-states hidden"),
        ({"datastore": ["training-audio"]}, "--datastore training-audio"),
        ({"text_only": [], "dataset": ["clotho"], "data_dir": ["x"], "gap_pairs": "y"}, "go with --text-only"),
        ({"embedding_noise": -0.1}, "--embedding-noise must be 0 or more"),
        ({"text_only": []}, "no --dataset given"),
    ],
)
def test_settings_that_do_not_fit_are_refused(start: Path, tmp_path: Path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(start, tmp_path, **changes)


def test_settings_that_do_not_fit_the_model_are_refused(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="an embedding of a window has no places"):
        corpus(config(start, tmp_path, audio_position_embedding="sinusoidal"))
    with pytest.raises(ValueError, match="not together with another"):
        corpus(config(start, tmp_path, keep_cross_attention=True))
    paired = {"text_only": [], "dataset": ["clotho"], "data_dir": [str(start / "clotho")], "embedding_noise": 0.1}
    with pytest.raises(ValueError, match="--embedding-noise needs --encoder-states embedding"):
        corpus(config(start, tmp_path, **paired))


def test_the_command(start: Path, tmp_path: Path):
    from recap_cli import main

    given = ["--model", start / "bases", "--output-dir", tmp_path, "--max-steps", 1, "--device", "cpu"]
    given += ["--gap-pairs", start / "missing", "--text-only", start / "captions.csv"]
    assert main(["train", *map(str, given)]) == 1
    given = [*given[:-4], "--projection-temperature", "0.05", "--text-only", start / "captions.csv"]
    assert main(["train", *map(str, given)]) == 0
    assert json.loads((tmp_path / "processor_config.json").read_text())["projection_temperature"] == 0.05
