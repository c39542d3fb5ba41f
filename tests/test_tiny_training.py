"""Training of recap-tiny: losses by hand, exact resume, tokenizers that read anything."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from recap_hf.tiny.clap import contrastive_loss, positives
from recap_hf.tiny.grammar import Caption, Part, Scene
from recap_hf.tiny.language_model import LanguageModelRecipe, draw_prompt, train_language_model
from recap_hf.tiny.lexicon import HEARD, phrases
from recap_hf.tiny.recipe import Recipe, earlier_cycles
from recap_hf.tiny.tokenization import train_tokenizers
from recap_hf.tiny.trainer import TrainConfig, learning_rate, own_device, train


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizers(folder, vocab_size=600, sentences=50)
    return folder


def test_contrastive_loss_by_hand():
    """Two clips, three texts; text 0 is true of both clips, text 1 of clip 1, text 2 of none."""
    audio = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    positive = torch.tensor([[True, False, False], [True, True, False]])
    scale = torch.tensor(math.log(2.0))
    similarity = [[0.6, 0.0, 1.0], [0.8, 1.0, 0.0]]
    scaled = [[2 * value for value in row] for row in similarity]

    def log_softmax(values, index):
        return values[index] - math.log(sum(math.exp(value) for value in values))

    from_audio = -(log_softmax(scaled[0], 0) + (log_softmax(scaled[1], 0) + log_softmax(scaled[1], 1)) / 2) / 2
    columns = list(zip(*scaled, strict=True))
    from_text = -((log_softmax(columns[0], 0) + log_softmax(columns[0], 1)) / 2 + log_softmax(columns[1], 1)) / 2
    expected = (from_audio + from_text) / 2
    assert contrastive_loss(audio, texts, positive, scale, scale).item() == pytest.approx(expected, rel=1e-5)


def test_positives_by_hand():
    scenes = [Scene((Part("rain"),)), Scene((Part("rain"), Part("cello")), "sequence")]
    both = frozenset({"rain", "cello"})
    captions = [
        Caption("", frozenset({"rain"})),
        Caption("", both),
        Caption("", both, ("rain", "cello")),
        Caption("", both, ("cello", "rain")),
    ]
    assert positives(captions, scenes).tolist() == [[True, False, False, False], [False, True, True, False]]


def test_schedule():
    config = TrainConfig(steps=1000, learning_rate=1.0, warmup_steps=100, decay=0.4)
    assert learning_rate(0, config) == pytest.approx(0.01)
    assert learning_rate(99, config) == learning_rate(599, config) == 1.0
    assert learning_rate(800, config) == pytest.approx(0.5)
    assert learning_rate(999, config) < 1e-4


def test_schedule_of_several_cycles():
    alone = TrainConfig(steps=1000, learning_rate=1.0, warmup_steps=100, decay=0.4)
    longer = TrainConfig(steps=1500, learning_rate=1.0, warmup_steps=100, decay=0.4, cycles=(1000,))
    assert all(learning_rate(step, longer) == learning_rate(step, alone) for step in range(1000))
    # The second cycle: 500 steps, half as high, falling over its last 200.
    assert learning_rate(1000, longer) == pytest.approx(0.005)
    assert learning_rate(1099, longer) == learning_rate(1299, longer) == 0.5
    assert learning_rate(1400, longer) == pytest.approx(0.25)


def _toy(tmp_path, name, parts, steps=30):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def loss_of(rng: np.random.Generator, step: int):
        inputs = torch.from_numpy(rng.standard_normal((16, 4))).float()
        loss = (module(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    config = TrainConfig(steps=steps, learning_rate=1e-2, save_every=7)
    for stop in parts:
        train(module, loss_of, config, tmp_path / name / "checkpoint.pt", name, stop)
    return module.state_dict()


def test_a_shorter_run_has_fewer_cycles():
    """The language model's end after 2,400 and after 3,600 steps; what is left is the last one."""
    assert earlier_cycles("language-model", 5100) == (2400, 1200)
    assert earlier_cycles("language-model", 3600) == (2400,)
    assert earlier_cycles("language-model", 2000) == ()
    assert earlier_cycles("captioner", 2700) == ()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = _toy(tmp_path, "whole", [None])
    _toy(tmp_path, "parts", [11])
    resumed = _toy(tmp_path, "parts", [None])
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])


