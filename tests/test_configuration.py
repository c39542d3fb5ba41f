"""RecapConfig: defaults, round trip, checks."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
from conftest import tiny_clap_config, tiny_gpt2_config
from transformers import ClapConfig, GPT2Config

from recap_hf import RecapConfig


def test_defaults_are_the_papers():
    config = RecapConfig()
    assert config.cross_attention_reduce_factor == 4
    assert (config.encoder_hidden_size, config.cross_attention_width) == (768, 192)
    assert config.is_encoder_decoder
    assert config.decoder.add_cross_attention
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (50256, 50256, None)


def test_round_trip(tmp_path):
    config = RecapConfig(
        clap=tiny_clap_config(),
        decoder=tiny_gpt2_config(),
        cross_attention_reduce_factor=2,
        window_length_s=5.0,
        pad_token_id=3,
    )
    saved = config.to_dict()
    before = copy.deepcopy(saved)
    again = RecapConfig.from_dict(saved)
    assert saved == before
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = RecapConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert isinstance(loaded.clap, ClapConfig)
    assert isinstance(loaded.decoder, GPT2Config)
    assert loaded.get_text_config(decoder=True) is loaded.decoder


def test_unknown_keys_are_kept():
    assert RecapConfig(a_note="kept").to_dict()["a_note"] == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_attention_reduce_factor": 3}, "divides the decoder's head size: got 3 for n_embd=768 and n_head=12"),
        ({"cross_attention_reduce_factor": 0}, "must be a positive integer"),
        ({"window_length_s": 0}, "positive number of seconds, got 0"),
        ({"pad_token_id": 50257}, "`pad_token_id` is 50257, outside the decoder's vocabulary of 50257"),
        ({"clap": {"model_type": "bert"}}, "must be the configuration of one of clap, mobilenet_clap, got"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RecapConfig(**arguments)


def test_the_callers_parts_stay_as_they_are():
    clap, decoder = tiny_clap_config(), tiny_gpt2_config(pad_token_id=None)
    before = clap.to_dict(), decoder.to_dict()
    config = RecapConfig(clap=clap, decoder=decoder)
    assert config.decoder.is_decoder and config.decoder.pad_token_id == 0
    assert (clap.to_dict(), decoder.to_dict()) == before


def test_settings_of_the_processor_are_refused_but_old_files_load():
    with pytest.raises(TypeError, match="RecapConfig has no num_retrieved_captions: prompt and retrieval"):
        RecapConfig(num_retrieved_captions=3)
    old = {**RecapConfig().to_dict(), "num_retrieved_captions": 3, "retrieval_score_drop": None, "confidence": None}
    assert RecapConfig.from_dict(old).to_dict() == RecapConfig().to_dict()


def test_documented_defaults_are_the_signatures():
    documented = dict(
        re.findall(r"(\w+) \(`[^`]+`, \*optional\*, defaults to (?:`)?\"?(.*?)\"?`?\):", RecapConfig.__doc__)
    )
    signature = inspect.signature(RecapConfig.__init__).parameters
    checked = 0
    for name, value in documented.items():
        if "Config()" not in value:
            assert str(signature[name].default) == value, name
            checked += 1
    assert checked >= 4
