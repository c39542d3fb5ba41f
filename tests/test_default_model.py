"""The embedded default on real recordings: it hears, alone as in a batch, and is small enough to carry."""

from __future__ import annotations

import json

import pytest
import torch

from recap_hf import RecapForConditionalGeneration, RecapProcessor, default_model_path, examples_path, load_audio
from recap_hf.modeling.audio_recap import resample, to_mono


@pytest.fixture(scope="module")
def default_model():
    return RecapForConditionalGeneration.from_pretrained(default_model_path()).eval()


@pytest.fixture(scope="module")
def default_processor():
    return RecapProcessor.from_pretrained(default_model_path())


@pytest.fixture(scope="module")
def waveforms(sound_files):
    clips = []
    for path in sound_files:
        waveform, rate = load_audio(path)
        clips.append(resample(to_mono(waveform), rate, 48_000))
    lengths = {len(clip) for clip in clips}
    assert len(lengths) > 3, "the premise: recordings of different lengths"
    return clips


def captions(model, processor, clips, num_beams):
    inputs = processor(audio=clips, sampling_rate=48_000, return_tensors="pt")
    ids = model.generate(**inputs, processor=processor, num_beams=num_beams)
    return processor.batch_decode(ids)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_sixteen_real_clips_alone_as_in_a_batch(default_model, default_processor, waveforms, attention, num_beams):
    default_model.set_attn_implementation(attention)
    together = captions(default_model, default_processor, waveforms, num_beams)
    assert len(set(together)) > 4, "the premise: captions depend on the clip"
    alone = [captions(default_model, default_processor, [clip], num_beams)[0] for clip in waveforms]
    assert alone == together


def test_it_hears(default_model, default_processor, sound_files, waveforms, shared_dir):
    """Most of 16 recordings of 16 events, none heard in training, are named; chance is one in 21."""
    import re

    keywords = json.loads((shared_dir / "data" / "keywords.json").read_text())["events"]
    named = [
        bool(re.search(keywords[path.parent.name], caption.lower()))
        for path, caption in zip(sound_files, captions(default_model, default_processor, waveforms, 3), strict=True)
    ]
    assert sum(named) >= 6, named


def test_size_and_parts():
    size = sum(path.stat().st_size for path in default_model_path().rglob("*") if path.is_file())
    assert size <= 25_000_000
    for name in ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json"):
        assert (default_model_path() / name).is_file(), name
    # Inside the package the code is there already; `save_pretrained` and `recap push` add it for elsewhere.
    assert not list(default_model_path().rglob("*.py"))
    for path in default_model_path().rglob("*.json"):
        assert "/work" not in path.read_text(encoding="utf-8"), path


def test_it_loads_as_float32(default_model):
    assert {parameter.dtype for parameter in default_model.parameters()} == {torch.float32}


def test_the_examples_can_be_captioned():
    files = sorted(path for path in examples_path().iterdir() if path.suffix in (".flac", ".ogg"))
    assert files
    for path in files:
        waveform, _ = load_audio(path)
        assert waveform.size
