"""The pieces of pretraining: the contrastive loss, retrieval figures, windows of a clip, what is right for what."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_clap_config
from training_parts import captions_of, make_tokenizer

from recap_hf.modeling.encoder_recap import RecapClapEncoder
from recap_hf.training.data import Clip
from recap_hf.training.task import Key
from recap_hf.training.tasks.bases import new_clap_config, train_tokenizer
from recap_hf.training.tasks.clap import ClapTask, ClapTrainingConfig, Targets
from recap_hf.training.tasks.clap_data import PairCollator, PairedClips, Variation, paired_clips, positives
from recap_hf.training.tasks.contrastive import (
    Towers,
    contrastive_loss,
    fix_input_statistics,
    one_direction,
    retrieval_metrics,
)


@pytest.fixture(scope="module")
def clap():
    torch.manual_seed(0)
    return RecapClapEncoder(tiny_clap_config()).eval()


def test_the_loss_is_the_cross_entropy_of_transformers_logits_where_each_clip_has_one_caption(clap):
    """Of both ways; `ClapModel`'s own loss transposes one of its two matrices and so counts one way twice."""
    mels = torch.randn(3, 1001, 64) * 10 - 40
    ids = torch.randint(5, 300, (3, 7))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        output = clap(input_ids=ids, attention_mask=mask, input_features=mels[:, None])
        each = torch.arange(3)
        logits = (output.logits_per_audio, output.logits_per_text)
        expected = sum(torch.nn.functional.cross_entropy(rows, each) for rows in logits) / 2
        audio, texts, _ = Towers(clap)(mels, ids, mask)
        loss = contrastive_loss(audio, texts, torch.eye(3).bool(), clap.logit_scale_a, clap.logit_scale_t)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_several_captions_of_a_clip_share_the_target():
    """By hand: similarities 1 and 0, factor e; clip 0 has the captions 0 and 1, clip 1 the caption 2."""
    audio, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    positive = torch.tensor([[True, True, False], [False, False, True]])
    scale = torch.tensor(1.0)
    e = math.exp(math.e)
    from_audio = (-math.log(e / (2 * e + 1)) - math.log(e / (e + 2))) / 2
    from_text = -math.log(e / (e + 1))
    loss = contrastive_loss(audio, texts, positive, scale, scale)
    assert loss.item() == pytest.approx((from_audio + from_text) / 2, rel=1e-6)
    # A factor beyond the bound is the bound.
    bounded = contrastive_loss(audio, texts, positive, scale * 9, scale * 9, max_logit_scale=math.e)
    assert bounded.item() == pytest.approx(loss.item(), rel=1e-6)


def test_embeddings_do_not_depend_on_the_batch(clap):
    towers = Towers(clap).train()
    mels = torch.randn(4, 1001, 64) * 10 - 40
    ids = torch.randint(5, 300, (4, 6))
    with torch.no_grad():
        together, *_ = towers(mels, ids, torch.ones_like(ids))
        alone, *_ = towers(mels[2:3], ids[:1], torch.ones_like(ids[:1]))
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["audio", "text", "audio_model"])
def test_a_frozen_tower_has_no_gradient(frozen: str):
    towers = Towers(RecapClapEncoder(tiny_clap_config()), frozen)
    trained = {name for name, p in towers.named_parameters() if p.requires_grad}
    untrained = f"clap.{frozen}." if frozen == "audio_model" else f"clap.{frozen}_"
    assert not any(name.startswith(untrained) for name in trained)
    assert ("clap.audio_projection.linear1.weight" in trained) == (frozen != "audio")
    assert "clap.logit_scale_a" in trained


def test_the_input_is_normalised_by_the_statistics_of_its_mels(clap):
    mels = torch.randn(5, 1001, 64) * torch.linspace(1, 9, 64) - torch.linspace(0, 63, 64)
    fix_input_statistics(clap, mels)
    normalisation = clap.audio_model.audio_encoder.batch_norm
    assert not any(parameter.requires_grad for parameter in normalisation.parameters())
    normalised = normalisation.eval()(mels.transpose(1, 2)[..., None]).detach()
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(64), atol=1e-2, rtol=0)


# ---------------------------------------------------------------------- figures


def test_retrieval_figures_by_hand():
    """Query 0 finds its one right candidate second; query 1 its two at places 1 and 4; query 2 none of ten."""
    scores = -np.tile(np.arange(12.0), (3, 1))
    relevant = np.zeros((3, 12), dtype=bool)
    relevant[0, 1] = relevant[1, 0] = relevant[1, 3] = relevant[2, 11] = True
    figures = one_direction(scores, relevant)
    assert figures["r1"] == pytest.approx(1 / 3)
    assert figures["r5"] == figures["r10"] == pytest.approx(2 / 3)
    assert figures["map10"] == pytest.approx((1 / 2 + (1 + 2 / 4) / 2 + 0) / 3)


def test_both_directions():
    similarity = np.array([[0.9, 0.1], [0.8, 0.2]])
    figures = retrieval_metrics(similarity, np.eye(2, dtype=bool))
    # Clip 1 prefers caption 0; caption 1 prefers clip 1.
    assert (figures["audio_to_text_r1"], figures["text_to_audio_r1"]) == (0.5, 1.0)
    assert figures["map10"] == pytest.approx((0.75 + 1.0) / 2)
    # A query to which nothing is right does not count.
    assert one_direction(similarity, np.array([[True, False], [False, False]]))["r1"] == 1.0


