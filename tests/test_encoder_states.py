"""Captioners on CLAP's embeddings, one vector a window: as all others in every place, with either CLAP."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import (
    TINY_CAPTIONS,
    run_without_the_package,
    synthetic_clip,
    tiny_clap_config,
    tiny_gpt2_config,
    tiny_mobilenet_config,
)

from recap_hf import (
    CaptionDatastore,
    Captioner,
    CaptionOptions,
    RecapConfig,
    RecapForConditionalGeneration,
    RecapProcessor,
)
from recap_hf.conversion import ConversionError, convert_stock, convert_to_stock, stock_decoder
from recap_hf.datastore import datastore_from_clips
from recap_hf.explain import explain_caption
from recap_hf.fast_generation import fast_generate

WITHOUT_THE_PACKAGE = """
import numpy as np
from transformers import pipeline

captioner = pipeline("audio-captioning", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(captioner(np.load(sys.argv[2]))))
"""


def on_embeddings(clap) -> RecapForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"cross_attention_reduce_factor": 2, "encoder_states": "embedding"}
    model = RecapForConditionalGeneration(RecapConfig(clap=clap, decoder=tiny_gpt2_config(), **sizes)).eval()
    with torch.no_grad():
        # Captions of a random model that depend on the audio. Convolutions stay as they are: 27 layers of larger ones
        # turn a rounding error of 1e-7 into 1e-4.
        for name, parameter in model.named_parameters():
            if 1 < parameter.dim() < 4:
                parameter.mul_(6.0 if "decoder" in name else 2.0)
    return model


@pytest.fixture(scope="module", params=["htsat", "mobilenet"])
def captioner(request, decoder_tokenizer, clap_tokenizer) -> Captioner:
    model = on_embeddings(tiny_clap_config() if request.param == "htsat" else tiny_mobilenet_config())
    tokenizers = copy.deepcopy(decoder_tokenizer), copy.deepcopy(clap_tokenizer)
    processor = RecapProcessor.from_config(model.config, *tokenizers)
    processor.datastore = CaptionDatastore.from_captions(TINY_CAPTIONS, model, processor)
    return Captioner(model, processor, options=CaptionOptions(max_new_tokens=8))


@pytest.fixture(scope="module")
def recordings(captioner) -> list[np.ndarray]:
    return [synthetic_clip(seconds, seed, captioner.sampling_rate) for seed, seconds in enumerate((2.5, 24.3, 0.4))]


def test_the_states_are_the_embeddings(captioner, recordings):
    encoding = captioner.encode(recordings)
    width = captioner.model.config.clap.projection_dim
    assert captioner.model.config.encoder_hidden_size == width
    assert encoding.last_hidden_state.shape == (3, 3, width)
    assert encoding.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]]
    torch.testing.assert_close(encoding.last_hidden_state, encoding.audio_embeds * width**0.5)
    # Of variance 1, as layer-normed hidden states are.
    torch.testing.assert_close(encoding.last_hidden_state[0, 0].square().mean(), torch.tensor(1.0))


def test_captions_depend_on_the_audio_and_not_on_the_batch(captioner, recordings):
    together = captioner.caption(recordings)
    alone = [captioner.caption([recording])[0] for recording in recordings]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.score for result in together] == pytest.approx([result.score for result in alone], rel=1e-4)
    encoding = captioner.encode(recordings[:1])
    prompts = captioner.processor.build_prompts(encoding.audio_embeds)
    logits = [
        captioner.model(
            encoder_outputs=type(encoding)(**{**encoding, "last_hidden_state": states}),
            decoder_input_ids=prompts["decoder_input_ids"],
        ).logits
        for states in (encoding.last_hidden_state, -encoding.last_hidden_state)
    ]
    assert not torch.allclose(*logits, atol=1e-2)


def test_fast_generation_is_that_of_transformers(captioner, recordings):
    encoding = captioner.encode(recordings)
    prompts = captioner.processor.build_prompts(encoding.audio_embeds)
    prompts.pop("retrieved")
    arguments = {"encoder_outputs": encoding, **prompts, "max_new_tokens": 8, "num_beams": 3}
    found, _ = fast_generate(captioner.model, **arguments)
    assert torch.equal(found, captioner.model.generate(**arguments))


def test_saved_it_captions_without_the_package(captioner, recordings, tmp_path):
    captioner.model.generation_config.max_new_tokens = 8
    for part in (captioner.model, captioner.processor):
        part.save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "clip.npy", recordings[1])
    loaded = Captioner.from_pretrained(tmp_path / "saved")
    assert loaded.model.config.encoder_states == "embedding"
    expected = loaded.caption(recordings[1:2])[0]
    result = run_without_the_package(WITHOUT_THE_PACKAGE, tmp_path, tmp_path / "saved", tmp_path / "clip.npy")
    assert result["caption"] == expected.caption == captioner.caption(recordings[1:2])[0].caption


@pytest.mark.parametrize("method", ["gradient", "insertion"])
def test_explanations_are_by_window(captioner, recordings, method):
    explanation = explain_caption(captioner, recordings[1], caption="a dog barks", method=method)
    window = captioner.model.config.window_length_s
    np.testing.assert_allclose(explanation.time_edges_s, [0, window, 2 * window, 24.3], atol=1e-3)
    for word in explanation.words:
        assert word.audio_map.shape == (1, 3) and word.cell_weights.shape == (3, 1, 1)


def test_stock_layouts(captioner, tmp_path):
    for part in (captioner.model, captioner.processor):
        part.save_pretrained(tmp_path / "saved")
    convert_to_stock(tmp_path / "saved", tmp_path / "parts")
    parts = [tmp_path / "parts" / name for name in ("clap", "decoder")]
    convert_stock(*parts, tmp_path / "again", tmp_path / "parts" / "cross_attention.safetensors")
    again = RecapForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.config.encoder_states == "embedding"
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in captioner.model.state_dict().items())
    with pytest.raises(ConversionError, match="conditioned on CLAP's embeddings"):
        stock_decoder(captioner.model)


def test_onnx(captioner, recordings, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'recap-hf[onnx]'")
    from recap_hf.conversion.onnx_export import export_onnx
    from recap_hf.onnx_runtime import OnnxCaptioner

    for part in (captioner.model, captioner.processor):
        part.save_pretrained(tmp_path / "saved")
    export_onnx(tmp_path / "saved", tmp_path / "onnx")
    runner = OnnxCaptioner(tmp_path / "onnx", num_threads=1)
    for recording in recordings:
        expected = captioner.caption([recording])[0]
        found = runner(recording, captioner.sampling_rate, max_new_tokens=8)
        assert (found["caption"], found["score"]) == (expected.caption, pytest.approx(expected.score, rel=1e-3))
    processor = copy.copy(captioner.processor)
    processor.projection_temperature = 0.1
    processor.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConversionError, match="does not project"):
        export_onnx(tmp_path / "saved", tmp_path / "projected")


def test_projection_by_hand(captioner, recordings):
    """Each window becomes the softmax mean of the captions' embeddings; its own clip's captions do not count."""
    store = captioner.datastore
    plain = captioner.encode(recordings)
    projected = captioner.with_options(CaptionOptions(projection_temperature=0.2))
    found = projected.encode(recordings)
    texts, width = np.asarray(store.embeddings), store.dimension
    windows = plain.audio_embeds.numpy()

    def expected(query: np.ndarray, kept: np.ndarray) -> np.ndarray:
        weights = np.exp(kept @ query / 0.2)
        mean = (weights / weights.sum()) @ kept
        return mean / np.linalg.norm(mean) * width**0.5

    for clip, window in ((0, 0), (1, 0), (1, 2), (2, 0)):
        state = found.last_hidden_state[clip, window].numpy()
        np.testing.assert_allclose(state, expected(windows[clip, window], texts), atol=1e-4)
    assert not found.last_hidden_state[0, 1:].any() and torch.equal(found.attention_mask, plain.attention_mask)
    torch.testing.assert_close(found.audio_embeds, plain.audio_embeds)
    excluded = projected.encode(recordings[:1], exclude_texts=[TINY_CAPTIONS[:3]])
    np.testing.assert_allclose(excluded.last_hidden_state[0, 0].numpy(), expected(windows[0, 0], texts[3:]), atol=1e-4)


def test_projection_stands_in_the_checkpoint(captioner, recordings, tmp_path):
    processor = copy.copy(captioner.processor)
    processor.projection_temperature = 0.05
    for part in (captioner.model, processor):
        part.save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(tmp_path)
    asked = captioner.with_options(CaptionOptions(projection_temperature=0.05))
    torch.testing.assert_close(
        loaded.encode(recordings).last_hidden_state, asked.encode(recordings).last_hidden_state, rtol=0, atol=1e-5
    )
    off = loaded.with_options(CaptionOptions(projection_temperature=0))
    torch.testing.assert_close(
        off.encode(recordings).last_hidden_state, captioner.encode(recordings).last_hidden_state, rtol=0, atol=1e-5
    )


def test_what_cannot_be_projected_is_refused(captioner, recordings, tiny_model, tiny_processor):
    options = CaptionOptions(projection_temperature=0.1)
    hidden = Captioner(tiny_model, tiny_processor, options=options)
    with pytest.raises(ValueError, match="this one is on 'hidden' states"):
        hidden.encode([synthetic_clip(1.0, 0)])
    clips = [{"audio": (recordings[0], captioner.sampling_rate), "captions": ["a dog"]}]
    by_audio = datastore_from_clips(clips, captioner.model, captioner.processor)
    with pytest.raises(ValueError, match="this one is by audio"):
        captioner.with_datastore(by_audio).with_options(options).encode(recordings[:1])
    processor = copy.copy(captioner.processor)
    processor.projection_temperature = 0.1
    with pytest.raises(ValueError, match="does not project"):
        captioner.model.generate(encoder_outputs=captioner.encode(recordings[:1]), processor=processor)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`encoder_states` must be one of hidden, embedding"):
        RecapConfig(encoder_states="pooled")
    with pytest.raises(ValueError, match=r"`audio_position_embedding` must be one of None \(of embeddings\)"):
        RecapConfig(encoder_states="embedding", audio_position_embedding="sinusoidal")
