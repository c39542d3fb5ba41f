"""RECAP proper at toy size: what is trained, what is saved, how it resumes; example recordings; the command line."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from recap_hf import RecapForConditionalGeneration, RecapProcessor
from recap_hf.cli import main
from recap_hf.tiny.captioner import CaptionerRecipe, _tensor_batch, noise_length, train_captioner
from recap_hf.tiny.clap import ClapRecipe, build_clap, train_clap
from recap_hf.tiny.evaluation import ROWS, Evaluator
from recap_hf.tiny.evaluation_sets import Item
from recap_hf.tiny.examples import EXAMPLES, synthesise_example, write_examples
from recap_hf.tiny.grammar import Part, Scene
from recap_hf.tiny.language_model import LanguageModelRecipe, build_language_model
from recap_hf.tiny.naming import NamingRules
from recap_hf.tiny.procedural import synthesise
from recap_hf.tiny.sounds import Clip, SoundBank, find_bursts, mel_power
from recap_hf.tiny.tokenization import train_tokenizers
from recap_hf.tiny.trainer import TrainConfig
from recap_hf.tiny.transfer import DECOYS, GROUPS, evaluate_transfer
from recap_hf.training.step import CaptionLoss

EVENTS = ("rain", "cello", "flute")
CLAP = ClapRecipe(
    patch_embeds_hidden_size=8,
    depths=(1, 1, 1),
    num_attention_heads=(1, 1, 2),
    text_hidden_size=16,
    text_layers=1,
    projection_dim=8,
    batch_size=2,
    text_scenes=2,
    bfloat16=False,
)
LANGUAGE_MODEL = LanguageModelRecipe(n_layer=1, n_embd=16, n_head=2)
CAPTIONER = CaptionerRecipe(
    pool=6, batch_size=2, mixed=0.5, cross_attention_reduce_factor=2, listening_steps=2, promptless_share=0.0
)


@pytest.fixture(scope="module")
def bank() -> SoundBank:
    from recap_hf.tiny.lexicon import HEARD

    clips = []
    for index, event in enumerate((*HEARD, "noise", "tone", "unknown")):
        power = mel_power(synthesise(("unknown", "noise", "tone")[index % 3], index % 6))
        clips.append(Clip(event, event, 1, "test", power, find_bursts(power)))
    return SoundBank(clips)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("parts")
    train_tokenizers(folder / "tokenizers", vocab_size=500, sentences=30)
    torch.manual_seed(0)
    build_clap(AutoTokenizer.from_pretrained(folder / "tokenizers" / "clap"), CLAP).save_pretrained(folder / "clap")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "gpt2")
    build_language_model(tokenizer, LANGUAGE_MODEL).save_pretrained(folder / "language-model")
    return folder / "clap", folder / "language-model", folder / "tokenizers"


def test_noise_that_makes_the_nearest_caption_wrong_often_enough():
    """Two captions. The disturbance turns the first scene at factor 0.5, the second at 2 and the third never."""
    rain, cello = Scene((Part("rain"),)), Scene((Part("cello"),))
    scenes = [rain, rain, cello, Scene((Part("unknown"),))]
    similarity = np.array([[1.0, 0.5], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    disturbance = np.array([[-1.0, 0.0], [-0.5, 0.0], [0.0, 1.0], [0.0, 9.0]], np.float32)

    def length(first_exact):
        return noise_length(similarity, disturbance, scenes, [rain, cello], first_exact)

    assert length(1.0) == 0
    assert length(0.7) == pytest.approx(0.5, abs=2e-3)
    assert length(0.4) == pytest.approx(2.0, abs=4e-3)
    # One scene is told right however long the noise is: it ends somewhere.
    assert 0 < length(0.1) <= 64


@pytest.fixture(scope="module")
def trained(parts, bank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner")
    config = TrainConfig(steps=4, learning_rate=1e-2, warmup_steps=1)
    model, processor = train_captioner(parts, bank, folder, (1,), CAPTIONER, config, EVENTS)
    return folder, model, processor


def test_only_the_cross_attention_is_trained(parts, trained):
    from transformers import ClapModel, GPT2LMHeadModel

    _, model, _ = trained
    for name, value in ClapModel.from_pretrained(parts[0]).state_dict().items():
        assert torch.equal(value, model.clap.state_dict()[name]), name
    for name, value in GPT2LMHeadModel.from_pretrained(parts[1]).state_dict().items():
        assert torch.equal(value, model.decoder.state_dict()[name]), name


def test_the_loss_is_that_of_the_models_own_pass(trained):
    _, model, processor = trained
    inputs = processor.build_training_inputs([["rain", "notes on a cello"], []], ["rain falling", "a flute playing"])
    width = model.config.clap.audio_config.hidden_size
    states = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = CaptionLoss(model.decoder)(_tensor_batch(inputs, states))
        expected = model(encoder_outputs=(states,), **inputs).loss
    assert len(losses) == (inputs["labels"] != -100).sum()
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_first_steps_are_without_prompts(parts, bank, tmp_path, monkeypatch):
    seen = []
    build = RecapProcessor.build_training_inputs

    def watching(self, captions, targets, *args, **kwargs):
        seen.append([len(prompt) for prompt in captions])
        return build(self, captions, targets, *args, **kwargs)

    monkeypatch.setattr(RecapProcessor, "build_training_inputs", watching)
    train_captioner(parts, bank, tmp_path, (1,), CAPTIONER, TrainConfig(steps=4, learning_rate=1e-3), EVENTS)
    assert seen[:2] == [[0, 0], [0, 0]]
    assert all(length > 0 for step in seen[2:] for length in step) and len(seen) == 4


def test_a_resumed_captioner_equals_an_uninterrupted_one(parts, bank, trained, tmp_path):
    config = TrainConfig(steps=4, learning_rate=1e-2, warmup_steps=1)
    train_captioner(parts, bank, tmp_path, (1,), CAPTIONER, config, EVENTS, stop_after=2)
    model, _ = train_captioner(parts, bank, tmp_path, (1,), CAPTIONER, config, EVENTS)
    for one, other in zip(trained[1].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_captioner_is_only_loaded(parts, bank, trained, monkeypatch):
    def encode(*args):
        raise AssertionError("the recordings were encoded for nothing")

    monkeypatch.setattr("recap_hf.tiny.captioner._encode_pool", encode)
    config = TrainConfig(steps=4, learning_rate=1e-2, warmup_steps=1)
    model, _ = train_captioner(parts, bank, trained[0], (1,), CAPTIONER, config, EVENTS)
    for one, other in zip(trained[1].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(AssertionError, match="for nothing"):
        train_captioner(parts, bank, trained[0].parent / "new", (1,), CAPTIONER, config, EVENTS)


def test_the_saved_checkpoint_is_half_the_size_and_loads_as_float32(trained):
    folder, model, _ = trained
    text = (folder / "model" / "config.json").read_text()
    assert "_name_or_path" not in text and "float16" not in text
    loaded = RecapForConditionalGeneration.from_pretrained(folder / "model")
    assert loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected), name
    processor = RecapProcessor.from_pretrained(folder / "model")
    assert all(not NamingRules.ours().named(text) - set(EVENTS) for text in processor.datastore.captions)


def test_every_row_answers_every_clip(trained):
    _, model, processor = trained
    model.generation_config.max_new_tokens = 4
    items = [Item("a", synthesise("noise", 0), ("rain",)), Item("b", synthesise("tone", 1), ("cello", "flute"))]
    evaluator = Evaluator(model, processor, NamingRules.ours())
    encoded = evaluator.encode(items)
    for row in ROWS:
        answers = evaluator.answers(encoded, row)
        assert len(answers) == 2 and all(isinstance(text, str) for text in answers)
    assert evaluator.answers(encoded, "first retrieved caption") == [texts[0] for texts in encoded.retrieved]
    named = {event for text in encoded.retrieved[0] for event in evaluator.rules.named(text)}
    assert evaluator.rules.named(evaluator.answers(encoded, "all events of the captions")[0]) == named
    with pytest.raises(KeyError):
        evaluator.answers(encoded, "tea leaves")


def test_the_language_model_chooses_by_the_rule_of_the_decoding(trained, monkeypatch):
    """One beam, more candidates than beams, and CLAP alone: among the language model's own captions in every case."""
    _, model, processor = trained
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    config = model.generation_config
    config.max_new_tokens, config.num_beams = 4, 1
    items = [Item("a", synthesise("noise", 0), ("rain",)), Item("b", synthesise("tone", 1), ("cello",))]

    def answers(row, **decoding):
        evaluator = Evaluator(model, processor, NamingRules.ours(), decoding)
        encoded = evaluator.encode(items)
        return encoded, evaluator.answers(encoded, f"language model{row}")

    assert answers(", chosen by CLAP")[1] == answers(" on the prompt")[1]
    for weight in (0.0, float("inf")):
        encoded, found = answers(", chosen by CLAP", candidates=4, rerank_weight=weight)
        for index, caption in enumerate(found):
            built = processor.build_prompts(retrieved=encoded.retrieved[index : index + 1])
            beams = model.decoder.generate(
                built["decoder_input_ids"],
                attention_mask=built["decoder_attention_mask"],
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=4,
                early_stopping=config.early_stopping,
                length_penalty=config.length_penalty,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            )
            texts = processor.batch_decode(beams, skip_special_tokens=True)
            cosines = model.embed_captions(texts, processor) @ encoded.embeds[index, 0].numpy()
            assert caption == (texts[0] if weight == 0 else texts[int(cosines.argmax())])


