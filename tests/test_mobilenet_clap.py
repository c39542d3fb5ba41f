"""The CLAP on YAMNet's MobileNet: its features and convolutions against other implementations, alone and in batches,
behind the captioner, and as a model of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2_config
from training_parts import make_tokenizer

from recap_hf import (
    CaptionDatastore,
    RecapConfig,
    RecapForConditionalGeneration,
    RecapProcessor,
)
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel
from recap_hf.training.tasks.contrastive import clip_scores

RATE = 16_000


@pytest.fixture(scope="module")
def captioner(clap) -> Captioner:
    torch.manual_seed(1)
    model = RecapForConditionalGeneration(
        RecapConfig(clap=clap.config.to_dict(), decoder=tiny_gpt2_config(vocab_size=380))
    ).eval()
    model.clap.load_state_dict(clap.state_dict())
    processor = RecapProcessor.from_config(model.config, make_tokenizer("gpt2"), make_tokenizer("clap"))
    captions = ["a dog barks", "rain falls", "a bell rings", "wind blows"]
    processor.datastore = CaptionDatastore.from_captions(captions, model, processor)
    return Captioner(model, processor)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


# --------------------------------------------------------------------- features


def test_the_features_are_yamnets(extractor):
    """Against NumPy: 25 ms Hann windows each 10 ms, HTK triangles on the magnitudes of 512 points, the logarithm."""
    waveform = noise(0.975)
    edges_mel = np.linspace(*(1127 * np.log1p(np.array([125.0, 7500.0]) / 700)), 66)
    bins = 1127 * np.log1p(np.arange(257) * RATE / 512 / 700)
    lower, centre, upper = edges_mel[:-2], edges_mel[1:-1], edges_mel[2:]
    rising = (bins[:, None] - lower) / (centre - lower)
    falling = (upper - bins[:, None]) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([waveform[start : start + 400] * hann for start in range(0, 15_600 - 399, 160)])
    expected = np.log(np.abs(np.fft.rfft(frames, 512)) @ triangles + 0.001)
    found = extractor.log_mel(waveform).numpy()
    assert found.shape == (96, 64)
    # The filters of transformers are triangles in Hz between the same edges, YAMNet's in mel.
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_frames_of_a_window_are_centred_on_their_ten_milliseconds(extractor):
    """A click in the middle of frame 500 is loudest there, and its neighbours are alike."""
    waveform = np.zeros(10 * RATE, dtype=np.float32)
    waveform[500 * 160 + 80] = 0.9
    mel = extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_features"][0, 0].exp().sum(dim=-1)
    assert mel.shape == (1008,)
    assert mel.argmax() == 500
    assert mel[499].item() == pytest.approx(mel[501].item(), rel=0.02)


def test_padding_and_silence_have_the_silence_level(extractor):
    mel = extractor(noise(1.0), sampling_rate=RATE, return_tensors="pt")["input_features"][0, 0]
    assert torch.allclose(mel[110:], torch.tensor(extractor.silence_level, dtype=torch.float32))
    # 6 dB more level: 6 times `decibel` more, but for the offset.
    louder = extractor(noise(1.0) * 10 ** (6 / 20), sampling_rate=RATE, return_tensors="pt")["input_features"][0, 0]
    assert (louder - mel)[:98].mean().item() == pytest.approx(6 * extractor.decibel, abs=0.02)


# ------------------------------------------------------------------------ tower


def test_convolutions_pad_as_tensorflow_does(clap):
    """By hand: with stride 2, an even side is padded by one row at its end alone."""
    layer = clap.audio_model.layers[0]
    image = torch.randn(1, 1, 96, 64)
    with torch.no_grad():
        found = layer(image)
    assert found.shape[-2:] == (48, 32)
    weight, bias = layer.convolution.weight[0, 0].detach(), layer.convolution.bias[0].detach()
    inner = float((image[0, 0, 6:9, 10:13] * weight).sum() + bias)
    assert found[0, 0, 3, 5].item() == pytest.approx(min(max(inner, 0.0), 6.0), abs=1e-5)
    corner = float((image[0, 0, 94:96, 62:64] * weight[:2, :2]).sum() + bias)
    assert found[0, 0, 47, 31].item() == pytest.approx(min(max(corner, 0.0), 6.0), abs=1e-5)


def test_patches_without_sound_are_neither_pooled_nor_states(clap, extractor):
    """The embedding of a short clip is that of its own patches; a silent window keeps all of them."""
    features = extractor([noise(2.0), np.zeros(RATE, dtype=np.float32)], sampling_rate=RATE, return_tensors="pt")
    windows = features["input_features"]
    with torch.no_grad():
        states, embeds = clap.encode_windows(windows)
        tower = clap.audio_features(windows)
    # 2 s are 4.17 patches of 0.48 s.
    assert (states[0] != 0).any(dim=-1).tolist() == [True] * 5 + [False] * 16
    assert (states[1] != 0).any(dim=-1).all()
    own = tower[0, :5]
    pooled = clap.audio_projection(torch.cat([own.mean(dim=0), own.amax(dim=0)])[None])
    torch.testing.assert_close(embeds[0], torch.nn.functional.normalize(pooled, dim=-1)[0])
    torch.testing.assert_close(states[0, :5].mean(dim=-1), torch.zeros(5), atol=1e-5, rtol=0)


def test_clip_scores_by_hand():
    probabilities = torch.tensor([[[0.2, 0.0], [0.6, 0.1], [0.0, 0.0]]])
    torch.testing.assert_close(clip_scores(probabilities), torch.tensor([[(0.4 + 0.6) / 2, (0.05 + 0.1) / 2]]))


def test_a_clip_is_encoded_the_same_alone_and_in_a_batch(captioner):
    clips = [noise(1.0, 1), noise(23.0, 2), noise(10.0, 3)]
    together = captioner.caption(clips)
    for clip, expected in zip(clips, together, strict=True):
        alone = captioner.caption([clip])[0]
        assert alone.caption == expected.caption
        assert alone.score == pytest.approx(expected.score, abs=1e-5)


def test_the_decoder_does_not_attend_to_padding(captioner):
    """Changing what is behind the end of a short clip changes nothing."""
    encoding = captioner.model.encode_audio(
        captioner.processor(audio=noise(2.0), sampling_rate=RATE, return_tensors="pt")["input_features"]
    )
    assert encoding.attention_mask.tolist() == [[1] * 5 + [0] * 16]
    prompts = captioner.processor.build_prompts(encoding.audio_embeds)
    inputs = {name: prompts[name] for name in ("decoder_input_ids", "decoder_attention_mask")}
    changed = type(encoding)(**encoding)
    changed["last_hidden_state"] = encoding.last_hidden_state.clone()
    changed["last_hidden_state"][:, 5:] = 7.0
    with torch.no_grad():
        plain, other = (captioner.model(encoder_outputs=part, **inputs).logits for part in (encoding, changed))
    assert torch.equal(plain, other)


def test_fast_generation_gives_the_captions_of_stock_generation(captioner):
    clips = [noise(1.0), noise(12.0)]
    inputs = captioner.processor(audio=clips, sampling_rate=RATE, return_tensors="pt")
    stock = captioner.model.generate(**inputs, processor=captioner.processor)
    fast = captioner.caption(clips)
    assert [result.caption for result in fast] == captioner.processor.batch_decode(stock)


# ------------------------------------------------------------ a model of its own


def test_saved_it_loads_with_the_auto_classes(clap, extractor, tmp_path: Path):
    from transformers import AutoFeatureExtractor, AutoModel

    clap.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MobileNetClapModel
    assert loaded.config.id2label == {0: "Dog", 1: "Rain", 2: "Bell"}
    mel = AutoFeatureExtractor.from_pretrained(tmp_path)(noise(1.0), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = clap.get_audio_features(**mel)
        torch.testing.assert_close(loaded.eval().get_audio_features(**mel), expected)


def test_zero_shot_classification_of_transformers(clap, extractor, tmp_path: Path):
    from transformers import pipeline

    clap.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    make_tokenizer("clap").save_pretrained(tmp_path)
    classify = pipeline("zero-shot-audio-classification", model=str(tmp_path))
    found = classify(noise(2.0), candidate_labels=["dog", "rain"], hypothesis_template="{}")
    assert sum(entry["score"] for entry in found) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        mel = extractor(noise(2.0), sampling_rate=RATE, return_tensors="pt")
        audio = clap.get_audio_features(**mel)
        tokens = make_tokenizer("clap")(["dog", "rain"], padding=True, return_tensors="pt")
        texts = clap.encode_text(tokens.input_ids, tokens.attention_mask)
        expected = (audio @ texts.T * clap.logit_scale_a.exp()).softmax(dim=-1)[0]
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        {"dog": expected[0].item(), "rain": expected[1].item()}, abs=1e-5
    )


@pytest.mark.slow
def test_the_published_yamnet_converts(shared_dir: Path, tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    from recap_hf.conversion import convert_yamnet

    recordings = sorted((shared_dir / "data" / "recordings" / "esc50").glob("*.ogg"))[::60]
    report = convert_yamnet(shared_dir / "data" / "teacher" / "yamnet.tflite", tmp_path / "out", recordings=recordings)
    assert report["same_first_class"] >= 0.8
    model = MobileNetClapModel.from_pretrained(tmp_path / "out")
    assert len(model.config.id2label) == 521
    assert model.config.id2label[0] == "Speech"


def test_a_file_that_is_not_yamnet_is_refused(tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    from recap_hf.conversion import ConversionError, convert_yamnet

    wrong = tmp_path / "model.tflite"
    wrong.write_bytes(b"not a model")
    with pytest.raises(ConversionError, match="not a TFLite model"):
        convert_yamnet(wrong, tmp_path / "out", recordings=[])
    assert not (tmp_path / "out").exists()
