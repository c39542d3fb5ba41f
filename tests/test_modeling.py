"""The model: sizes, loss, masks, generation, saving."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import synthetic_clip, tiny_clap_config, tiny_gpt2_config

from recap_hf import RecapConfig, RecapEncoderOutput, RecapForConditionalGeneration
from recap_hf.modeling.generation_recap import position_ids_of


@pytest.mark.parametrize(("factor", "expected"), [(4, 7_094_016), (1, 28_348_416)])
def test_trainable_parameters_of_gpt2_small(factor, expected):
    # Official code: 12 blocks x (c_attn 768->2w, q_attn 768->w, c_proj w->768, with biases), w = 768 / factor.
    with torch.device("meta"):
        model = RecapForConditionalGeneration(RecapConfig(cross_attention_reduce_factor=factor))
    assert model.freeze_base() == expected
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".crossattention." in name for name in trainable)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    if factor == 4:
        decoder = sum(p.numel() for p in model.decoder.parameters())
        assert decoder == 131_552_256
        assert round(100 * expected / decoder, 1) == 5.4


def test_factor_one_is_the_stock_cross_attention():
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        ours = RecapForConditionalGeneration(RecapConfig(cross_attention_reduce_factor=1)).decoder
        stock = GPT2LMHeadModel(RecapConfig(cross_attention_reduce_factor=1).decoder)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


def test_cross_attention_starts_as_gpt2_layers_do():
    torch.manual_seed(0)
    config = RecapConfig(clap=tiny_clap_config(), decoder=tiny_gpt2_config(n_embd=96, n_layer=8, n_head=3))
    block = RecapForConditionalGeneration(config).decoder.transformer.h[3]
    assert block.crossattention.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.1)
    # GPT-2 scales the projections back into the residual stream by 1 / sqrt(2 * layers).
    assert block.crossattention.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.1)
    assert not block.crossattention.c_proj.bias.any()


def test_cross_attention_by_hand(tiny_model, encoded):
    """One block's cross-attention recomputed from its weights with plain matrix products."""
    encoding, _ = encoded
    layer = tiny_model.decoder.transformer.h[1].crossattention
    torch.manual_seed(3)
    hidden = torch.randn(2, 5, 24)
    states, mask = encoding.last_hidden_state[:2, :100].contiguous(), encoding.attention_mask[:2, :100].clone()
    mask[0, 70:] = 0
    additive = torch.zeros(2, 1, 5, 100).masked_fill(mask[:, None, None] == 0, float("-inf"))
    with torch.no_grad():
        output, _ = layer(hidden, encoder_hidden_states=states, encoder_attention_mask=additive)
        key, value = (states @ layer.c_attn.weight + layer.c_attn.bias).split(12, dim=-1)
        query = hidden @ layer.q_attn.weight + layer.q_attn.bias
        heads = []
        for head in range(3):
            columns = slice(4 * head, 4 * head + 4)
            scores = query[..., columns] @ key[..., columns].transpose(1, 2) / math.sqrt(4)
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
            heads.append(scores.softmax(dim=-1) @ value[..., columns])
        expected = torch.cat(heads, dim=-1) @ layer.c_proj.weight + layer.c_proj.bias
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_encode_audio_shapes_and_windows(tiny_model, encoded):
    encoding, _ = encoded
    # 8-pixel patches of a 256 x 256 picture, halved twice: 64 positions of width 8 * 4 a window, three windows.
    assert encoding.last_hidden_state.shape == (7, 3 * 64, 32)
    assert encoding.attention_mask.sum(dim=1).tolist() == [64, 64, 192, 64, 64, 128, 64]
    assert encoding.audio_embeds.shape == (7, 3, 16)
    norms = encoding.audio_embeds.norm(dim=-1)
    present = encoding.attention_mask[:, ::64].float()
    torch.testing.assert_close(norms, present, rtol=1e-5, atol=1e-6)


