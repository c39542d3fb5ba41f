"""ONNX export and the runner without torch: the same numbers, the same captions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_CAPTIONS, synthetic_clip

from recap_cli import main
from recap_hf import AudioCaptioningPipeline, CaptionDatastore, RecapFeatureExtractor, RecapProcessor
from recap_hf.conversion import ConversionError

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'recap-hf[onnx]'")

from recap_hf.conversion.onnx_export import DecoderGraph, export_onnx  # noqa: E402 (needs what is checked above)
from recap_hf.onnx_runtime import OnnxCaptioner  # noqa: E402

RATE = 48_000


@pytest.fixture(scope="module")
def processor(_tiny_model, decoder_tokenizer, clap_tokenizer):
    result = RecapProcessor.from_config(_tiny_model.config, decoder_tokenizer, clap_tokenizer)
    result.datastore = CaptionDatastore.from_captions(TINY_CAPTIONS, _tiny_model, result)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory, _tiny_model, processor):
    folder = tmp_path_factory.mktemp("recap")
    _tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """One export for the whole file (it takes most of its time), with what the command said about it."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    report = export_onnx(saved, out)
    return out, report


@pytest.fixture(scope="module")
def captioner(exported):
    return OnnxCaptioner(exported[0], num_threads=1)


def altered(exported, tmp_path, **generation) -> OnnxCaptioner:
    """The exported captioner with other generation settings."""
    folder = tmp_path / "altered"
    shutil.copytree(exported[0], folder)
    settings = json.loads((folder / "recap_onnx.json").read_text())
    settings["generation"].update(generation)
    (folder / "recap_onnx.json").write_text(json.dumps(settings))
    return OnnxCaptioner(folder, num_threads=1)


def test_a_threshold_is_exported(exported, tmp_path):
    folder, settings = tmp_path / "strict", json.loads((exported[0] / "recap_onnx.json").read_text())
    shutil.copytree(exported[0], folder)
    (folder / "recap_onnx.json").write_text(json.dumps(settings | {"retrieval_score_threshold": 1.0}))
    clip = synthetic_clip(2.0, 0)
    refused = {"caption": "an unrecognised sound", "score": 0.0, "retrieved": [], "fits": False}
    assert OnnxCaptioner(folder, num_threads=1)(clip, RATE) == refused
    (folder / "recap_onnx.json").write_text(json.dumps(settings | {"retrieval_score_threshold": -1.0}))
    plain = OnnxCaptioner(exported[0], num_threads=1)(clip, RATE)
    assert OnnxCaptioner(folder, num_threads=1)(clip, RATE) == plain | {"fits": True}


def test_export_reports_what_it_compared(exported):
    _, report = exported
    assert set(report["differences"]) == {
        "log-mel",
        "hidden states",
        "audio embeddings",
        "logits of the prompt",
        "logits of a later token",
    }
    assert max(report["differences"].values()) < 1e-4
    assert report["left_out"] == {}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_same_results_as_the_pipeline(_tiny_model, processor, captioner, clips, num_beams):
    pipe = AudioCaptioningPipeline(model=_tiny_model, processor=processor, device="cpu")
    expected = pipe(list(clips), num_beams=num_beams, max_new_tokens=20)
    assert len({result["caption"] for result in expected}) > 1
    for clip, reference in zip(clips, expected, strict=True):
        result = captioner(clip, RATE, num_beams=num_beams, max_new_tokens=20)
        assert result["caption"] == reference["caption"]
        assert result["score"] == pytest.approx(reference["score"], rel=1e-3)
        assert [hit["row"] for hit in result["retrieved"]] == [hit["row"] for hit in reference["retrieved"]]


def test_a_caption_holds_one_token_of_a_group(_tiny_model, processor, exported, clips, tmp_path):
    groups = [token % 30 for token in range(300)]
    pipe = AudioCaptioningPipeline(model=_tiny_model, processor=processor, device="cpu")
    settings = {"num_beams": 3, "max_new_tokens": 20}
    expected = pipe(list(clips), **settings, generate_kwargs={"no_repeat_token_groups": groups})
    assert expected != pipe(list(clips), **settings), "the premise: groups change captions"
    runner = altered(exported, tmp_path, no_repeat_token_groups=groups)
    assert [runner(clip, RATE, **settings)["caption"] for clip in clips] == [row["caption"] for row in expected]


