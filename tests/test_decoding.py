"""Decoding with a shared prompt: the same captions as transformers' own caches give, and less work."""

from __future__ import annotations

import pytest
import torch

from recap_hf.modeling import generation_recap
from recap_hf.modeling.cache_name_recap import CACHE
from recap_hf.modeling.decoding_recap import SharedPromptCache


def generate_both_ways(monkeypatch, model, encoding, prompts, **settings):
    results = []
    for shared in (True, False):
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(generation_recap, "can_share_prompt", lambda *_: False)
            torch.manual_seed(7)
            results.append(
                model.generate(
                    encoder_outputs=encoding, **prompts, return_dict_in_generate=True, output_logits=True, **settings
                )
            )
    shared, stock = results
    assert isinstance(shared[CACHE], SharedPromptCache)
    assert not isinstance(stock[CACHE], SharedPromptCache)
    return shared, stock


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 5, "num_return_sequences": 4, "length_penalty": 1.0, "early_stopping": False},
        {"num_beams": 1, "do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "beams", "many beams", "samples", "processors"],
)
def test_equals_the_stock_cache(monkeypatch, tiny_model, encoded, settings, attention):
    encoding, prompts = encoded
    tiny_model.set_attn_implementation(attention)
    # More tokens than one allocation of slots holds.
    shared, stock = generate_both_ways(monkeypatch, tiny_model, encoding, prompts, max_new_tokens=21, **settings)
    assert torch.equal(shared.sequences, stock.sequences)
    for ours, theirs in zip(shared.logits, stock.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_prompt_is_kept_once_per_clip(tiny_model, encoded):
    encoding, prompts = encoded
    result = tiny_model.generate(
        encoder_outputs=encoding, **prompts, num_beams=3, max_new_tokens=4, return_dict_in_generate=True
    )
    cache = result[CACHE]
    # 7 clips, 3 heads; 3 beams have places for 16 tokens behind the prompt.
    assert cache.keys[0].shape[:3] == (7, 3, prompts["decoder_input_ids"].shape[1] + 3 * 16)
    assert cache.encoder[0][0].shape[:3] == (7, 3, encoding.last_hidden_state.shape[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["attentions", "hidden states", "no cache", "static cache"],
)
def test_what_looks_inside_gets_the_stock_path(tiny_model, encoded, settings):
    encoding, prompts = encoded
    tiny_model.set_attn_implementation("eager")
    expected = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=1, max_new_tokens=4)
    result = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=1, max_new_tokens=4, **settings)
    assert torch.equal(getattr(result, "sequences", result), expected)
    if settings.get("output_attentions"):
        assert result.cross_attentions[0][0].shape[-1] == encoding.last_hidden_state.shape[1]


def test_a_generation_config_given_as_such(tiny_model, encoded):
    from transformers import GenerationConfig

    encoding, prompts = encoded
    config = GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0, eos_token_id=0)
    by_config = tiny_model.generate(encoder_outputs=encoding, **prompts, generation_config=config)
    assert by_config.shape[1] <= prompts["decoder_input_ids"].shape[1] + 5
    prompts.pop("retrieved")
    positional = tiny_model.generate(None, config, encoder_outputs=encoding, **prompts)
    assert torch.equal(by_config, positional)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_from_the_shared_prompt_are_those_from_scratch(tiny_model, encoded, attention):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    tiny_model.set_attn_implementation(attention)
    for settings in ({"num_beams": 3, "max_new_tokens": 9}, {"num_beams": 1, "max_new_tokens": 1}):
        sequences, scores = tiny_model.generate_with_scores(encoding, prompts, **settings)
        assert torch.equal(sequences, tiny_model.generate(encoder_outputs=encoding, **prompts, **settings))
        assert scores == pytest.approx(tiny_model.score_captions(encoding, sequences, prompts), rel=1e-4)


def test_a_cache_of_more_sequences_than_captions_is_not_mistaken_for_theirs(tiny_model, encoded):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    sequences, scores = tiny_model.generate_with_scores(
        encoding, prompts, num_beams=3, num_return_sequences=2, max_new_tokens=6
    )
    assert len(sequences) == len(scores) == 7
    assert scores == pytest.approx(tiny_model.score_captions(encoding, sequences, prompts), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"output_logits": True}, {"cache_implementation": "static"}])
def test_a_batch_is_generated_without_a_warning(tiny_model, encoded, settings):
    """GPT-2 pads with its end token: transformers warns unless it finds the mask of the encoder's states.

    It also logs, and does not only warn, where an output is asked for the cache by an outdated name.
    """
    import logging

    from transformers.utils.logging import get_logger

    messages = []

    class Collector(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger, handler = get_logger("transformers"), Collector(level=logging.WARNING)
    # What was said once in this process would not be said again.
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        options = {"max_new_tokens": 3, "return_dict_in_generate": True, **settings}
        tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], **options)
    finally:
        logger.removeHandler(handler)
    assert messages == []
