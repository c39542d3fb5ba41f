"""A captioner whose CLAP is a MobileNet: put together, trained, saved, exported and explained as with the paper's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2_config
from test_mobilenet_clap import tiny_config
from training_parts import make_tokenizer, write_clotho
from transformers import GPT2LMHeadModel

from recap_hf import RecapFeatureExtractor, RecapForConditionalGeneration, RecapProcessor
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel
from recap_hf.training.features import AudioTower
from recap_hf.training.run import train
from recap_hf.training.tasks.bases import new_captioner
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig
from recap_hf.training.tasks.language_model import LanguageModelTrainingConfig

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Folders `clap` (a MobileNet, its extractor and tokenizer) and `decoder`, and recordings in Clotho's layout."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    MobileNetClapModel(tiny_config()).save_pretrained(folder / "clap")
    RecapFeatureExtractor(**MobileNetClapModel.feature_settings(tiny_config())).save_pretrained(folder / "clap")
    make_tokenizer("clap").save_pretrained(folder / "clap")
    GPT2LMHeadModel(tiny_gpt2_config(vocab_size=380)).save_pretrained(folder / "decoder")
    make_tokenizer("gpt2").save_pretrained(folder / "decoder")
    write_clotho(folder / "clotho", train=6, validation=2)
    return folder


def settings(bases: Path, output: Path, kind: type = CaptionerTrainingConfig, **changes: object):
    values = {
        "dataset": ["clotho"],
        "data_dir": [str(bases / "clotho")],
        "clap": str(bases / "clap"),
        "output_dir": str(output),
        "batch_size": 8,
        "num_train_epochs": 1,
        "device": "cpu",
    }
    if kind is CaptionerTrainingConfig:
        values |= {"decoder": str(bases / "decoder"), "feature_cache": str(bases / "features")}
    return kind(**{**values, **changes}).validate()


def test_two_folders_become_a_captioner(bases: Path):
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(bases / "clap", bases / "decoder")
    assert isinstance(model.clap, MobileNetClapModel)
    assert model.config.window_length_s == 10.08
    assert model.config.encoder_hidden_size == 256
    clap = MobileNetClapModel.from_pretrained(bases / "clap")
    assert all(torch.equal(tensor, clap.state_dict()[name]) for name, tensor in model.clap.state_dict().items())


def test_a_captioner_is_trained_from_two_folders(bases: Path, tmp_path: Path):
    report = train(settings(bases, tmp_path, audio_dropout=0.3, share_prompts=True))
    assert report["evaluations"][-1]["loss"] < report["evaluations"][0]["loss"]
    model, processor = (kind.from_pretrained(tmp_path) for kind in (RecapForConditionalGeneration, RecapProcessor))
    extractor = processor.feature_extractor
    assert (extractor.sampling_rate, extractor.max_length_s, extractor.spectrogram) == (RATE, 10.08, "yamnet")
    processor.check_model(model)
    assert len(processor.datastore) == 30
    assert "MobileNet v1 audio tower" in (tmp_path / "README.md").read_text(encoding="utf-8")
    clap = MobileNetClapModel.from_pretrained(bases / "clap")
    assert all(torch.equal(tensor, clap.state_dict()[name]) for name, tensor in model.clap.state_dict().items())


def test_training_masks_what_captioning_masks(bases: Path, tmp_path: Path):
    """Stored states and their mask are those of `encode_audio`, also where a window in the middle is silent."""
    config = settings(bases, tmp_path)
    model, processor = new_captioner(config)
    silent_middle = np.concatenate([noise(10.08), np.zeros(161_280, dtype=np.float32), noise(3.0)])
    clips = [noise(1.0, 1), silent_middle]
    stored = list(AudioTower(model, processor).encode(clips))
    for clip, arrays in zip(clips, stored, strict=True):
        encoding = model.encode_audio(**processor(audio=clip, sampling_rate=RATE, return_tensors="pt"))
        heard = encoding.last_hidden_state[encoding.attention_mask.bool()]
        states = torch.from_numpy(np.concatenate(arrays["states"])).float()
        torch.testing.assert_close(states[states.any(dim=-1)], heard, atol=2e-3, rtol=0)
        queries = encoding.audio_embeds[0][encoding.audio_embeds[0].any(dim=-1)]
        torch.testing.assert_close(torch.from_numpy(arrays["embeds"]), queries, atol=1e-5, rtol=0)


def test_a_language_model_is_trained_on_its_nearest_captions(bases: Path, tmp_path: Path):
    config = settings(bases, tmp_path, LanguageModelTrainingConfig, num_layers=1, width=32, vocab_size=300)
    report = train(config)
    assert report["evaluations"][-1]["perplexity"] < report["evaluations"][0]["perplexity"]
    GPT2LMHeadModel.from_pretrained(tmp_path)
