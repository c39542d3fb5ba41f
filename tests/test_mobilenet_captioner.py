"""A captioner whose CLAP is a MobileNet: put together, trained, saved, exported and explained as with the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import run_without_the_package, tiny_gpt2_config, tiny_mobilenet_config
from training_parts import make_tokenizer, write_clotho
from transformers import GPT2LMHeadModel

from recap_cli import main
from recap_hf import (
    CaptionDatastore,
    Captioner,
    RecapFeatureExtractor,
    RecapForConditionalGeneration,
    RecapProcessor,
    TimelineSettings,
    caption_timeline,
)
from recap_hf.conversion import convert_stock, convert_to_stock
from recap_hf.evaluation.clap_score import ClapScorer
from recap_hf.explain import explain_caption
from recap_hf.explain.attribution import METHODS, Passage, attribute, token_log_probs
from recap_hf.explain.picture import clip_spectrogram
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel
from recap_hf.training.features import AudioTower
from recap_hf.training.run import train
from recap_hf.training.tasks.bases import new_captioner
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig
from recap_hf.training.tasks.language_model import LanguageModelTrainingConfig

RATE = 16_000
WITHOUT_THE_PACKAGE = """
import numpy as np
from transformers import AutoModel, AutoProcessor, pipeline

folder, clip = sys.argv[1], np.load(sys.argv[2])
model, processor = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModel, AutoProcessor))
inputs = processor(audio=clip, sampling_rate=16_000, return_tensors="pt")
captions = processor.batch_decode(model.generate(**inputs, processor=processor))
captioner = pipeline("audio-captioning", model=folder, trust_remote_code=True)
clap = type(model.clap)
print(json.dumps({
    "class": clap.__name__, "module": clap.__module__, "captions": [*captions, captioner(clip)["caption"]]
}))
"""


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Folders `clap` (a MobileNet, its extractor and tokenizer) and `decoder`, and recordings in Clotho's layout."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    MobileNetClapModel(tiny_mobilenet_config()).save_pretrained(folder / "clap")
    RecapFeatureExtractor(**MobileNetClapModel.feature_settings(tiny_mobilenet_config())).save_pretrained(
        folder / "clap"
    )
    make_tokenizer("clap").save_pretrained(folder / "clap")
    GPT2LMHeadModel(tiny_gpt2_config(vocab_size=380)).save_pretrained(folder / "decoder")
    make_tokenizer("gpt2").save_pretrained(folder / "decoder")
    write_clotho(folder / "clotho", train=6, validation=2)
    return folder


def settings(bases: Path, output: Path, kind: type = CaptionerTrainingConfig, **changes: object):
    values = {
        "dataset": ["clotho"],
        "data_dir": [str(bases / "clotho")],
        "clap": str(bases / "clap"),
        "output_dir": str(output),
        "batch_size": 8,
        "num_train_epochs": 1,
        "device": "cpu",
    }
    if kind is CaptionerTrainingConfig:
        values |= {"decoder": str(bases / "decoder"), "feature_cache": str(bases / "features")}
    return kind(**{**values, **changes}).validate()


def test_two_folders_become_a_captioner(bases: Path):
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(bases / "clap", bases / "decoder")
    assert isinstance(model.clap, MobileNetClapModel)
    assert model.config.window_length_s == 10.08
    assert model.config.encoder_hidden_size == 256
    clap = MobileNetClapModel.from_pretrained(bases / "clap")
    assert all(torch.equal(tensor, clap.state_dict()[name]) for name, tensor in model.clap.state_dict().items())


def test_windows_are_as_long_as_the_configuration_says(bases: Path):
    config = tiny_mobilenet_config()
    config.window_patches = 10
    extractor = RecapFeatureExtractor(**MobileNetClapModel.feature_settings(config))
    mel = extractor(noise(6.0), sampling_rate=RATE, return_tensors="pt")["input_features"]
    # Two windows of 4.8 s.
    assert mel.shape == (1, 2, 480, 64)
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(MobileNetClapModel(config), bases / "decoder")
    assert model.config.window_length_s == 4.8
    processor = RecapProcessor.from_config(model.config, make_tokenizer("gpt2"), make_tokenizer("clap"))
    assert processor.feature_extractor.max_length_s == 4.8
    assert Captioner(model, processor).encode([noise(6.0)]).last_hidden_state.shape == (1, 20, 256)


def test_a_captioner_is_trained_from_two_folders(bases: Path, tmp_path: Path):
    report = train(settings(bases, tmp_path, audio_dropout=0.3, share_prompts=True))
    assert report["evaluations"][-1]["loss"] < report["evaluations"][0]["loss"]
    model, processor = (kind.from_pretrained(tmp_path) for kind in (RecapForConditionalGeneration, RecapProcessor))
    extractor = processor.feature_extractor
    assert (extractor.sampling_rate, extractor.max_length_s, extractor.spectrogram) == (RATE, 10.08, "yamnet")
    processor.check_model(model)
    assert len(processor.datastore) == 30
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "MobileNet v1 audio tower" in card
    assert "16 kHz mono, in windows of 10.08 s" in card
    clap = MobileNetClapModel.from_pretrained(bases / "clap")
    assert all(torch.equal(tensor, clap.state_dict()[name]) for name, tensor in model.clap.state_dict().items())


def test_a_clap_without_a_tokenizer_is_refused(bases: Path, tmp_path: Path):
    MobileNetClapModel(tiny_mobilenet_config()).save_pretrained(tmp_path / "clap")
    RecapFeatureExtractor(**MobileNetClapModel.feature_settings(tiny_mobilenet_config())).save_pretrained(
        tmp_path / "clap"
    )
    with pytest.raises(ValueError, match="train its text tower first"):
        new_captioner(settings(bases, tmp_path, clap=str(tmp_path / "clap")))


def test_training_masks_what_captioning_masks(bases: Path, tmp_path: Path):
    """Stored states and their mask are those of `encode_audio`, also where a window in the middle is silent."""
    config = settings(bases, tmp_path)
    model, processor = new_captioner(config)
    silent_middle = np.concatenate([noise(10.08), np.zeros(161_280, dtype=np.float32), noise(3.0)])
    clips = [noise(1.0, 1), silent_middle]
    stored = list(AudioTower(model, processor).encode(clips))
    for clip, arrays in zip(clips, stored, strict=True):
        encoding = model.encode_audio(**processor(audio=clip, sampling_rate=RATE, return_tensors="pt"))
        heard = encoding.last_hidden_state[encoding.attention_mask.bool()]
        states = torch.from_numpy(np.concatenate(arrays["states"])).float()
        torch.testing.assert_close(states[states.any(dim=-1)], heard, atol=2e-3, rtol=0)
        queries = encoding.audio_embeds[0][encoding.audio_embeds[0].any(dim=-1)]
        torch.testing.assert_close(torch.from_numpy(arrays["embeds"]), queries, atol=1e-5, rtol=0)


def test_a_language_model_is_trained_on_its_nearest_captions(bases: Path, tmp_path: Path):
    config = settings(bases, tmp_path, LanguageModelTrainingConfig, num_layers=1, width=32, vocab_size=300)
    report = train(config)
    assert report["evaluations"][-1]["perplexity"] < report["evaluations"][0]["perplexity"]
    GPT2LMHeadModel.from_pretrained(tmp_path)


# ------------------------------------------------------------- what it can do


@pytest.fixture(scope="module")
def folder(bases: Path) -> Path:
    """A saved captioner whose captions depend on the audio, with a datastore."""
    torch.manual_seed(1)
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(bases / "clap", bases / "decoder")
    model.generation_config.max_new_tokens = 12
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(30.0 if "crossattention" in name else 4.0)
    extractor = RecapFeatureExtractor.from_clap_pretrained(bases / "clap")
    tokenizers = make_tokenizer("gpt2"), make_tokenizer("clap")
    processor = RecapProcessor.from_config(model.config, *tokenizers, feature_extractor=extractor)
    captions = ["a dog barks", "rain falls", "a bell rings", "wind blows", "a child laughs"]
    processor.datastore = CaptionDatastore.from_captions(captions, model, processor)
    model.save_pretrained(bases / "captioner")
    processor.save_pretrained(bases / "captioner")
    return bases / "captioner"


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.from_pretrained(folder)


def gapped() -> np.ndarray:
    """Two windows of sound with a silent one between them, and a rest."""
    return np.concatenate([noise(10.08, 5), np.zeros(161_280, dtype=np.float32), noise(12.0, 6)])


def test_the_command_captions_recordings_of_any_rate(capsys, folder: Path, captioner: Captioner, tmp_path: Path):
    for name, rate in (("a.wav", 44_100), ("b.wav", RATE)):
        soundfile.write(tmp_path / name, noise(3.0 * rate / RATE, 7), rate)
    assert main(["caption", str(tmp_path), "--model", str(folder), "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = captioner.caption([captioner.read(row["file"]) for row in rows])
    assert [row["caption"] for row in rows] == [result.caption for result in expected]
    assert len({result.caption for result in captioner.caption([noise(2.0, seed) for seed in range(4)])}) > 1


def test_a_process_without_the_package_loads_the_folder(folder: Path, captioner: Captioner, tmp_path: Path):
    np.save(tmp_path / "clip.npy", noise(12.0, 2))
    result = run_without_the_package(WITHOUT_THE_PACKAGE, tmp_path, folder, tmp_path / "clip.npy")
    assert result["class"] == "MobileNetClapModel"
    assert result["module"].startswith("transformers_modules")
    assert result["captions"] == [captioner.caption([noise(12.0, 2)])[0].caption] * 2


def test_bfloat16_encodes_nearly_the_same(folder: Path, captioner: Captioner):
    half = Captioner.from_pretrained(folder, dtype="bfloat16")
    clips = [noise(1.0, 1), noise(12.0, 2)]
    expected, found = captioner.encode(clips), half.encode(clips)
    assert found.last_hidden_state.dtype == torch.bfloat16
    assert torch.equal(found.attention_mask, expected.attention_mask)
    cosines = (found.audio_embeds * expected.audio_embeds).sum(dim=-1)
    assert cosines[expected.audio_embeds.any(dim=-1)].min() > 0.99
    assert all(result.caption for result in half.caption(clips))


def test_the_exported_graphs_give_the_same_captions(folder: Path, captioner: Captioner, tmp_path: Path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from recap_hf.conversion.onnx_export import export_onnx
    from recap_hf.onnx_runtime import OnnxCaptioner

    report = export_onnx(folder, tmp_path / "out")
    assert max(report["differences"].values()) < 1e-4
    runner = OnnxCaptioner(tmp_path / "out", num_threads=1)
    assert runner.sampling_rate == RATE
    clips = [noise(0.3, 1), noise(2.0, 2), noise(10.08, 3), gapped()]
    for clip, expected in zip(clips, captioner.caption(clips), strict=True):
        result = runner(clip, RATE)
        assert result["caption"] == expected.caption
        assert result["score"] == pytest.approx(expected.score, rel=1e-3)
        assert [hit["row"] for hit in result["retrieved"]] == [hit["row"] for hit in expected.retrieved]
        extractor = captioner.processor.feature_extractor
        windows = extractor(clip, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(runner.log_mel(clip), windows, rtol=0, atol=1e-3)


# --------------------------------------------------------------- explanations


def passage_of(captioner: Captioner, clip: np.ndarray, caption: str) -> Passage:
    processor, states = captioner.processor, captioner.encode([clip]).last_hidden_state
    prompt = processor.build_prompts(retrieved=[["rain falls"]])["decoder_input_ids"]
    ids = torch.cat([prompt, torch.tensor([processor.encode_caption(caption)])], dim=1)
    return Passage(states, ids, prompt.shape[1], [slice(0, 2)], (states.shape[1] // 21, 1, 21))


@torch.no_grad()
def log_probs(captioner: Captioner, passage: Passage, mask: torch.Tensor) -> torch.Tensor:
    logits = captioner.model(
        encoder_outputs=(passage.states,), attention_mask=mask, decoder_input_ids=passage.ids
    ).logits.log_softmax(dim=-1)
    return logits[0, passage.start - 1 : -1].gather(1, passage.targets[:, None])[:, 0]


def test_insertion_by_hand(captioner: Captioner):
    """Each of the nine patches of 4 s alone with those beside it, less the mean of all; the rest is padding."""
    passage = passage_of(captioner, noise(4.0, 1), "a dog barks")
    everything = log_probs(captioner, passage, torch.tensor([[1] * 9 + [0] * 12]))
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(captioner.model, passage)[0], everything, atol=1e-5, rtol=1e-4)
    alone = torch.zeros(9)
    for cell in range(9):
        mask = torch.zeros(1, 21, dtype=torch.long)
        mask[0, max(0, cell - 1) : min(cell + 2, 9)] = 1
        alone[cell] = log_probs(captioner, passage, mask).sum()
    expected = torch.cat([(alone - alone.mean()).clamp(min=0), torch.zeros(12)])
    found = attribute(captioner.model, passage, [range(len(passage.targets))], "insertion").audio[0, 0, 0]
    assert expected.max() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_padding_has_no_weight(captioner: Captioner, method: str):
    explanation = explain_caption(captioner, noise(1.0, 1), RATE, method=method, caption="a dog barks")
    assert explanation.time_edges_s.tolist() == pytest.approx([0.0, 0.48, 0.96, 1.0])
    assert explanation.band_edges_hz.tolist() == [125.0, 7500.0]
    for word in explanation.words:
        assert word.cell_weights.shape == (1, 1, 21)
        assert not word.cell_weights[0, 0, 3:].any()
        assert np.isfinite(word.audio_map).all() and np.isfinite(word.log_probability)
    assert any(word.audio_map.any() for word in explanation.words)


def test_a_silent_window_has_no_weight(captioner: Captioner):
    explanation = explain_caption(captioner, gapped(), RATE, caption="a dog barks")
    assert explanation.words[0].cell_weights.shape == (4, 1, 21)
    assert not any(word.cell_weights[1].any() for word in explanation.words)


def test_the_spectrogram_of_pictures_is_in_decibels(captioner: Captioner):
    extractor = captioner.processor.feature_extractor
    waveform = np.concatenate([noise(1.0), np.zeros(RATE, dtype=np.float32)])
    pictured = clip_spectrogram(waveform, RATE, extractor)
    assert pictured.shape == (200, 64)
    # 20 * log10(0.001).
    np.testing.assert_allclose(pictured[110:], -60.0, atol=1e-3)
    louder = clip_spectrogram(waveform * 10 ** (6 / 20), RATE, extractor)
    assert np.median(louder[:90] - pictured[:90]) == pytest.approx(6.0, abs=0.05)


# ------------------------------------------------------- timelines, live, parts


def two_sounds() -> np.ndarray:
    return np.concatenate([noise(4.0, 1), np.zeros(3 * RATE, dtype=np.float32), noise(3.0, 2) * 0.3])


def test_timelines(capsys, folder: Path, captioner: Captioner, tmp_path: Path):
    settings = TimelineSettings(novelty=2.0)
    segments = list(caption_timeline(captioner, two_sounds(), settings=settings))
    assert [(segment["start"], segment["end"]) for segment in segments] == [(0, 4), (4, 7), (7, 10)]
    expected = captioner.caption([two_sounds()[: 4 * RATE], two_sounds()[7 * RATE :]])
    assert [segments[0]["caption"], segments[2]["caption"]] == [result.caption for result in expected]
    soundfile.write(tmp_path / "a.wav", two_sounds(), RATE)
    options = ["--model", str(folder), "--novelty", "2", "--format", "audacity"]
    assert main(["timeline", str(tmp_path / "a.wav"), *options]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(float(start), float(end)) for start, end, _ in rows] == [(0, 4), (4, 7), (7, 10)]


def test_live_captions(capsys, folder: Path, captioner: Captioner, tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", two_sounds(), RATE)
    options = ["--model", str(folder), "--interval", "5", "--format", "jsonl"]
    assert main(["live", str(tmp_path / "a.wav"), *options]) == 0
    segments = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert segments[0]["start"] == 0.0
    assert segments[-1]["end"] == 10.0
    read = captioner.read(str(tmp_path / "a.wav"))
    for segment in segments:
        part = read[round(segment["start"] * RATE) : round(segment["end"] * RATE)]
        assert segment["caption"] == captioner.caption([part])[0].caption


def test_it_is_taken_apart_and_put_together(folder: Path, captioner: Captioner, tmp_path: Path):
    convert_to_stock(folder, tmp_path / "parts")
    clap = MobileNetClapModel.from_pretrained(tmp_path / "parts" / "clap")
    assert clap.config.id2label == {0: "Dog", 1: "Rain", 2: "Bell"}
    parts = tmp_path / "parts"
    convert_stock(parts / "clap", parts / "decoder", tmp_path / "again", parts / "cross_attention.safetensors")
    again = RecapForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in captioner.model.state_dict().items())
    processor = RecapProcessor.from_pretrained(tmp_path / "again")
    assert (processor.feature_extractor.sampling_rate, processor.feature_extractor.spectrogram) == (RATE, "yamnet")


def test_it_scores_captions_of_others(bases: Path):
    scorer = ClapScorer(str(bases / "clap"), "cpu")
    clap = MobileNetClapModel.from_pretrained(bases / "clap").eval()
    clips = [noise(1.0, 1), noise(25.0, 2)]
    features = scorer.feature_extractor(clips, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = clap.get_audio_features(**features).numpy()
    np.testing.assert_allclose(scorer.embed_audio(clips), expected, atol=1e-5)