def test_what_is_right_for_a_clip():
    """By recording (the same clip of another dataset) and by text (case and punctuation apart)."""
    captions = [["A dog barks.", "dog"], ["rain"], ["a dog barks"], ["other words"]]
    ids = ["a.wav", "b.wav", "c.wav", "x/A.flac"]
    clips, _ = paired_clips([Clip(*pair) for pair in zip(ids, captions, strict=True)], make_tokenizer("clap"), 9)
    pairs = [(clip, number) for clip in clips for number in range(len(clip.tokens))]
    expected = [[1, 1, 0, 1, 1], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert positives(clips, pairs).astype(int).tolist() == expected


# ------------------------------------------------------------------------ clips


class _Store:
    """Two stored clips: of one window, and of three."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._frames = {"a": rng.normal(size=(1, 1001, 64)), "b": rng.normal(size=(3, 1001, 64))}

    def read(self, key: str, name: str) -> np.ndarray:
        assert name == "audio"
        return self._frames[key].astype(np.float16)


def test_variation_is_keyed_by_seed_epoch_and_clip():
    clips = [Clip("a", ["u", "v", "w"], key="a"), Clip("b", ["x", "y", "z"], key="b")]
    clips, _ = paired_clips(clips, make_tokenizer("clap"), 9)

    settings = {"captions": 2, "crop": True, "gain_db": 6.0, "mask_frames": 90, "mask_bins": 9}

    def build(seed: int, epoch: int, order=(0, 1), **changes):
        variation = Variation(**{**settings, **changes}, seed=seed)
        pairs = PairedClips(clips, _Store(), variation)
        return PairCollator(0)([pairs[Key(clip, epoch)] for clip in order])

    (mels, ids, _), again, (swapped, _, _) = build(1, 4), build(1, 4), build(1, 4, order=(1, 0))
    assert torch.equal(mels, again[0])
    assert torch.equal(ids, again[1])
    assert torch.equal(mels, swapped.flip(0))
    assert mels.shape == (2, 1001, 64)
    assert len(ids) == 4
    for other, _, _ in (build(2, 4), build(1, 5)):
        assert not torch.equal(mels, other)
    # Without variation, a clip is its first window.
    plain, _, _ = build(1, 4, crop=False, gain_db=0.0, mask_frames=0, mask_bins=0)
    windows = _Store().read("b", "audio").astype(np.float32)
    assert np.array_equal(plain[1], windows[0])
    # Cut at random, it is one of its windows, and each of them in some epoch.
    cut = [build(1, epoch, gain_db=0.0, mask_frames=0, mask_bins=0)[0][1] for epoch in range(20)]
    found = [next(n for n, window in enumerate(windows) if np.array_equal(mel, window)) for mel in cut]
    assert set(found) == {0, 1, 2}


def test_steps_are_full_and_no_clip_stands_twice(clap):
    def plan(clips: int, seed: int, epoch: int) -> list[list[int]]:
        config = ClapTrainingConfig(batch_size=5, seed=seed)
        examples = PairedClips([None] * clips, None, Variation())
        return ClapTask(
            config, Accelerator(cpu=True), (clap, make_tokenizer("clap"), None), examples, None, None, Targets()
        ).plan(epoch)

    steps = plan(23, 3, 1)
    assert [len(step) for step in steps] == [5, 5, 5, 5]
    assert len(set(np.concatenate(steps).tolist())) == 20
    assert steps != plan(23, 3, 2)
    assert [len(step) for step in plan(3, 3, 1)] == [3]


# ------------------------------------------------------------------------ bases


@pytest.mark.parametrize("kind", ["gpt2", "clap"])
def test_a_trained_tokenizer_writes_any_text(kind: str, tmp_path):
    texts = [text for number in range(16) for text in captions_of(number)]
    tokenizer = train_tokenizer(texts, kind, 380, 60, tmp_path, Accelerator(cpu=True))
    for text in (" a dog barks twice", " Gewitter über Zürich 雷"):
        ids = tokenizer(text)["input_ids"]
        written = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert written == (text.strip().lower() if kind == "clap" else text.strip())
    assert len(tokenizer) <= 380
    assert tokenizer.pad_token_id is not None
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id] if kind == "clap" else []
    assert [ids[0], ids[-1]] == ends or kind == "gpt2"


def test_a_word_is_the_same_first_in_a_caption(tmp_path):
    """No caption of the training begins with "barks": a new CLAP must know it there all the same."""
    texts = ["A dog barks", "A cat purrs", "The dog barks twice"] * 5
    tokenizer = train_tokenizer(texts, "clap", 400, 60, tmp_path, Accelerator(cpu=True))
    assert tokenizer.unk_token_id not in tokenizer("Barks")["input_ids"]
    assert tokenizer("Barks")["input_ids"] == tokenizer("barks")["input_ids"]
    assert len(tokenizer("Barks")["input_ids"]) == 3


def test_sizes(tmp_path):
    from transformers import ClapModel

    tokenizer = make_tokenizer("clap")
    tokenizer.model_max_length = 78
    counts = {}
    for size in ("tiny", "small", "base"):
        with torch.device("meta"):
            model = ClapModel(new_clap_config(size, "", tokenizer))
        counts[size] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert counts["tiny"] < counts["small"] < counts["base"]
    # HTSAT and RoBERTa without most of its vocabulary (50,265 tokens of 768 are 38.6 M).
    assert counts["base"] == pytest.approx(153.5 - 38.6, abs=1.5)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected the fields of a ClapConfig, got list"):
        new_clap_config("tiny", str(tmp_path / "x.json"), tokenizer)
