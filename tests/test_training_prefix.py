"""Training with a prefix in the place of cross-attention: the loss, what is trained, whole runs, the commands."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_parts import captions_of, make_captioner, write_clotho

from recap_cli import main
from recap_hf import RecapEncoderOutput, RecapForConditionalGeneration, RecapProcessor
from recap_hf.training.collator import CaptionCollator, Example
from recap_hf.training.loss import CaptionLoss, behind_prefix
from recap_hf.training.run import train
from recap_hf.training.tasks.bases import new_captioner
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with an untrained captioner with cross-attention, data in Clotho's layout, and a cache of features."""
    folder = tmp_path_factory.mktemp("prefix")
    model, processor = make_captioner()
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    write_clotho(folder / "clotho")
    return folder


def config(start, output, **changes) -> CaptionerTrainingConfig:
    settings = {
        "dataset": ["clotho"],
        "data_dir": [str(start / "clotho")],
        "model": str(start / "untrained"),
        "conditioning": "prefix",
        "prefix_length": 3,
        "feature_cache": str(start / "features"),
        "output_dir": str(output),
        "batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 5e-3,
        "save_steps": 3,
        "save_total_limit": 99,
        "device": "cpu",
    }
    return CaptionerTrainingConfig(**{**settings, **changes}).validate()


@pytest.fixture(scope="module")
def parts(start):
    return new_captioner(config(start, start / "parts"))


def target(processor, text):
    return [*processor._encode(" " + text), processor.tokenizer.eos_token_id]


def test_behind_prefix():
    mask = torch.tensor([[[[True, False, False], [True, True, False], [True, False, True]]]])
    grown = behind_prefix(mask, 2)[0, 0].int().tolist()
    assert grown == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]


def test_loss_equals_the_models_own(parts):
    """Captions behind one prompt and captions apart: the sum of the losses that the whole model gives."""
    model, processor = parts
    prompts = [processor._encode("This audio sounds like:"), processor._encode("rain. This audio sounds like:")]
    targets = [[target(processor, text) for text in captions_of(clip, 3)] for clip in range(2)]
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(length, 16, generator=generator).half().numpy() for length in (6, 9)]
    collate = CaptionCollator(processor.tokenizer.pad_token_id)
    batch = collate([Example(*row) for row in zip(prompts, targets, states, strict=True)])
    loss_module = CaptionLoss(model.decoder, model.prefix_mapper)
    with torch.no_grad():
        together = loss_module(batch.to("cpu", torch.float32)).sum()
        apart = expected = 0.0
        for prompt, captions, state in zip(prompts, targets, states, strict=True):
            for tokens in captions:
                single = collate([Example(prompt, [tokens], state)])
                apart += loss_module(single.to("cpu", torch.float32)).sum()
                output = model(
                    encoder_outputs=RecapEncoderOutput(last_hidden_state=torch.from_numpy(state).float()[None]),
                    decoder_input_ids=torch.tensor([[*prompt, *tokens]]),
                    labels=torch.tensor([[-100] * len(prompt) + tokens]),
                )
                expected += output.loss * len(tokens)
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


def test_a_captioner_changes_its_conditioning(parts, start):
    model, processor = parts
    assert model.config.conditioning == "prefix" and model.prefix_mapper.length == 3
    assert processor.max_prompt_tokens == RecapProcessor.from_pretrained(start / "untrained").max_prompt_tokens - 3
    processor.check_model(model)
    untrained = RecapForConditionalGeneration.from_pretrained(start / "untrained")
    assert torch.equal(
        model.decoder.transformer.h[0].mlp.c_fc.weight, untrained.decoder.transformer.h[0].mlp.c_fc.weight
    )
    assert model.generation_config.num_beams == untrained.generation_config.num_beams


def test_from_two_bases(start, tmp_path):
    """The paper's way of starting, with a prefix."""
    untrained = RecapForConditionalGeneration.from_pretrained(start / "untrained")
    processor = RecapProcessor.from_pretrained(start / "untrained")
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        untrained.clap, untrained.decoder, conditioning="prefix"
    )
    model.clap.save_pretrained(tmp_path / "clap")
    processor.clap_tokenizer.save_pretrained(tmp_path / "clap")
    model.decoder.save_pretrained(tmp_path / "gpt2")
    processor.tokenizer.save_pretrained(tmp_path / "gpt2")
    bases = {"model": "", "clap": str(tmp_path / "clap"), "decoder": str(tmp_path / "gpt2")}
    made, _ = new_captioner(config(start, tmp_path / "out", **bases))
    assert made.config.conditioning == "prefix" and made.config.prefix_length == 3
    plain, _ = new_captioner(config(start, tmp_path / "out", **bases, **{"conditioning": ""}))
    assert plain.config.conditioning == "cross_attention"