def test_transfer_groups_and_figures(trained):
    from recap_hf.tiny.lexicon import HEARD, other_sounds

    assert sorted(event for group in GROUPS for event in group) == sorted(set(HEARD) - {"man_speaking"})
    assert set(DECOYS) <= set(other_sounds())
    _, model, processor = trained
    store = processor.datastore
    items = [Item("a", synthesise("noise", 0), (GROUPS[0][0],)), Item("b", synthesise("tone", 1), (GROUPS[1][0],))]
    result = evaluate_transfer(model, processor, items, GROUPS[0], NamingRules.ours(), mixed=0.02)
    processor.datastore = store
    assert result["clips"] == 1
    assert all(0 <= result[name] <= 1 for name in ("recall_without", "named_elsewhere", "decoys_named"))


def test_clap_trains_and_normalises_its_input_with_fixed_statistics(parts, bank, tmp_path):
    from transformers import AutoTokenizer, ClapModel

    tokenizer = AutoTokenizer.from_pretrained(parts[2] / "clap")
    train_clap(bank, tokenizer, tmp_path, (1,), CLAP, TrainConfig(steps=2, learning_rate=1e-3))
    norm = ClapModel.from_pretrained(tmp_path).audio_model.audio_encoder.batch_norm
    assert not torch.equal(norm.running_mean, torch.zeros(64))
    assert torch.equal(norm.weight, torch.ones(64)) and torch.equal(norm.bias, torch.zeros(64))


