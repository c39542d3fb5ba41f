"""The embedded default on real recordings: it hears, alone as in a batch, and is small enough to carry."""

from __future__ import annotations

import json

import pytest
import torch

from recap_hf import (
    Captioner,
    RecapForConditionalGeneration,
    RecapProcessor,
    default_model_path,
    examples_path,
    load_audio,
)
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
    """Most of 16 recordings of 16 events, none of them in the training, are named."""
    import re

    keywords = json.loads((shared_dir / "data" / "keywords.json").read_text())["events"]
    named = [
        bool(re.search(keywords[path.parent.name], caption.lower()))
        for path, caption in zip(sound_files, captions(default_model, default_processor, waveforms, 3), strict=True)
    ]
    assert sum(named) >= 11, named


def test_it_names_everyday_sounds(default_model, default_processor, shared_dir):
    """Two thirds of one recording of each of 40 further kinds, which the training read."""
    import csv
    import re

    folder = shared_dir / "data" / "recordings"
    keywords = json.loads((shared_dir / "data" / "keywords_esc50.json").read_text())["events"]
    with open(folder / "metadata.csv", newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file) if row["label"] and row["fold"] == "4"}
    captioner = Captioner(default_model, default_processor)
    found = captioner.caption([captioner.read(folder / row["file_name"]) for row in rows.values()], batch_size=8)
    named = {
        label: bool(re.search(keywords[label], result.caption.lower()))
        for label, result in zip(rows, found, strict=True)
    }
    assert len(named) == 40 and sum(named.values()) >= 26, named


def test_the_captions_of_the_datastore_are_no_copies(default_processor, shared_dir):
    """No caption of the corpora beside it, except short ones, which anybody may write."""
    from recipes.recap_tiny.datastore import corpus_captions, without_copies

    texts = default_processor.datastore.captions
    assert len(texts) > 10_000
    assert without_copies(texts, corpus_captions(shared_dir / "data" / "captions")) == texts


def test_size_and_parts():
    size = sum(path.stat().st_size for path in default_model_path().rglob("*") if path.is_file())
    assert size <= 60_000_000
    for name in ("config.json", "model.safetensors", "tokenizer.json", "ATTRIBUTION.md", "RECORDINGS.csv"):
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
