"""Conditioning by a prefix: what is trained, padding, caches, beams, files, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY_CAPTIONS, same_results, tiny_clap_config, tiny_gpt2_config

from recap_hf import (
    AudioCaptioningPipeline,
    CaptionDatastore,
    RecapConfig,
    RecapForConditionalGeneration,
    RecapProcessor,
)
from recap_hf.modeling.generation_recap import CACHE
from recap_hf.modeling.modeling_recap import PrefixMapper


@pytest.fixture
def model():
    """A random captioner with a prefix of four embeddings, its weights large enough for captions to depend on them."""
    torch.manual_seed(0)
    config = RecapConfig(clap=tiny_clap_config(), decoder=tiny_gpt2_config(), conditioning="prefix", prefix_length=4)
    model = RecapForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0 if "prefix" in name else 6.0 if "decoder" in name else 2.0)
    return model


@pytest.fixture
def processor(model, decoder_tokenizer, clap_tokenizer):
    processor = RecapProcessor.from_config(model.config, decoder_tokenizer, clap_tokenizer)
    processor.datastore = CaptionDatastore.from_captions(TINY_CAPTIONS, model, processor)
    return processor


def encode(model, processor, clips):
    inputs = processor(audio=clips, sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        return model.encode_audio(**inputs)


def test_nothing_but_the_mapper_is_trained(model):
    assert not any("crossattention" in name or "ln_cross_attn" in name for name in model.state_dict())
    assert not model.decoder.config.add_cross_attention
    count = model.freeze_base()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("prefix_mapper.")}
    # d = 32, width 24, 4 places; a layer: query and output, key and value, two halves of the MLP, two norms.
    linear = lambda inputs, outputs: inputs * outputs + outputs  # noqa: E731
    layer = 2 * linear(24, 24) + linear(24, 48) + linear(24, 48) + linear(48, 24) + 2 * 48
    assert count == linear(32, 24) + 48 + 4 * 24 + 2 * layer + 48 + linear(24, 24)
    assert model.cross_attention_parameters() == [] and not model.train().clap.training


def test_gradient_reaches_every_parameter_of_the_mapper(model, processor, clips):
    model.freeze_base()
    encoding = encode(model, processor, clips[:3])
    inputs = processor.build_training_inputs([[], ["rain"], ["a", "b"]], ["a dog", "a cat barks", "wind"])
    loss = model(encoder_outputs=encoding, **inputs).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.prefix_mapper.parameters())
    # The bias of the keys alone moves every score of a query alike.
    still = [name for name, p in model.prefix_mapper.named_parameters() if not p.grad.abs().max() > 0]
    assert still == []
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_forward_is_gpt2_on_prefix_and_prompt(model, processor, clips):
    """Against the language model alone, called with the embeddings that the definition asks for."""
    encoding = encode(model, processor, clips[:1])
    ids = torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        prefix = model.prefix_mapper(encoding.last_hidden_state)
        embeds = torch.cat([prefix, model.decoder.transformer.wte(ids)], dim=1)
        expected = model.decoder(inputs_embeds=embeds).logits[:, 4:]
        output = model(encoder_outputs=encoding, decoder_input_ids=ids, labels=ids)
    assert prefix.shape == (1, 4, 24)
    assert output.logits.shape == (1, 4, 300)
    torch.testing.assert_close(output.logits, expected)
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.loss, loss)


def test_prefix_says_what_is_heard(model, processor, clips):
    encoding = encode(model, processor, clips[:2])
    with torch.no_grad():
        first, second = model.prefix_mapper(encoding.last_hidden_state, encoding.attention_mask)
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 2])])
def test_logits_to_keep(model, processor, clips, keep):
    encoding = encode(model, processor, clips[:1])
    ids = torch.tensor([[5, 9, 17]])
    with torch.no_grad():
        every = model(encoder_outputs=encoding, decoder_input_ids=ids).logits
        kept = model(encoder_outputs=encoding, decoder_input_ids=ids, logits_to_keep=keep).logits
    expected = every[:, keep] if isinstance(keep, torch.Tensor) else every[:, -keep:]
    torch.testing.assert_close(kept, expected)


def test_padding_changes_nothing(model, processor, clips):
    """Windows of a longer clip and a longer prompt beside one's own: the same logits as alone."""
    batch = encode(model, processor, [clips[0], clips[2]])
    alone = encode(model, processor, [clips[0]])
    prompts = processor.build_prompts(retrieved=[["rain"], list(TINY_CAPTIONS[:4])])
    single = processor.build_prompts(retrieved=[["rain"]])
    for each in (prompts, single):
        each.pop("retrieved")
    with torch.no_grad():
        together = model(encoder_outputs=batch, **prompts).logits[0, -1]
        by_itself = model(encoder_outputs=alone, **single).logits[0, -1]
    torch.testing.assert_close(together, by_itself, rtol=1e-4, atol=1e-4)


