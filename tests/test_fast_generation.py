"""Fast generation: the sequences and scores of transformers' own search, or transformers itself."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, MaxTimeCriteria, NoBadWordsLogitsProcessor

from recap_hf import Captioner, CaptionOptions
from recap_hf.fast_generation import SharedPromptSearch, fast_generate, search
from recap_hf.modeling import captioning_recap

# With these as ends the tiny model's random captions have many lengths.
ENDS = list(range(0, 300, 9))


@pytest.fixture
def arguments(encoded):
    """What `generate` is called with."""
    encoding, prompts = encoded
    prompts.pop("retrieved")
    return {"encoder_outputs": encoding, **prompts}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
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
        # More tokens than one allocation of places holds.
        {"num_beams": 5, "max_new_tokens": 41},
    ],
    ids=["greedy", "beams", "one end", "penalty", "never", "negative", "exact", "least", "one token", "long"],
)
def test_equals_transformers(tiny_model, arguments, settings, attention):
    tiny_model.set_attn_implementation(attention)
    settings = {"max_new_tokens": 19, "eos_token_id": ENDS, **settings}
    expected = tiny_model.generate(**arguments, **settings)
    sequences, _ = fast_generate(tiny_model, **arguments, **settings)
    assert torch.equal(sequences, expected)
    assert torch.equal(tiny_model.generate(**arguments, **settings, custom_generate=SharedPromptSearch()), expected)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 1.0, "num_return_sequences": 2}, {"num_beams": 1}],
)
def test_scores_are_those_of_a_pass_over_the_captions(tiny_model, arguments, settings):
    tiny_model.config.eos_token_id = ENDS[1]
    settings = {"eos_token_id": ENDS[1], "max_new_tokens": 19, **settings}
    sequences, scores = fast_generate(tiny_model, **arguments, **settings)
    encoding = arguments.pop("encoder_outputs")
    assert scores == pytest.approx(tiny_model.score_captions(encoding, sequences, arguments), rel=1e-4)


def test_a_generation_config_given_as_such(tiny_model, arguments):
    config = GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0, eos_token_id=0)
    before = config.to_dict()
    expected = tiny_model.generate(**arguments, generation_config=config)
    assert torch.equal(fast_generate(tiny_model, **arguments, generation_config=config)[0], expected)
    assert config.to_dict() == before


def test_finished_clips_leave_the_batch(tiny_model, arguments, monkeypatch):
    sizes = []
    decode_token = search.decode_token

    def counting(decoder, cache, input_ids, position_ids):
        sizes.append(len(input_ids))
        return decode_token(decoder, cache, input_ids, position_ids)

    monkeypatch.setattr(search, "decode_token", counting)
    long, _ = fast_generate(tiny_model, **arguments, num_beams=1, max_new_tokens=19, eos_token_id=299)
    start = arguments["decoder_input_ids"].shape[1]
    # The fifth token of one clip and the third of another end them there.
    ends = [int(long[0, start + 4]), int(long[1, start + 2])]
    sizes.clear()
    settings = {"num_beams": 1, "max_new_tokens": 19, "eos_token_id": ends}
    found, _ = fast_generate(tiny_model, **arguments, **settings)
    assert sizes[0] == 7 and sizes[-1] < 7 and sizes == sorted(sizes, reverse=True)
    assert torch.equal(found, tiny_model.generate(**arguments, **settings))


def test_the_prompt_is_kept_once_for_each_clip(tiny_model, arguments, monkeypatch):
    caches = []
    kind = search.SharedPromptCache
    monkeypatch.setattr(search, "SharedPromptCache", lambda clips: caches.append(kind(clips)) or caches[-1])
    tiny_model.generation_config.eos_token_id = None
    fast_generate(tiny_model, **arguments, num_beams=3, max_new_tokens=4, min_new_tokens=4)
    shapes = {tuple(keys.shape[1:3]) for keys in caches[0].keys}
    # 3 heads; 3 beams have places for 16 tokens behind the prompt.
    assert shapes == {(3, arguments["decoder_input_ids"].shape[1] + 3 * 16)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "num_beams": 1}, "do_sample"),
        ({"repetition_penalty": 1.3}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_time": 60.0}, "max_time"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"suppress_tokens": [5]}, "suppress_tokens"),
        ({"num_beams": 1, "num_return_sequences": 2}, "more sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_understand_is_left_to_transformers(tiny_model, arguments, settings, reason):
    settings = {"num_beams": 3, "max_new_tokens": 4, **settings}
    assert fast_generate(tiny_model, **arguments, **settings) is None
    config = GenerationConfig()
    for name, value in {**tiny_model.generation_config.to_dict(), **settings}.items():
        setattr(config, name, value)
    assert reason in search.why_not(tiny_model, config)


def test_processors_and_streamers_are_left_to_transformers(tiny_model, arguments):
    from transformers import LogitsProcessorList, MinLengthLogitsProcessor

    processors = LogitsProcessorList([MinLengthLogitsProcessor(3, 0)])
    for extra in ({"logits_processor": processors}, {"streamer": object()}, {"assistant_model": tiny_model}):
        assert fast_generate(tiny_model, **arguments, **extra) is None
    assert fast_generate(tiny_model, **arguments, logits_processor=None, max_new_tokens=2) is not None


def test_called_where_it_cannot_generate_it_says_why(tiny_model, arguments):
    with pytest.raises(ValueError, match="`do_sample` is True"):
        tiny_model.generate(**arguments, do_sample=True, custom_generate=SharedPromptSearch(), max_new_tokens=2)
    for wanted, name in (
        ({"logits_processor": [NoBadWordsLogitsProcessor([[5]], eos_token_id=0)]}, "NoBadWordsLogitsProcessor"),
        ({"stopping_criteria": [MaxTimeCriteria(9.0)]}, "MaxTimeCriteria"),
    ):
        with pytest.raises(ValueError, match=f"does not know .*{name}"):
            tiny_model.generate(**arguments, **wanted, custom_generate=SharedPromptSearch(), max_new_tokens=2)
    settings = {"min_new_tokens": 2, "max_new_tokens": 3}
    found = tiny_model.generate(**arguments, **settings, custom_generate=SharedPromptSearch())
    assert torch.equal(found, tiny_model.generate(**arguments, **settings))


def captions_of(captioner, clips, monkeypatch, fast):
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(captioning_recap, "fast_generate", None)
        return [result.caption for result in captioner.caption(clips)]


class ZeroHook:
    """Zeroes the output of a module."""

    def __call__(self, module, inputs, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def test_hooks_of_the_decoder_take_part(tiny_model, tiny_processor, clips, monkeypatch):
    captioner = Captioner(tiny_model, tiny_processor, options=CaptionOptions(max_new_tokens=8))
    plain = captions_of(captioner, clips[:2], monkeypatch, fast=True)
    assert plain == captions_of(captioner, clips[:2], monkeypatch, fast=False)
    handle = tiny_model.decoder.transformer.h[-1].register_forward_hook(ZeroHook())
    hooked = captions_of(captioner, clips[:2], monkeypatch, fast=True)
    assert hooked == captions_of(captioner, clips[:2], monkeypatch, fast=False)
    assert hooked != plain
    handle.remove()
    assert captions_of(captioner, clips[:2], monkeypatch, fast=True) == plain


@pytest.mark.parametrize("change", ["subclass", "wrapped", "replaced forward", "pre-hook"])
def test_changed_layers_take_part(tiny_model, arguments, change):
    layer = tiny_model.decoder.transformer.h[1].mlp.c_fc
    if change == "subclass":
        layer.__class__ = type(
            "Adapter", (type(layer),), {"forward": lambda self, x: super(type(layer), self).forward(x)}
        )
    elif change == "wrapped":
        tiny_model.decoder.transformer.h[1].mlp.c_fc = torch.nn.Sequential(layer)
    elif change == "replaced forward":
        layer.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], layer.nf)
    else:
        layer.register_forward_pre_hook(lambda module, inputs: None)
    assert fast_generate(tiny_model, **arguments, max_new_tokens=2) is None


def test_training_mode_and_device_maps_are_left_to_transformers(tiny_model, arguments):
    tiny_model.train()
    assert fast_generate(tiny_model, **arguments, max_new_tokens=2) is None
    tiny_model.eval()
    tiny_model.hf_device_map = {"": "cpu"}
    assert fast_generate(tiny_model, **arguments, max_new_tokens=2) is None
