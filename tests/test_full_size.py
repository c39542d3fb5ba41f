"""The true sizes, with random weights: assembled from saved parts, it captions a clip."""

from __future__ import annotations

import pytest
import torch
from conftest import synthetic_clip
from transformers import ClapConfig, ClapModel, GPT2Config, GPT2LMHeadModel

from recap_hf import CaptionDatastore, RecapForConditionalGeneration, RecapProcessor


@pytest.mark.slow
def test_full_size_from_folders(tmp_path, decoder_tokenizer, clap_tokenizer):
    torch.manual_seed(0)
    ClapModel(ClapConfig()).save_pretrained(tmp_path / "clap")
    GPT2LMHeadModel(GPT2Config()).save_pretrained(tmp_path / "gpt2")
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(tmp_path / "clap", tmp_path / "gpt2")
    assert model.freeze_base() == 7_094_016
    # A small tokenizer of another vocabulary serves random weights as well; its end token is its first.
    model.config.eos_token_id = model.generation_config.eos_token_id = decoder_tokenizer.eos_token_id
    processor = RecapProcessor.from_config(model.config, decoder_tokenizer, clap_tokenizer)
    processor.datastore = CaptionDatastore.from_captions(["a dog barks", "rain falls", "wind"], model, processor)
    inputs = processor(audio=[synthetic_clip(3.0, 1)], sampling_rate=48_000, return_tensors="pt")
    encoding = model.encode_audio(**inputs)
    assert encoding.last_hidden_state.shape == (1, 64, 768)
    assert encoding.audio_embeds.shape == (1, 1, 512)
    prompts = processor.build_prompts(encoding.audio_embeds)
    assert len(prompts["retrieved"][0]) == 3
    ids = model.generate(encoder_outputs=encoding, **prompts, max_new_tokens=8)
    assert len(processor.batch_decode(ids, skip_special_tokens=True)) == 1