def test_cache_gives_the_same_logits(model, processor, clips):
    encoding = encode(model, processor, clips[:2])
    prompts = processor.build_prompts(retrieved=[["rain"], []])
    ids, mask = prompts["decoder_input_ids"], prompts["decoder_attention_mask"]
    with torch.no_grad():
        whole = model(encoder_outputs=encoding, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        start = model(
            encoder_outputs=encoding,
            decoder_input_ids=ids[:, :-2],
            decoder_attention_mask=mask[:, :-2],
            use_cache=True,
        )
        rest = model(
            encoder_outputs=encoding,
            decoder_input_ids=ids[:, -2:],
            decoder_attention_mask=mask,
            cache=start[CACHE],
            use_cache=True,
        )
    torch.testing.assert_close(rest.logits, whole[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_captions_in_a_batch_are_those_alone(model, processor, clips, num_beams, use_cache):
    settings = {"num_beams": num_beams, "max_new_tokens": 8, "use_cache": use_cache}
    encoding = encode(model, processor, clips[:4])
    prompts = processor.build_prompts(encoding.audio_embeds)
    ids = model.generate(encoder_outputs=encoding, **prompts, **settings)
    scores = model.score_captions(encoding, ids, prompts)
    assert ids.shape[1] <= prompts["decoder_input_ids"].shape[1] + 8
    captions = processor.batch_decode(ids)
    assert len({round(score, 6) for score in scores}) == 4
    for number in range(4):
        own = encode(model, processor, [clips[number]])
        own_prompts = processor.build_prompts(own.audio_embeds)
        row = model.generate(encoder_outputs=own, **own_prompts, **settings)
        (score,) = model.score_captions(own, row, own_prompts)
        assert processor.batch_decode(row) == [captions[number]]
        assert score == pytest.approx(scores[number], rel=1e-3)


def test_generation_is_the_search_over_the_forward(model, processor, clips):
    """Greedy search against a loop over the whole forward, without any cache."""
    encoding = encode(model, processor, clips[:1])
    prompts = processor.build_prompts(retrieved=[["rain"]])
    ids = prompts["decoder_input_ids"]
    generated = model.generate(
        encoder_outputs=encoding,
        decoder_input_ids=ids,
        decoder_attention_mask=prompts["decoder_attention_mask"],
        num_beams=1,
        max_new_tokens=6,
    )
    with torch.no_grad():
        for _ in range(generated.shape[1] - ids.shape[1]):
            token = model(encoder_outputs=encoding, decoder_input_ids=ids).logits[:, -1:].argmax(dim=-1)
            ids = torch.cat([ids, token], dim=1)
    assert generated.tolist() == ids.tolist()


def test_saved_and_loaded(model, processor, clips, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = RecapForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.conditioning == "prefix" and loaded.config.prefix_length == 4
    assert (tmp_path / "modeling_recap.py").is_file()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    expected = AudioCaptioningPipeline(model=model, processor=processor)({"raw": clips[0], "sampling_rate": 48_000})
    pipe = AudioCaptioningPipeline(model=loaded, processor=RecapProcessor.from_pretrained(tmp_path))
    result = pipe({"raw": clips[0], "sampling_rate": 48_000})
    assert same_results(result, expected)


@pytest.mark.slow
def test_remote_code_captions_without_the_package(model, processor, tmp_path):
    """A folder with its code, loaded in a process that does not know recap_hf."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    script = (
        "import sys, numpy as np\n"
        "sys.modules['recap_hf'] = None\n"
        "from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor\n"
        f"model = AutoModelForSpeechSeq2Seq.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "clip = np.sin(np.arange(96000) / 20).astype('float32')\n"
        "inputs = processor(audio=[clip], sampling_rate=48000, return_tensors='pt')\n"
        "ids = model.generate(**inputs, processor=processor, max_new_tokens=5)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "print(ids.shape[0], model.prefix_mapper.length)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "4"]


def test_new_mapper_is_drawn_small_and_loaded_one_is_not_drawn_again(tmp_path):
    config = RecapConfig(clap=tiny_clap_config(), decoder=tiny_gpt2_config(), conditioning="prefix")
    mapper = RecapForConditionalGeneration(config).prefix_mapper
    assert isinstance(mapper, PrefixMapper)
    for layer in (mapper.project, mapper.out, mapper.layers[0].query, mapper.places):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert mapper.project.bias.abs().max() == 0


def test_from_parts_of_a_captioner_with_cross_attention(tiny_model):
    """The language model of a RECAP checkpoint serves as base; its cross-attention is left behind."""
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        tiny_model.clap, tiny_model.decoder, conditioning="prefix", prefix_length=2
    )
    assert torch.equal(model.decoder.transformer.wte.weight, tiny_model.decoder.transformer.wte.weight)
    assert model.conditioning_modules() == [model.prefix_mapper]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditioning": "soft"}, "`conditioning` must be one of cross_attention, prefix, none, got 'soft'"),
        ({"conditioning": "prefix", "prefix_length": 0}, "`prefix_length` must be an integer of at least 1, got 0"),
        ({"conditioning": "prefix", "prefix_length": 256}, "has 256 positions for prefix, prompt and caption"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RecapConfig(clap=tiny_clap_config(), decoder=tiny_gpt2_config(), **settings)


def test_prompts_leave_room_for_the_prefix(model, processor):
    # 256 positions, 4 of the prefix, 60 tokens of a caption and its end token.
    assert processor.max_prompt_tokens == 256 - 4 - 61
    processor.max_prompt_tokens = 253
    with pytest.raises(ValueError, match="256 positions for prompt and caption together \\(prefix: 4\\)"):
        processor.check_model(model)


@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_other_caches_are_refused(model, processor, clips, setting):
    encoding = encode(model, processor, clips[:1])
    with pytest.raises(ValueError, match="generates with the dynamic cache only"):
        model.generate(encoder_outputs=encoding, processor=processor, **setting)


def test_masks_of_four_dimensions_are_refused(model, processor, clips):
    encoding = encode(model, processor, clips[:1])
    mask = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="takes a mask of shape"):
        model(encoder_outputs=encoding, decoder_input_ids=torch.tensor([[1, 2]]), decoder_attention_mask=mask)


def test_conversions_refuse_it(model, processor, tmp_path):
    from recap_hf.conversion import ConversionError, convert_to_stock

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match="stock layouts needs a captioner with cross-attention; this one"):
        convert_to_stock(tmp_path / "model", tmp_path / "out")
    pytest.importorskip("onnxscript", reason="the ONNX export needs onnxscript: pip install 'recap-hf[onnx]'")
    from recap_hf.conversion.onnx_export import export_onnx

    with pytest.raises(ConversionError, match="the ONNX export needs a captioner with cross-attention"):
        export_onnx(tmp_path / "model", tmp_path / "out")


def test_card_describes_it(model, tmp_path):
    from recap_hf.hub.describe import describe_checkpoint

    model.save_pretrained(tmp_path)
    parts = describe_checkpoint(tmp_path).parts
    count = sum(parameter.numel() for parameter in model.prefix_mapper.parameters())
    assert parts["prefix"].startswith(
        f"4 embeddings before the prompt, made of the hidden states by 2 layers, {count:,}"
    )
    assert "cross-attention" not in parts