def test_examples_are_deterministic_and_small(tmp_path):
    import soundfile

    for name in EXAMPLES:
        sound = synthesise_example(name)
        assert np.abs(sound).max() <= 0.91 and 48_000 <= len(sound) <= 480_000
        np.testing.assert_array_equal(sound, synthesise_example(name))
    paths = write_examples(tmp_path)
    assert all(soundfile.info(path).samplerate == 48_000 for path in paths)
    assert sum(path.stat().st_size for path in paths) < 3_000_000


def test_command_line(tmp_path, capsys):
    assert main(["tiny", "tokenizers", "--work-dir", str(tmp_path)]) == 0
    assert (tmp_path / "tokenizers" / "gpt2" / "tokenizer.json").is_file()
    assert main(["tiny", "captioner", "--sounds", str(tmp_path), "--work-dir", str(tmp_path)]) == 1
    assert "run `recap tiny clap` with the same --work-dir first" in capsys.readouterr().err
    assert main(["tiny", "clap", "--sounds", str(tmp_path), "--work-dir", str(tmp_path), "--folds", "one"]) == 1
    assert "--folds takes numbers" in capsys.readouterr().err
    assert main(["tiny", "all", "--sounds", str(tmp_path), "--work-dir", str(tmp_path), "--steps", "3"]) == 1
    assert "--steps belongs to one stage" in capsys.readouterr().err
    keywords = tmp_path / "rules.json"
    keywords.write_text(json.dumps({"events": {}}))
    assert main(["tiny", "evaluate", "--sounds", str(tmp_path), "--keywords", str(keywords)]) == 1
    assert "naming rules" in capsys.readouterr().err
