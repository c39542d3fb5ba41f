"""Weights for a CPU: the layers compute what the plain ones do, and captions hardly change."""

from __future__ import annotations

import copy

import pytest
import torch

from recap_hf import examples_path
from recap_hf.fast_generation import cpu_weights, fast_generate
from recap_hf.fast_generation.cpu_weights import Int8Linear, PackedLinear, cpu_capabilities, prepare_for_cpu

CAPABLE = cpu_capabilities()
needs_bfloat16 = pytest.mark.skipif(not CAPABLE["bfloat16"], reason="this processor cannot lay out bfloat16 weights")
needs_int8 = pytest.mark.skipif(not CAPABLE["int8"], reason="this processor has no instructions for int8 products")
NARROW = [pytest.param("bfloat16", marks=needs_bfloat16), pytest.param("int8", marks=needs_int8)]
LAYERS = [pytest.param(PackedLinear, marks=needs_bfloat16), pytest.param(Int8Linear, marks=needs_int8)]


@pytest.mark.parametrize("rows", [1, 5, 64, 200])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_multiply(kind, with_bias, rows):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator) if with_bias else None
    hidden = torch.randn(rows, 24, generator=generator)
    # As GPT-2's layers hand it over: transposed in memory.
    weight = weight.t().contiguous().t()
    expected = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = kind(weight, bias)(hidden)
    assert found.dtype == torch.float32
    # Roundings of one part in 256 (bfloat16) or 254 (int8) of either factor, summed over 24 products.
    scale = (hidden.abs() @ weight.abs().t()).double()
    assert ((found - expected).abs() <= 0.02 * scale + 0.02).all()
    shaped = kind(weight, bias)(hidden.view(1, rows, 24))
    assert torch.equal(shaped[0], found)


@needs_int8
def test_int8_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(2)
    layer = Int8Linear(torch.randn(40, 24, generator=generator), None)
    hidden = torch.randn(6, 24, generator=generator)
    loud = torch.cat([hidden, 1e3 * hidden[:1]])
    torch.testing.assert_close(layer(loud)[:6], layer(hidden), rtol=1e-6, atol=1e-6)


def test_float32_changes_strides_and_no_number(tiny_model, encoded, tmp_path):
    encoding, prompts = encoded
    before = copy.deepcopy(tiny_model.state_dict())
    expected = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=3, max_new_tokens=9)
    prepare_for_cpu(tiny_model)
    assert not tiny_model.decoder.transformer.h[0].mlp.c_fc.weight.is_contiguous()
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    found = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=3, max_new_tokens=9)
    assert torch.equal(found, expected)
    tiny_model.save_pretrained(tmp_path)
    again = type(tiny_model).from_pretrained(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("weights", NARROW)
def test_narrow_weights_keep_the_distribution(tiny_model, encoded, weights):
    encoding, prompts = encoded
    settings = {"num_beams": 1, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    expected = tiny_model.generate(encoder_outputs=encoding, **prompts, **settings).logits[0]
    narrow = prepare_for_cpu(tiny_model, weights)
    kind = PackedLinear if weights == "bfloat16" else Int8Linear
    assert type(narrow.decoder.transformer.h[0].crossattention.c_attn) is kind
    assert type(narrow.decoder.lm_head) is kind
    found = narrow.generate(encoder_outputs=encoding, **prompts, **settings).logits[0].float()
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("weights", ["float32", *NARROW])
def test_prepared_models_search_with_the_shared_prompt(tiny_model, encoded, weights):
    encoding, prompts = encoded
    model = prepare_for_cpu(tiny_model, weights)
    prompts.pop("retrieved")
    assert fast_generate(model, encoder_outputs=encoding, **prompts, max_new_tokens=3) is not None


@needs_int8
def test_a_whole_captioner_with_int8_weights(tiny_model, tiny_processor, clips):
    from recap_hf import AudioCaptioningPipeline

    captioner = AudioCaptioningPipeline(
        prepare_for_cpu(tiny_model, "int8"), processor=tiny_processor, max_new_tokens=5
    )
    results = captioner(clips[:2], batch_size=2)
    assert all(isinstance(result["caption"], str) and 0 < result["score"] <= 1 for result in results)


@needs_int8
def test_tags_with_int8_weights():
    from recap_hf import Captioner
    from recap_hf.tagging import Tagger

    captioner = Captioner.from_pretrained()
    prepare_for_cpu(captioner.model, "int8")
    tagger = Tagger(captioner.model.clap, captioner.processor.feature_extractor)
    assert tagger.tag([examples_path() / "rain.flac"])[0][0].name in ("Rain", "Water", "Raindrop")


def test_bad_arguments(tiny_model):
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, int8"):
        prepare_for_cpu(tiny_model, "int4")
    with pytest.raises(ValueError, match="is on meta"):
        prepare_for_cpu(copy.deepcopy(tiny_model).to("meta"), "int8")


def test_capabilities_are_booleans():
    assert set(cpu_capabilities()) == {"bfloat16", "amx", "int8"}
    assert all(isinstance(value, bool) for value in cpu_capabilities().values())


def test_what_a_processor_cannot_do_is_refused_or_told(tiny_model, encoded, monkeypatch):
    monkeypatch.setattr(cpu_weights, "cpu_capabilities", lambda: {"bfloat16": False, "amx": False, "int8": False})
    with pytest.raises(ValueError, match="no instructions"):
        prepare_for_cpu(copy.deepcopy(tiny_model), "int8")
    with pytest.warns(UserWarning, match="slower than float32"):
        model = prepare_for_cpu(tiny_model, "bfloat16")
    assert type(model.decoder.lm_head) is torch.nn.Linear and model.dtype == torch.bfloat16