def test_one_pass_equals_clap(tiny_model, tiny_processor, clips):
    """Hidden states and query are those of `ClapModel` itself, in its own layout."""
    inputs = tiny_processor(audio=[clips[0]], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        encoding = tiny_model.encode_audio(**inputs)
        stock = tiny_model.clap.get_audio_features(inputs["input_features"])
        hidden = tiny_model.clap.audio_model(inputs["input_features"]).last_hidden_state
    torch.testing.assert_close(encoding.audio_embeds[:, 0], stock.pooler_output)
    torch.testing.assert_close(encoding.last_hidden_state[0, 40], hidden[0, :, 40 // 32, 40 % 32])


def test_position_embedding_tells_the_time_of_each_state(tiny_model, tiny_processor, clips):
    """Vaswani et al., Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of the same."""
    config = RecapConfig.from_dict({**tiny_model.config.to_dict(), "audio_position_embedding": "sinusoidal"})
    model = RecapForConditionalGeneration(config).eval()
    model.load_state_dict(tiny_model.state_dict())
    inputs = tiny_processor(audio=[clips[2]], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        plain, placed = tiny_model.encode_audio(**inputs), model.encode_audio(**inputs)
    added = (placed.last_hidden_state - plain.last_hidden_state)[0]
    for window, band, step, place in ((0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 31, 6), (2, 0, 17, 31), (1, 1, 5, 12)):
        angle = step / 10_000 ** (place // 2 * 2 / 32)
        expected = math.cos(angle) if place % 2 else math.sin(angle)
        assert added[window * 64 + band * 32 + step, place].item() == pytest.approx(expected, abs=1e-5)
    # The queries of the retrieval are CLAP's.
    assert torch.equal(placed.audio_embeds, plain.audio_embeds)


def test_only_known_position_embeddings():
    with pytest.raises(ValueError, match="`audio_position_embedding` must be one of None, sinusoidal, got 'learned'"):
        RecapConfig(audio_position_embedding="learned")


def test_fused_clap_is_deterministic(clips):
    from recap_hf import RecapFeatureExtractor

    torch.manual_seed(0)
    fused = tiny_clap_config(enable_fusion=True, aff_block_r=2)
    model = RecapForConditionalGeneration(RecapConfig(clap=fused, decoder=tiny_gpt2_config())).eval()
    extractor = RecapFeatureExtractor(truncation="fusion")
    encodings = []
    for seed, group in ((1, clips[:2]), (2, clips[:1]), (3, clips[:4])):
        torch.manual_seed(seed)
        inputs = extractor(group, sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            encodings.append(model.encode_audio(**inputs).last_hidden_state[0, :64])
    for other in encodings[1:]:
        torch.testing.assert_close(other, encodings[0], rtol=1e-5, atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_caption(tiny_model, tiny_processor, encoded):
    encoding, _ = encoded
    captions = ["a dog barks", "rain"]
    inputs = tiny_processor.build_training_inputs([["a baby cries"], []], captions)
    first_two = RecapEncoderOutput(**{name: value[:2] for name, value in encoding.items()})
    with torch.no_grad():
        output = tiny_model(encoder_outputs=first_two, **inputs)
    total, count = 0.0, 0
    for row in range(2):
        for position in range(1, inputs["labels"].shape[1]):
            label = inputs["labels"][row, position].item()
            if label != -100:
                total -= output.logits[row, position - 1].log_softmax(-1)[label].item()
                count += 1
    targets = [tiny_processor.tokenizer(" " + caption)["input_ids"] for caption in captions]
    assert count == sum(map(len, targets)) + 2
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_labels_ignore_padding_on_either_side(tiny_model, tiny_processor, encoded):
    encoding, _ = encoded
    one = RecapEncoderOutput(**{name: value[:1] for name, value in encoding.items()})
    inputs = tiny_processor.build_training_inputs([["a baby cries"]], ["a dog barks"])
    with torch.no_grad():
        expected = tiny_model(encoder_outputs=one, **inputs).loss
        for side in ("left", "right"):
            padded = {}
            for name, value in inputs.items():
                padding = torch.full((1, 5), {"labels": -100, "decoder_attention_mask": 0}.get(name, 7))
                padded[name] = torch.cat([padding, value] if side == "left" else [value, padding], dim=1)
            torch.testing.assert_close(tiny_model(encoder_outputs=one, **padded).loss, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_alone_as_in_a_batch(tiny_model, tiny_processor, clips, attention, num_beams):
    tiny_model.set_attn_implementation(attention)
    assert tiny_model.config.decoder._attn_implementation == attention
    assert tiny_model.config.clap._attn_implementation == "eager"

    def captions(group):
        inputs = tiny_processor(audio=group, sampling_rate=48_000, return_tensors="pt")
        ids = tiny_model.generate(**inputs, processor=tiny_processor, num_beams=num_beams, max_new_tokens=12)
        return tiny_processor.batch_decode(ids)

    together = captions(clips)
    assert len(set(together)) > 1, "the premise: captions depend on the clip"
    assert [captions([clip])[0] for clip in clips] == together


def test_eager_equals_sdpa(tiny_model, encoded):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    logits = []
    for attention in ("eager", "sdpa"):
        tiny_model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(tiny_model(encoder_outputs=encoding, **prompts).logits[:, -1])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cross_attention_mask_is_honoured(tiny_model, encoded, attention):
    """A masked encoder position is as if it were not there (GPT-2 of transformers 5.8 to 5.15 dropped this mask)."""
    encoding, prompts = encoded
    prompts.pop("retrieved")
    tiny_model.set_attn_implementation(attention)
    mask = torch.ones_like(encoding.attention_mask)
    mask[:, 64:] = 0
    cut = RecapEncoderOutput(encoding.last_hidden_state[:, :64])
    whole = RecapEncoderOutput(encoding.last_hidden_state + 1.0 * (mask[..., None] == 0))
    with torch.no_grad():
        masked = tiny_model(encoder_outputs=whole, attention_mask=mask, **prompts).logits[:, -1]
        short = tiny_model(encoder_outputs=cut, **prompts).logits[:, -1]
        unmasked = tiny_model(encoder_outputs=whole, attention_mask=mask * 0 + 1, **prompts).logits[:, -1]
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unmasked, short, rtol=1e-2, atol=1e-2)


def test_generation_puts_nothing_before_the_prompt(tiny_model, tiny_processor, encoded):
    encoding, prompts = encoded
    for beams in (1, 3):
        ids = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=beams, max_new_tokens=4)
        length = prompts["decoder_input_ids"].shape[1]
        assert torch.equal(ids[:, :length], prompts["decoder_input_ids"])


def test_generation_leaves_the_encoding_as_it_was(tiny_model, encoded):
    encoding, prompts = encoded
    before = encoding.last_hidden_state.shape
    first = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=3, max_new_tokens=6)
    assert encoding.last_hidden_state.shape == before
    assert torch.equal(first, tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=3, max_new_tokens=6))


def test_greedy_by_hand(tiny_model, encoded):
    """`generate` without beams equals taking the most probable token again and again without any cache."""
    encoding, prompts = encoded
    prompts.pop("retrieved")
    ids = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=1, max_new_tokens=8)
    for row in range(3):
        one = RecapEncoderOutput(**{name: value[row : row + 1] for name, value in encoding.items()})
        sequence = prompts["decoder_input_ids"][row : row + 1][:, prompts["decoder_attention_mask"][row].bool()]
        for expected in ids[row, prompts["decoder_input_ids"].shape[1] :]:
            with torch.no_grad():
                token = (
                    tiny_model(encoder_outputs=one, decoder_input_ids=sequence, use_cache=False).logits[0, -1].argmax()
                )
            assert token == expected
            if token == tiny_model.config.eos_token_id:
                break
            sequence = torch.cat([sequence, token.view(1, 1)], dim=1)


def test_sampling_and_several_sequences(tiny_model, encoded):
    encoding, prompts = encoded
    torch.manual_seed(0)
    ids = tiny_model.generate(
        encoder_outputs=encoding, **prompts, do_sample=True, num_beams=1, num_return_sequences=3, max_new_tokens=5
    )
    assert ids.shape[0] == 3 * len(encoding.last_hidden_state)


def test_static_cache(tiny_model, encoded):
    encoding, prompts = encoded
    dynamic = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=1, max_new_tokens=6)
    static = tiny_model.generate(
        encoder_outputs=encoding,
        **prompts,
        num_beams=1,
        max_new_tokens=6,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(dynamic, static)


def test_generate_without_a_prompt_says_what_to_do(tiny_model, encoded):
    with pytest.raises(ValueError, match="continues a prompt and none was given"):
        tiny_model.generate(encoder_outputs=encoded[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_model, tiny_processor, clips, dtype):
    tiny_model.to(dtype)
    inputs = tiny_processor(audio=clips[:2], sampling_rate=48_000, return_tensors="pt")
    ids = tiny_model.generate(**inputs, processor=tiny_processor, max_new_tokens=5)
    assert len(tiny_processor.batch_decode(ids)) == 2
    assert tiny_model.encode_audio(**inputs).audio_embeds.dtype == torch.float32


def test_save_and_load(tiny_model, encoded, tmp_path):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    tiny_model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "decoder.lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    loaded = RecapForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight
    assert loaded.generation_config.num_beams == 3
    with torch.no_grad():
        expected = tiny_model(encoder_outputs=encoding, **prompts).logits
        torch.testing.assert_close(loaded(encoder_outputs=encoding, **prompts).logits, expected, rtol=0, atol=0)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_plain_attention_string_is_the_decoders(tiny_model, tmp_path, attention):
    from transformers import AutoModel

    tiny_model.save_pretrained(tmp_path)
    for loaded in (
        RecapForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention),
        AutoModel.from_pretrained(tmp_path, attn_implementation=attention, device_map="cpu"),
    ):
        assert loaded.decoder.transformer.h[0].attn.config._attn_implementation == attention
        assert loaded.decoder.transformer.h[0].crossattention.config._attn_implementation == attention
        assert loaded.clap.config.text_config._attn_implementation == "eager"


def test_frozen_clap_does_not_move_in_training_mode(tiny_model, tiny_processor, clips):
    inputs = tiny_processor(audio=clips[:2], sampling_rate=48_000, return_tensors="pt")
    tiny_model.freeze_base()
    with torch.no_grad():
        before = tiny_model.eval().encode_audio(**inputs).last_hidden_state
        after = tiny_model.train().encode_audio(**inputs).last_hidden_state
    assert tiny_model.decoder.training
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_gradients_reach_the_cross_attention_alone(tiny_model, tiny_processor, clips):
    tiny_model.freeze_base()
    tiny_model.train()
    # The older name is deprecated at the newer end of the version range, the newer unknown at the older end.
    getattr(tiny_model, "activation_checkpointing_enable", tiny_model.gradient_checkpointing_enable)()
    inputs = tiny_processor(audio=clips[:2], sampling_rate=48_000, return_tensors="pt")
    batch = tiny_processor.build_training_inputs([["a baby cries"], []], ["a dog barks", "rain"])
    tiny_model(**inputs, **batch, use_cache=False).loss.backward()
    with_gradient = {name for name, p in tiny_model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient
    assert all(".crossattention." in name for name in with_gradient)


def test_from_clap_gpt2_pretrained(tmp_path, clips, decoder_tokenizer, clap_tokenizer):
    from transformers import ClapModel, GPT2LMHeadModel

    from recap_hf import CaptionDatastore, RecapProcessor

    torch.manual_seed(0)
    clap, gpt2 = ClapModel(tiny_clap_config()), GPT2LMHeadModel(tiny_gpt2_config())
    clap.save_pretrained(tmp_path / "clap")
    gpt2.save_pretrained(tmp_path / "gpt2")
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        tmp_path / "clap", tmp_path / "gpt2", cross_attention_reduce_factor=2, window_length_s=5.0
    )
    assert model.config.window_length_s == 5.0
    model.save_pretrained(tmp_path / "recap")
    assert str(tmp_path) not in (tmp_path / "recap" / "config.json").read_text()
    for name, value in gpt2.state_dict().items():
        assert torch.equal(model.decoder.state_dict()[name], value)
    for name, value in clap.state_dict().items():
        assert torch.equal(model.clap.state_dict()[name], value)
    processor = RecapProcessor.from_config(model.config, decoder_tokenizer, clap_tokenizer)
    processor.datastore = CaptionDatastore.from_captions(["a dog barks"], model, processor)
    inputs = processor(audio=[clips[0]], sampling_rate=48_000, return_tensors="pt")
    assert len(processor.batch_decode(model.generate(**inputs, processor=processor, max_new_tokens=4))) == 1


def test_position_ids():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_score_is_the_mean_token_probability(tiny_model, encoded):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    result = tiny_model.generate(
        encoder_outputs=encoding,
        **prompts,
        num_beams=1,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
    )
    scores = tiny_model.score_captions(encoding, result.sequences, prompts)
    start = prompts["decoder_input_ids"].shape[1]
    for row, score in enumerate(scores):
        logs = []
        for step, logits in enumerate(result.logits):
            token = result.sequences[row, start + step]
            logs.append(logits[row].log_softmax(-1)[token].item())
            if token == tiny_model.config.eos_token_id:
                break
        assert score == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)


@pytest.mark.slow
def test_compiled_forward(tiny_model, encoded):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    compiled = torch.compile(tiny_model, fullgraph=True)
    with torch.no_grad():
        expected = tiny_model(encoder_outputs=encoding, **prompts, use_cache=False).logits
        actual = compiled(encoder_outputs=encoding, **prompts, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_synthetic_clips_are_repeatable():
    assert (synthetic_clip(0.5, 1) == synthetic_clip(0.5, 1)).all()