@torch.no_grad()
def test_caches_grow_as_in_torch(_tiny_model, captioner):
    """Prompts of two rows with their own states, then one token, then two at once, against one pass without caches."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 9, _tiny_model.config.encoder_hidden_size, generator=generator)
    ids = torch.randint(0, 300, (2, 10), generator=generator)
    expected = _tiny_model(encoder_outputs=(hidden,), decoder_input_ids=ids).logits.numpy()
    cross = captioner.cross_caches(hidden.numpy())
    past = captioner.empty_caches(2)
    for start, stop in ((0, 7), (7, 8), (8, 10)):
        logits, past = captioner.step(ids[:, start:stop].numpy(), past, cross)
        np.testing.assert_allclose(logits, expected[:, stop - 1], rtol=0, atol=2e-5 * np.abs(expected).max())
    assert past[0].shape[2] == 10


@torch.no_grad()
def test_decoder_graph_honours_both_masks(_tiny_model):
    """The module behind the graph on a left-padded batch with masked states, against the model's own forward."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 6, _tiny_model.config.encoder_hidden_size, generator=generator)
    states_mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.randint(0, 300, (2, 5), generator=generator)
    heads, layers = 3, 2
    cross = []
    for block in _tiny_model.decoder.transformer.h:
        for part in block.crossattention.c_attn(hidden).chunk(2, dim=-1):
            cross.append(part.unflatten(-1, (heads, -1)).transpose(1, 2))
    empty = [torch.zeros(2, heads, 0, 8) for _ in range(2 * layers)]
    logits, _ = DecoderGraph(_tiny_model)(ids, mask, states_mask, empty, cross)
    expected = _tiny_model(
        encoder_outputs=(hidden,), attention_mask=states_mask, decoder_input_ids=ids, decoder_attention_mask=mask
    ).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_beam_search_is_that_of_transformers(
    _tiny_model, processor, exported, tmp_path, early_stopping, length_penalty
):
    """Searches from random prompts that end by the end token: it is made to be one that the model likes to say."""
    inputs = processor(audio=[synthetic_clip(4.0, seed=3)], sampling_rate=RATE, return_tensors="pt")
    settings = {"early_stopping": early_stopping, "length_penalty": length_penalty, "max_new_tokens": 10}
    ended = 0
    for seed in range(3):
        prompt = torch.randint(0, 300, (1, 6), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            encoding = _tiny_model.encode_audio(**inputs)
            logits = _tiny_model(encoder_outputs=encoding, decoder_input_ids=prompt).logits
        for eos in logits[0, -1].topk(3).indices.tolist():
            runner = altered(exported, tmp_path / f"{seed}-{eos}", **settings, eos_token_id=eos)
            cross = runner.cross_caches(encoding.last_hidden_state.numpy())
            for num_beams in (1, 3, 5):
                options = {**settings, "num_beams": num_beams, "eos_token_id": eos}
                ids = _tiny_model.generate(encoder_outputs=encoding, decoder_input_ids=prompt, **options)
                expected = ids[0, 6:].tolist()
                if eos in expected:
                    expected = expected[: expected.index(eos) + 1]
                    ended += 1
                assert runner.search(prompt[0].tolist(), cross, num_beams, 10)[0] == expected
    assert 4 < ended < 27


@pytest.mark.parametrize("seconds", [0.4, 2.5, 10.0, 23.0])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_mel_is_the_feature_extractors(exported, tmp_path, seconds, padding):
    clip = synthetic_clip(seconds, seed=1)
    extractor = RecapFeatureExtractor(padding=padding, compute_dtype="float64")
    expected = extractor(clip, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    folder = tmp_path / "out"
    shutil.copytree(exported[0], folder)
    settings = json.loads((folder / "recap_onnx.json").read_text())
    settings["mel"]["padding"] = padding
    (folder / "recap_onnx.json").write_text(json.dumps(settings))
    mel = OnnxCaptioner(folder, num_threads=1).log_mel(clip)
    assert mel.shape == expected.shape and mel.dtype == np.float32
    np.testing.assert_allclose(mel, expected, rtol=0, atol=1e-3)


RUN_WITHOUT_TORCH = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets", "safetensors"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
from recap_cli import main
status = main(sys.argv[1:])
assert not {"torch", "transformers"} & set(sys.modules)
sys.exit(status)
"""


def test_command_runs_without_torch(exported, captioner, tmp_path):
    import soundfile

    for name, seed in (("one.wav", 1), ("two.flac", 2)):
        soundfile.write(tmp_path / name, synthetic_clip(3.0, seed), RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    files = [str(tmp_path / name) for name in ("one.wav", "broken.wav", "two.flac")]
    command = [sys.executable, "-c", RUN_WITHOUT_TORCH, "onnx", str(exported[0]), *files, "--format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["file"] for result in results] == [files[0], files[2]]
    for result in results:
        assert result["caption"] == captioner(result["file"])["caption"]
    assert "broken.wav" in done.stderr and "Traceback" not in done.stderr


def test_another_datastore_is_used_or_refused(_tiny_model, processor, exported, tmp_path):
    mine = CaptionDatastore.from_captions(["a kettle whistles", "a door slams"], _tiny_model, processor)
    mine.save_pretrained(tmp_path / "mine")
    result = OnnxCaptioner(exported[0], datastore=tmp_path / "mine")(synthetic_clip(2.0, 1), RATE, k=1)
    assert result["retrieved"][0]["caption"] in mine.captions and len(result["retrieved"]) == 1
    foreign = CaptionDatastore.from_embeddings(["a"], np.eye(16)[:1], np.eye(16)[:4])
    with pytest.raises(ValueError, match="another CLAP"):
        OnnxCaptioner(exported[0], datastore=foreign)


def test_silence_and_bad_input(captioner):
    assert captioner(np.zeros(RATE, dtype=np.float32), RATE)["caption"] == "silence"
    with pytest.raises(ValueError, match="NaN"):
        captioner(np.full(RATE, np.nan, dtype=np.float32), RATE)
    with pytest.raises(ValueError, match="sampling_rate"):
        captioner(np.ones(RATE, dtype=np.float32))


def test_incomplete_or_newer_folder_is_refused(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "recap_onnx.json").read_text())
    (tmp_path / "out" / "recap_onnx.json").write_text(json.dumps({**settings, "format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        OnnxCaptioner(tmp_path / "out")
    (tmp_path / "out" / "decoder.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"decoder\.onnx"):
        OnnxCaptioner(tmp_path / "out")


def test_generation_that_the_runner_does_not_know_is_refused(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "repetition_penalty": 1.3}))
    with pytest.raises(ConversionError, match="repetition_penalty"):
        export_onnx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_threads(exported, monkeypatch):
    def threads(**options):
        captioner = OnnxCaptioner(exported[0], **options)
        sessions = (captioner._audio, captioner._cross, captioner._decoder)
        return {session.get_session_options().intra_op_num_threads for session in sessions}

    assert threads() == {1}
    assert threads(num_threads=3) == {3}
    # A large model has as many as ONNX Runtime takes.
    monkeypatch.setattr("recap_hf.onnx_runtime._SMALL_MODEL", 1_000)
    assert threads() == {0}


def test_commands_name_their_arguments(exported, capsys):
    assert main(["onnx", str(exported[0]), "/nowhere.wav"]) == 1
    assert "/nowhere.wav" in capsys.readouterr().err


def test_the_embedded_default_is_exported(tmp_path):
    """With its position embeddings: the captions of the examples are those of torch without reranking."""
    from recap_hf import Captioner, CaptionOptions, default_model_path, examples_path

    if not (default_model_path() / "model.safetensors").is_file():
        pytest.skip("no embedded default in this checkout")
    source = tmp_path / "default"
    shutil.copytree(default_model_path(), source)
    reference = Captioner.from_pretrained(str(source), options=CaptionOptions(rerank="none"))
    assert reference.model.config.audio_position_embedding == "sinusoidal"
    export_onnx(source, tmp_path / "onnx")
    runner = OnnxCaptioner(tmp_path / "onnx", num_threads=1)
    files = sorted(examples_path().glob("*.flac"))
    expected = reference.caption([reference.read(file) for file in files])
    assert len({result.caption for result in expected}) > 3
    for file, result in zip(files, expected, strict=True):
        actual = runner(str(file))
        assert actual["caption"] == result.caption, file
        assert [hit["caption"] for hit in actual["retrieved"]] == [hit["caption"] for hit in result.retrieved]
        assert actual["score"] == pytest.approx(result.score, rel=1e-3)