def test_position_embeddings_stay_until_another_choice(start, tmp_path):
    chosen = {"conditioning": "", "audio_position_embedding": "sinusoidal"}
    model, processor = new_captioner(config(start, tmp_path / "out", **chosen))
    assert model.config.audio_position_embedding == "sinusoidal"
    model.save_pretrained(tmp_path / "placed")
    processor.save_pretrained(tmp_path / "placed")
    again = {"conditioning": "", "model": str(tmp_path / "placed")}
    for choice, expected in (("", "sinusoidal"), ("none", None)):
        model, _ = new_captioner(config(start, tmp_path / "out", **again, audio_position_embedding=choice))
        assert model.config.audio_position_embedding == expected


def test_same_seed_draws_the_same_mapper(parts, start):
    first = parts[0].prefix_mapper.state_dict()
    again = new_captioner(config(start, start / "parts"))[0].prefix_mapper.state_dict()
    other = new_captioner(config(start, start / "parts", seed=1))[0].prefix_mapper.state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    assert not torch.equal(other["out.weight"], first["out.weight"])


def test_run_with_a_prefix(start):
    """It learns, only the mapping changes, and a run that was cut off ends at the same weights."""
    output = start / "finished"
    report = train(config(start, output))
    losses = [entry["loss"] for entry in report["evaluations"]]
    # Little: the language model is random and frozen.
    assert losses[-1] < losses[0]
    assert report["conditioning"] == "prefix"
    before, after = load_file(start / "untrained" / "model.safetensors"), load_file(output / "model.safetensors")
    mapping = {name for name in after if name.startswith("prefix_mapper.")}
    assert report["trained_parameters"] == sum(after[name].numel() for name in mapping)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in mapping)
    assert not any("crossattention" in name for name in after)
    assert "embeddings before the prompt" in (output / "README.md").read_text()

    cut = start / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copy(output / "checkpoints" / "checkpoint-3.pt", cut / "checkpoints")
    train(config(start, cut, resume=True))
    again = load_file(cut / "model.safetensors")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_prompts_shared_or_not_and_no_retrieval(start, tmp_path):
    shared = train(config(start, tmp_path / "shared", share_prompts=True, max_steps=2))
    assert shared["steps"] == 2
    without = train(config(start, tmp_path / "without", num_retrieved=0, max_steps=2))
    assert without["datastore_captions"] == 0
    assert RecapProcessor.from_pretrained(tmp_path / "without").num_retrieved_captions == 0


def test_commands_train_caption_and_evaluate(start, capsys):
    output = start / "command"
    flags = ["--dataset", "clotho", "--data-dir", str(start / "clotho"), "--feature-cache", str(start / "features")]
    flags += ["--model", str(start / "untrained"), "--conditioning", "prefix", "--max-steps", "2", "--device", "cpu"]
    assert main(["train", *flags, "--output-dir", str(output)]) == 0
    capsys.readouterr()
    clip = next((start / "clotho" / "validation").glob("*.wav"))
    assert main(["caption", str(clip), "--model", str(output), "--format", "json", "--device", "cpu"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert len(result["retrieved"]) == 4 and "caption" in result
    flags = ["--model", str(output), "--dataset", "clotho", "--data-dir", str(start / "clotho"), "--device", "cpu"]
    flags += ["--split", "validation", "--no-scores", "--output-dir", str(output / "evaluation")]
    assert main(["evaluate", *flags]) == 0
    lines = (output / "evaluation" / "recap.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all("prediction" in json.loads(line) for line in lines)
    settings = json.loads((output / "evaluation" / "run.json").read_text())
    assert settings["captioner"]["conditioning"] == "prefix" and len(settings["systems"]) == 6


def test_keeping_another_conditioning_is_refused(start, tmp_path):
    message = "has, which is cross_attention on hidden states: not together with another --conditioning"
    with pytest.raises(ValueError, match=message):
        new_captioner(config(start, tmp_path, keep_cross_attention=True))
