"""The plain search: the sequences and scores of transformers' own, while finished clips leave the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationMixin

from recap_hf.modeling import search_recap
from recap_hf.modeling.cache_name_recap import CACHE
from recap_hf.modeling.decoding_recap import SharedPromptCache
from recap_hf.modeling.outputs_recap import RecapEncoderOutput

# With these as ends the tiny model's random captions have many lengths.
ENDS = list(range(0, 300, 9))


def stock_generate(model, encoding, prompts, **settings):
    """transformers' generate with its own caches and its own search."""
    prompts = {name: value for name, value in prompts.items() if name != "retrieved"}
    return GenerationMixin.generate(model, encoder_outputs=RecapEncoderOutput(**encoding), **prompts, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 3, "eos_token_id": 299},
        {"num_beams": 4, "early_stopping": False, "length_penalty": 1.0},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.7, "num_return_sequences": 3},
        {"num_beams": 3, "early_stopping": False, "length_penalty": -0.5, "num_return_sequences": 2},
        {"num_beams": 2, "min_new_tokens": 19, "max_new_tokens": 19},
        {"num_beams": 1, "min_new_tokens": 5},
        {"num_beams": 3, "max_new_tokens": 1},
    ],
    ids=["greedy", "beams", "one end", "penalty", "never", "negative", "exact", "least", "one token"],
)
def test_equals_the_search_of_transformers(tiny_model, encoded, settings):
    settings = {"max_new_tokens": 19, "eos_token_id": ENDS, **settings}
    expected = stock_generate(tiny_model, *encoded, **settings)
    found = tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], return_dict_in_generate=True, **settings)
    assert found[CACHE].sequence_log_probs is not None, "transformers' search has run"
    assert torch.equal(found.sequences, expected)


def test_scores_are_those_of_a_pass_over_the_captions(tiny_model, encoded):
    encoding, prompts = encoded
    tiny_model.config.eos_token_id = ENDS[1]
    for settings in ({"num_beams": 3}, {"num_beams": 4, "length_penalty": 1.0, "num_return_sequences": 2}):
        settings = {"eos_token_id": ENDS[1], "max_new_tokens": 19, **settings}
        sequences, scores = tiny_model.generate_with_scores(encoding, prompts, **settings)
        assert scores == pytest.approx(tiny_model.score_captions(encoding, sequences, prompts), rel=1e-4)


def test_finished_clips_leave_the_batch(tiny_model, encoded, monkeypatch):
    sizes = []
    decode_token = search_recap.decode_token

    def counting(decoder, cache, input_ids, position_ids):
        sizes.append(len(input_ids))
        return decode_token(decoder, cache, input_ids, position_ids)

    monkeypatch.setattr(search_recap, "decode_token", counting)
    # What two clips say fifth and third ends them there.
    long = tiny_model.generate(
        encoder_outputs=encoded[0], **encoded[1], num_beams=1, max_new_tokens=19, eos_token_id=299
    )
    start = encoded[1]["decoder_input_ids"].shape[1]
    ends = [int(long[0, start + 4]), int(long[1, start + 2])]
    sizes.clear()
    settings = {"num_beams": 1, "max_new_tokens": 19, "eos_token_id": ends}
    found = tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], **settings)
    assert sizes[0] == 7 and sizes[-1] < 7 and sizes == sorted(sizes, reverse=True)
    assert torch.equal(found, stock_generate(tiny_model, *encoded, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_beams": 1},
        {"no_repeat_ngram_size": 2, "num_beams": 3},
        {"output_logits": True, "return_dict_in_generate": True, "num_beams": 3},
        {"max_time": 60.0, "num_beams": 3},
    ],
    ids=["sampling", "a penalty", "logits asked for", "a time limit"],
)
def test_what_is_not_plain_stays_with_transformers(tiny_model, encoded, settings):
    torch.manual_seed(3)
    expected = stock_generate(tiny_model, *encoded, max_new_tokens=8, **settings)
    torch.manual_seed(3)
    found = tiny_model.generate(
        encoder_outputs=encoded[0],
        **encoded[1],
        max_new_tokens=8,
        **{**settings, "return_dict_in_generate": True},
    )
    assert isinstance(found[CACHE], SharedPromptCache)
    assert found[CACHE].sequence_log_probs is None
    assert torch.equal(found.sequences, getattr(expected, "sequences", expected))


def test_a_streamer_gets_its_tokens(tiny_model, encoded):
    class Collector:
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.pieces.append("end")

    encoding, prompts = encoded
    alone = RecapEncoderOutput(**{name: value[:1] for name, value in encoding.items()})
    prompts = {name: value[:1] for name, value in prompts.items()}
    streamer = Collector()
    tiny_model.generate(encoder_outputs=alone, **prompts, num_beams=1, max_new_tokens=4, streamer=streamer)
    assert len(streamer.pieces) > 2 and streamer.pieces[-1] == "end"