def test_a_step_is_the_mean_of_its_batches(tmp_path):
    """At weight 1, (w - 1)² has the gradient 0 and 2 (w - 3)² has -8: the step is made with -4."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    drawn, gradients = [], []
    module.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.item()))

    def loss_of(rng: np.random.Generator, step: int):
        drawn.append(rng.random())
        factor = len(drawn)
        return factor * (module.weight - (1 if factor == 1 else 3)).square().sum(), {"batch": float(factor)}

    config = TrainConfig(steps=1, learning_rate=0.1, warmup_steps=1, batches_per_step=2, max_norm=100.0)
    train(module, loss_of, config, tmp_path / "checkpoint.pt", "mean")
    assert drawn == [np.random.default_rng([0, 0, batch]).random() for batch in (0, 1)]
    assert gradients == [0.0, pytest.approx((0.0 - 8.0) / 2)]


def test_from_a_step_on_a_step_is_one_batch(tmp_path):
    drawn = []
    module = torch.nn.Linear(1, 1, bias=False)

    def loss_of(rng: np.random.Generator, step: int):
        drawn.append((step, rng.random()))
        return module.weight.square().sum(), {}

    config = TrainConfig(steps=3, learning_rate=0.1, batches_per_step=2, one_batch_from=1)
    train(module, loss_of, config, tmp_path / "checkpoint.pt", "fewer")
    expected = [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert drawn == [(step, np.random.default_rng([0, step, batch]).random()) for step, batch in expected]


def test_processes_that_cannot_share_a_step_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = TrainConfig(steps=1, learning_rate=0.1, batches_per_step=2)
    with pytest.raises(ValueError, match=r"2 batch.es., too few for 3 processes"):
        train(torch.nn.Linear(1, 1), lambda rng, step: None, config, tmp_path / "checkpoint.pt", "clap")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_the_device_of_a_machine_without_a_gpu():
    assert own_device(None) == own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="torch sees no GPU"):
        own_device("cuda")


def test_the_result_may_be_the_mean_of_the_last_checkpoints(tmp_path):
    module = torch.nn.Linear(1, 1, bias=False)
    seen = []

    def loss_of(rng: np.random.Generator, step: int):
        seen.append(module.weight.item())
        return (module.weight - 3).square().sum(), {}

    config = TrainConfig(steps=12, learning_rate=0.1, save_every=2, average=3)
    train(module, loss_of, config, tmp_path / "checkpoint.pt", "mean", stop_after=11)
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["module"]["weight"].item()
    # Saved after steps 2, 4, 6, 8, 10 and at the stop after 11; what step n + 1 sees is what step n left.
    assert module.weight.item() == pytest.approx((seen[8] + seen[10] + after) / 3, rel=1e-6)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    _toy(tmp_path, "run", [29])
    with pytest.raises(ValueError, match="the number of steps can no longer change"):
        _toy(tmp_path, "run", [None], steps=60)
    _toy(tmp_path, "early", [5])
    _toy(tmp_path, "early", [None], steps=20)
    with pytest.raises(ValueError, match="other settings"):
        train(
            torch.nn.Linear(1, 1),
            lambda rng, step: None,
            TrainConfig(steps=30, learning_rate=1.0),
            tmp_path / "run" / "checkpoint.pt",
            "run",
        )


@pytest.mark.parametrize("name", ["gpt2", "clap"])
def test_tokenizers_read_any_text(tokenizers, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers / name)
    text = "A naïve 犬 barks — 3× 🎻, then\u00a0rain"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids or name == "gpt2"
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert max(ids) < len(tokenizer)
    if name == "clap":
        assert ids[0] == tokenizer.bos_token_id == 0 and ids[-1] == tokenizer.eos_token_id == 2


def test_prompts_are_deterministic_and_bounded():
    recipe = LanguageModelRecipe()
    drawn = [draw_prompt(np.random.default_rng(seed), recipe) for seed in range(200)]
    assert drawn == [draw_prompt(np.random.default_rng(seed), recipe) for seed in range(200)]
    counts = {len(captions) for captions, _ in drawn}
    assert max(counts) <= 6 and 4 in counts
    # Answers can mostly be read from the prompt: some caption of it shares a content word.
    shared = [
        any(set(answer.split()) & set(caption.split()) - {"a", "the", "of"} for caption in captions)
        for captions, answer in drawn
        if captions
    ]
    assert np.mean(shared) > 0.9


def test_a_language_model_may_be_kept_from_the_names_of_heard_sounds():
    heard = [phrase for key in HEARD for phrase in phrases(key)]

    def texts(recipe):
        drawn = [draw_prompt(np.random.default_rng(seed), recipe) for seed in range(300)]
        return [" ".join([*captions, answer]).lower() for captions, answer in drawn]

    assert sum(any(phrase in text for phrase in heard) for text in texts(LanguageModelRecipe())) > 100
    kept_from = texts(LanguageModelRecipe(heard_words=False))
    # Whole words: "a train" is not rain, and an invented name may hold anything.
    words = re.compile(r"\b(" + "|".join(map(re.escape, heard)) + r")\b")
    assert not [text for text in kept_from if words.search(text)]


def test_a_tokenizer_kept_from_the_names_of_heard_sounds_writes_them_in_pieces(tokenizers, tmp_path):
    from transformers import AutoTokenizer

    train_tokenizers(tmp_path, vocab_size=600, sentences=50, heard_words=False)
    names = [" " + phrases(key)[0] for key in ("violin", "saxophone", "person_sneeze")]
    usual = AutoTokenizer.from_pretrained(tokenizers / "gpt2")
    kept_from = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for name in names:
        assert len(kept_from(name)["input_ids"]) > len(usual(name)["input_ids"])
        assert kept_from.decode(kept_from(name)["input_ids"]) == name
    # Where the recipe looks for it, and what it says to do where it is missing.
    recipe = Recipe("sounds", tmp_path / "work", heard_words=False)
    with pytest.raises(FileNotFoundError, match="recap tiny tokenizers --without-heard-words"):
        recipe.run("language-model", steps=1)
    # The CLAP has heard these sounds: its own tokenizer is the one that it was trained with.
    assert (tmp_path / "clap" / "tokenizer.json").read_bytes() == (tokenizers / "clap" / "tokenizer.json").read_bytes()


def test_language_model_learns_and_resumes(tokenizers, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers / "gpt2")
    recipe = LanguageModelRecipe(n_layer=1, n_embd=16, n_head=2, batch_size=2, bfloat16=False)
    config = TrainConfig(steps=4, learning_rate=1e-3, warmup_steps=2)
    whole = train_language_model(tokenizer, tmp_path / "whole", recipe, config)
    train_language_model(tokenizer, tmp_path / "parts", recipe, config, stop_after=2)
    resumed = train_language_model(tokenizer, tmp_path / "parts", recipe, config)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "parts" / "model.safetensors").is_file()
