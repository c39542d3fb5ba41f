"""The cache of keys and values under both of its names: taken, used, and never given twice."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from recap_hf.modeling.generation_recap import CACHE

either_name = pytest.mark.parametrize("name", ["cache", "past_key_values"])


@pytest.fixture
def prompts(encoded):
    return {name: encoded[1][name] for name in ("decoder_input_ids", "decoder_attention_mask")}


@either_name
def test_a_pass_goes_on_from_the_cache(tiny_model, encoded, prompts, name):
    ids, mask = prompts.values()
    with torch.no_grad():
        whole = tiny_model(encoder_outputs=encoded[0], decoder_input_ids=ids, decoder_attention_mask=mask)
        start = tiny_model(
            encoder_outputs=encoded[0],
            decoder_input_ids=ids[:, :-2],
            decoder_attention_mask=mask[:, :-2],
            use_cache=True,
        )
        rest = tiny_model(
            encoder_outputs=encoded[0],
            decoder_input_ids=ids[:, -2:],
            decoder_attention_mask=mask,
            use_cache=True,
            **{name: start[CACHE]},
        )
    assert rest[CACHE].get_seq_length() == ids.shape[1]
    torch.testing.assert_close(rest.logits, whole.logits[:, -2:], rtol=1e-4, atol=1e-4)


@either_name
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_a_generation_takes_the_cache(tiny_model, encoded, prompts, name, filled):
    settings = {"num_beams": 1, "max_new_tokens": 4}
    expected = tiny_model.generate(encoder_outputs=encoded[0], **prompts, **settings)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if filled:
        ids, mask = (part[:, :-2] for part in prompts.values())
        with torch.no_grad():
            tiny_model(
                encoder_outputs=encoded[0],
                decoder_input_ids=ids,
                decoder_attention_mask=mask,
                use_cache=True,
                cache=cache,
            )
        assert cache.get_seq_length() == ids.shape[1]
    found = tiny_model.generate(
        encoder_outputs=encoded[0], **prompts, **settings, return_dict_in_generate=True, **{name: cache}
    )
    assert found[CACHE] is cache
    assert cache.get_seq_length() == found.sequences.shape[1] - 1
    assert torch.equal(found.sequences, expected)


def test_a_cache_under_both_names_is_refused(tiny_model, encoded, prompts):
    both = {name: EncoderDecoderCache(DynamicCache(), DynamicCache()) for name in ("cache", "past_key_values")}
    with pytest.raises(ValueError, match="either `cache` or `past_key_values`"):
        tiny_model(encoder_outputs=encoded[0], **prompts, **both)
