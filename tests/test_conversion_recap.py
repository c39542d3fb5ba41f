"""The authors' checkpoints and stock parts into RECAP, and back."""

from __future__ import annotations

import json

import pytest
import torch
from conversion_parts import authors_model, save_authors, save_stock, small_clap, small_gpt2, small_tokenizer
from transformers import ClapFeatureExtractor, ClapModel, GPT2Config, GPT2LMHeadModel

from recap_cli import main
from recap_hf import RecapConfig, RecapForConditionalGeneration, RecapProcessor
from recap_hf.conversion import (
    ConversionError,
    convert_recap_original,
    convert_stock,
    convert_to_stock,
    recap_config_from_original,
    stock_decoder,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    clap, gpt2 = save_stock(folder, small_clap(), small_gpt2())
    decoder, state = authors_model(small_clap())
    return {"clap": clap, "gpt2": gpt2, "decoder": decoder, "state": state, "folder": folder}


@pytest.fixture
def authors(parts, tmp_path) -> str:
    return save_authors(tmp_path / "authors", parts["state"])


def relative(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return ((actual - reference).abs().max() / reference.abs().max()).item()


def test_authors_checkpoint_gives_the_authors_logits(parts, authors, tmp_path, capsys):
    arguments = ["--clap", parts["clap"], "--tokenizer", parts["gpt2"]]
    assert main(["convert", "recap-original", authors, str(tmp_path / "out"), *arguments]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "text tower and projections are those of --clap" in captured.err
    model = RecapForConditionalGeneration.from_pretrained(tmp_path / "out")
    # Two blocks of c_attn 64 -> 32, q_attn 64 -> 16 and c_proj 16 -> 64, with biases.
    assert report["cross_attention_parameters"] == 2 * (64 * 32 + 32 + 64 * 16 + 16 + 16 * 64 + 64)

    generator = torch.Generator().manual_seed(5)
    mel = -35 + 17 * torch.randn(2, 1, 1001, 64, generator=generator)
    ids = torch.randint(0, 40, (2, 9), generator=generator)
    with torch.inference_mode():
        # Their features: the last hidden state flattened from its second dimension on, and transposed.
        hidden = small_clap().audio_model(input_features=mel).last_hidden_state.flatten(2).transpose(1, 2)
        expected = parts["decoder"](input_ids=ids, encoder_hidden_states=hidden).logits
        actual = model(input_features=mel[:, None, 0], decoder_input_ids=ids).logits
    assert relative(actual, expected) < 1e-5
    assert relative(actual, expected[:, :, torch.randperm(40, generator=generator)]) > 0.1


def test_authors_prompt_and_special_tokens_are_kept(parts, authors, tmp_path):
    convert_recap_original(authors, tmp_path / "out", clap=parts["clap"], tokenizer=parts["gpt2"])
    processor = RecapProcessor.from_pretrained(tmp_path / "out")
    model = RecapForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert processor.prompt.build(["a dog barks", "rain falls"]) == (
        "Similar audios sound like\n\na dog barks\n\nrain falls\n\nThis audio sounds like "
    )
    assert processor.num_retrieved_captions == 3
    assert (processor.tokenizer.pad_token, processor.tokenizer.eos_token) == ("!", ".")
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (1, 0)
    assert model.config.decoder_start_token_id is None
    # The mel settings are the CLAP folder's, not the defaults of an extractor.
    assert processor.feature_extractor.frequency_min == 50


def test_full_size_cross_attention_has_the_papers_parameters():
    with torch.device("meta"):
        clap = ClapModel(RecapConfig().clap)
        query = torch.empty(768, 192)
    state = {"decoder.transformer.h.0.crossattention.q_attn.weight": query}
    original = {"decoder": {"model_type": "this_gpt2", **GPT2Config().to_diff_dict()}}
    config = recap_config_from_original(state, original, clap)
    assert config.cross_attention_reduce_factor == 4
    assert (config.pad_token_id, config.eos_token_id) == (0, 13)
    with torch.device("meta"):
        assert RecapForConditionalGeneration(config).freeze_base() == 7_094_016


def test_missing_extra_and_misshapen_keys_are_refused(parts, tmp_path, capsys):
    state = dict(parts["state"])
    del state["decoder.transformer.h.1.crossattention.c_proj.weight"]
    state["decoder.transformer.h.0.adapter.weight"] = torch.zeros(2)
    state["encoder.audio_encoder.norm.weight"] = torch.zeros(63)
    folder = save_authors(tmp_path / "broken", state)
    assert main(["convert", "recap-original", folder, str(tmp_path / "out"), "--clap", parts["clap"]]) == 1
    message = capsys.readouterr().err
    assert "missing (1):\n  decoder.transformer.h.1.crossattention.c_proj.weight" in message
    assert "unknown (1):\n  decoder.transformer.h.0.adapter.weight" in message
    assert "clap.audio_model.audio_encoder.norm.weight: (63,), expected (64,)" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("enc_to_dec_proj.weight", "projection between encoder and decoder"),
        ("encoder.vision_model.embeddings.class_embedding", "CLIP image tower"),
        ("decoder.model.decoder.embed_tokens.weight", "OPT or XGLM"),
    ],
)
def test_relatives_of_the_checkpoint_are_refused_by_name(parts, tmp_path, key, said):
    folder = save_authors(tmp_path / "authors", {**parts["state"], key: torch.zeros(1)})
    with pytest.raises(ConversionError, match=said):
        convert_recap_original(folder, tmp_path / "out", clap=parts["clap"])


def test_another_clap_is_refused(parts, authors, tmp_path):
    other, _ = save_stock(tmp_path, small_clap(seed=9), small_gpt2())
    with pytest.raises(ConversionError, match="not the one of the given CLAP"):
        convert_recap_original(authors, tmp_path / "out", clap=other)


def test_own_checkpoint_and_foreign_decoder_are_refused(parts, tmp_path):
    own = tmp_path / "own"
    convert_stock(parts["clap"], parts["gpt2"], own)
    with pytest.raises(ConversionError, match="already"):
        convert_recap_original(own, tmp_path / "out", clap=parts["clap"])
    folder = save_authors(tmp_path / "authors", parts["state"], decoder={"model_type": "this_opt"})
    with pytest.raises(ConversionError, match="got 'this_opt'"):
        convert_recap_original(folder, tmp_path / "out", clap=parts["clap"])


def test_factor_that_contradicts_the_weights_is_refused(parts, tmp_path):
    folder = save_authors(tmp_path / "authors", parts["state"])
    path = tmp_path / "authors" / "config.json"
    config = json.loads(path.read_text())
    config["decoder"]["cross_attention_reduce_factor"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"has cross_attention_reduce_factor 8, .* a factor of 4"):
        convert_recap_original(folder, tmp_path / "out", clap=parts["clap"])


@pytest.mark.parametrize("stored", ["absent", "tied", "untied"])
def test_head_is_tied_as_in_the_checkpoint(parts, tmp_path, stored):
    state = dict(parts["state"])
    if stored == "absent":
        del state["decoder.lm_head.weight"]
    elif stored == "untied":
        state["decoder.lm_head.weight"] = state["decoder.lm_head.weight"] + 1
    convert_recap_original(save_authors(tmp_path / "a", state), tmp_path / "out", clap=parts["clap"])
    decoder = RecapForConditionalGeneration.from_pretrained(tmp_path / "out").decoder
    tied = decoder.lm_head.weight is decoder.transformer.wte.weight
    assert tied is (stored != "untied")
    if stored == "untied":
        assert torch.equal(decoder.lm_head.weight, state["decoder.lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_survives_there_and_back(parts, tmp_path, dtype):
    clap, gpt2 = save_stock(tmp_path, small_clap().to(dtype), small_gpt2().to(dtype))
    assert convert_stock(clap, gpt2, tmp_path / "recap")["dtype"] == str(dtype).removeprefix("torch.")
    convert_to_stock(tmp_path / "recap", tmp_path / "back")
    assert ClapModel.from_pretrained(tmp_path / "back" / "clap").dtype == dtype
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "back" / "decoder").dtype == dtype


@pytest.mark.parametrize("width", [64, 32])
def test_stock_pair_becomes_recap_and_comes_back(parts, tmp_path, width):
    clap, gpt2 = save_stock(tmp_path, small_clap(width=width), small_gpt2())
    report = convert_stock(clap, gpt2, tmp_path / "recap", factor=2, seed=3)
    assert report["processor"] is True and report["trained_cross_attention"] is False
    # What no stock class has a place for comes back all the same.
    settings = json.loads((tmp_path / "recap" / "config.json").read_text())
    settings["audio_position_embedding"] = "sinusoidal"
    (tmp_path / "recap" / "config.json").write_text(json.dumps(settings))
    convert_to_stock(tmp_path / "recap", tmp_path / "back")
    for name, whole, kind in (("clap", clap, ClapModel), ("decoder", gpt2, GPT2LMHeadModel)):
        before, after = kind.from_pretrained(whole).state_dict(), kind.from_pretrained(tmp_path / "back" / name)
        assert before.keys() == after.state_dict().keys()
        assert all(torch.equal(before[key], value) for key, value in after.state_dict().items())
    assert ClapFeatureExtractor.from_pretrained(tmp_path / "back" / "clap").frequency_min == 50

    cross = tmp_path / "back" / "cross_attention.safetensors"
    again = convert_stock(
        tmp_path / "back" / "clap", tmp_path / "back" / "decoder", tmp_path / "again", cross_attention=cross
    )
    assert RecapConfig.from_pretrained(tmp_path / "again").audio_position_embedding == "sinusoidal"
    assert again["trained_cross_attention"] is True and again["cross_attention_reduce_factor"] == 2
    first = RecapForConditionalGeneration.from_pretrained(tmp_path / "recap").state_dict()
    second = RecapForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_new_layers_follow_the_seed(parts, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert_stock(parts["clap"], parts["gpt2"], tmp_path / name, seed=seed)
    weights = [
        RecapForConditionalGeneration.from_pretrained(tmp_path / name).decoder.transformer.h[0].crossattention.q_attn
        for name in "abc"
    ]
    assert torch.equal(weights[0].weight, weights[1].weight) and not torch.equal(weights[0].weight, weights[2].weight)


@pytest.mark.parametrize("factor", [1, 2, 4, 16])
def test_widened_decoder_is_the_same_function(factor):
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        small_clap(), small_gpt2(), cross_attention_reduce_factor=factor
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.cross_attention_parameters():
            parameter.normal_(0, 0.3, generator=generator)
    hidden = torch.randn(2, 10, 64, generator=generator)
    ids = torch.randint(0, 40, (2, 7), generator=generator)
    with torch.inference_mode():
        ours = model(encoder_outputs=(hidden,), decoder_input_ids=ids).logits
        stock = stock_decoder(model)(input_ids=ids, encoder_hidden_states=hidden).logits
    assert relative(stock, ours) < 1e-5


def test_to_stock_inside_runs_without_our_classes(parts, authors, tmp_path, capsys):
    convert_recap_original(authors, tmp_path / "recap", clap=parts["clap"])
    arguments = [str(tmp_path / "recap"), str(tmp_path / "back"), "--cross-attention-inside"]
    assert main(["convert", "to-stock", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["cross_attention_inside_decoder"] is True
    decoder = GPT2LMHeadModel.from_pretrained(tmp_path / "back" / "decoder")
    hidden, ids = torch.randn(1, 5, 64), torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        expected = parts["decoder"](input_ids=ids, encoder_hidden_states=hidden).logits
        assert relative(decoder(input_ids=ids, encoder_hidden_states=hidden).logits, expected) < 1e-5


def test_inside_needs_equal_widths(tmp_path):
    clap, gpt2 = save_stock(tmp_path, small_clap(width=32), small_gpt2())
    convert_stock(clap, gpt2, tmp_path / "recap")
    with pytest.raises(ConversionError, match="these are 32 wide"):
        convert_to_stock(tmp_path / "recap", tmp_path / "back", inside=True)


def test_parts_without_tokenizers_give_a_model_alone(tmp_path, capsys):
    clap, gpt2 = save_stock(tmp_path, small_clap(), small_gpt2(), tokenizers=False)
    assert main(["convert", "stock", str(tmp_path / "out"), "--clap", clap, "--decoder", gpt2]) == 0
    assert "no processor saved" in capsys.readouterr().err
    assert RecapForConditionalGeneration.from_pretrained(tmp_path / "out").config.cross_attention_reduce_factor == 4


def test_shards_are_read_together(parts, tmp_path):
    folder = tmp_path / "authors"
    save_authors(folder, parts["state"])
    (folder / "pytorch_model.bin").unlink()
    names = sorted(parts["state"])
    halves = {"pytorch_model-00001.bin": names[::2], "pytorch_model-00002.bin": names[1::2]}
    for name, keys in halves.items():
        torch.save({key: parts["state"][key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert convert_recap_original(folder, tmp_path / "out", clap=parts["clap"])["parameters"] > 0
    index.write_text(json.dumps({"weight_map": {**weight_map, "x": "../elsewhere.bin"}}))
    with pytest.raises(ConversionError, match="outside its folder"):
        convert_recap_original(folder, tmp_path / "out2", clap=parts["clap"])


def test_converted_folder_captions_a_clip(parts, authors, tmp_path):
    convert_recap_original(authors, tmp_path / "out", clap=parts["clap"], tokenizer=parts["gpt2"])
    model = RecapForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = RecapProcessor.from_pretrained(tmp_path / "out")
    clip = torch.sin(torch.arange(48_000) * 0.05).numpy()
    inputs = processor(audio=[clip], sampling_rate=48_000, return_tensors="pt")
    ids = model.generate(**inputs, processor=processor, max_new_tokens=5)
    assert len(processor.batch_decode(ids)) == 1
    assert isinstance(small_tokenizer("decoder").decode(ids[0]), str)
