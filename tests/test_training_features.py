"""Encode once, retrieve once: what is stored is what the model gives, read again, and told apart by encoder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file
from training_parts import captions_of, make_captioner, write_clip, write_clotho

from recap_hf import CaptionDatastore, load_audio
from recap_hf.data import load_captions
from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text
from recap_hf.training import features
from recap_hf.training.features import (
    AudioTower,
    EncodedDataset,
    FeatureStore,
    content_key,
    encoder_identity,
    store_features,
)
from recap_hf.training.neighbours import Query, find_neighbours, search_key


@pytest.fixture(scope="module")
def captioner():
    return make_captioner()


@pytest.fixture
def data(tmp_path: Path):
    folder = write_clotho(tmp_path / "clotho", train=5, validation=1)
    write_clip(folder / "development" / "clip 0.wav", 0, seconds=12.0)
    return load_captions("clotho", folder).dataset


def encode_dataset(dataset, model, processor, folder: Path, **options) -> EncodedDataset:
    return store_features(dataset, AudioTower(model, processor), folder / "features", **options)


def test_stored_features_are_the_models(captioner, data, tmp_path: Path):
    model, processor = captioner
    encoded = encode_dataset(data, model, processor, tmp_path)
    assert (encoded.encoded, encoded.reused, encoded.problems) == (5, 0, [])
    for row, key in enumerate(encoded.keys):
        waveform, rate = load_audio(data[row]["audio"])
        inputs = processor(audio=[waveform], sampling_rate=rate, return_tensors="pt")
        with torch.no_grad():
            expected = model.encode_audio(**inputs)
        stored = encoded.store.read(key, "states")
        assert stored.dtype == np.float16
        np.testing.assert_allclose(np.concatenate(stored), expected.last_hidden_state[0], atol=2e-3)
        np.testing.assert_allclose(encoded.store.read(key, "embeds"), expected.audio_embeds[0], atol=1e-5)
    # Twelve seconds are two windows.
    assert len(encoded.store.read(encoded.keys[0], "embeds")) == 2


def test_a_second_run_reads_everything(captioner, data, tmp_path: Path):
    model, processor = captioner
    first = encode_dataset(data, model, processor, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.store.folder.iterdir()}
    second = encode_dataset(data, model, processor, tmp_path)
    assert (second.encoded, second.reused, second.keys) == (0, 5, first.keys)
    assert {path: path.stat().st_mtime_ns for path in second.store.folder.iterdir()} == before


def test_a_changed_encoder_is_noticed(captioner, data, tmp_path: Path, caplog):
    model, processor = captioner
    first = encode_dataset(data, model, processor, tmp_path)
    other, _ = make_captioner(seed=1)
    with caplog.at_level("WARNING", logger="recap_hf"):
        second = encode_dataset(data, other, processor, tmp_path)
    assert second.encoded == 5
    assert second.store.fingerprint != first.store.fingerprint
    assert f"holds features of other encoders or settings ({first.store.fingerprint})" in caplog.text
    identity = encoder_identity(model, processor.feature_extractor)
    processor.feature_extractor.compute_dtype = "float64"
    try:
        assert encoder_identity(model, processor.feature_extractor) != identity
    finally:
        processor.feature_extractor.compute_dtype = "float32"
    model.config.audio_position_embedding = "sinusoidal"
    try:
        assert encoder_identity(model, processor.feature_extractor) != identity
    finally:
        model.config.audio_position_embedding = None


def test_a_killed_run_goes_on_and_writes_the_same_numbers(captioner, data, tmp_path: Path, monkeypatch):
    """Whole shards survive; what was half-written is done again, in the same batches."""
    model, processor = captioner
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 2)
    whole = encode_dataset(data, model, processor, tmp_path)
    shutil.copytree(tmp_path / "features", tmp_path / "cut" / "features")
    folder = tmp_path / "cut" / "features" / whole.store.fingerprint
    lost = sorted(folder.glob("shard-*"))[1]
    keys = {name.partition("/")[0] for name in load_file(lost)}
    lost.unlink()
    # What a kill leaves of a shard is none.
    (folder / ".shard-x.safetensors.1.tmp").write_bytes(b"half")
    again = encode_dataset(data, model, processor, tmp_path / "cut")
    assert (again.encoded, again.reused) == (len(keys), 5 - len(keys))
    for key in whole.keys:
        assert np.array_equal(again.store.read(key, "states"), whole.store.read(key, "states"))


def test_worker_processes_encode_the_same(captioner, data, tmp_path: Path):
    model, processor = captioner
    here = encode_dataset(data, model, processor, tmp_path)
    there = encode_dataset(data, model, processor, tmp_path / "other", workers=2)
    assert there.encoded == 5
    for key in here.keys:
        assert np.array_equal(here.store.read(key, "states"), there.store.read(key, "states"))


def test_equal_recordings_are_encoded_once(captioner, tmp_path: Path):
    model, processor = captioner
    folder = tmp_path / "clotho"
    write_clotho(folder, train=3, validation=1)
    shutil.copy(folder / "development" / "clip 0.wav", folder / "development" / "clip 2.wav")
    encoded = encode_dataset(load_captions("clotho", folder).dataset, model, processor, tmp_path)
    assert encoded.encoded == 2
    assert encoded.keys[0] == encoded.keys[2]


def test_an_edited_recording_is_encoded_again(captioner, data, tmp_path: Path):
    model, processor = captioner
    first = encode_dataset(data, model, processor, tmp_path)
    write_clip(Path(data[3]["audio"]["path"]), 40)
    second = encode_dataset(data, model, processor, tmp_path)
    assert (second.encoded, second.reused) == (1, 4)
    assert second.keys[3] != first.keys[3]


def test_broken_recordings_are_named_and_the_rest_is_encoded(captioner, tmp_path: Path):
    model, processor = captioner
    folder = write_clotho(tmp_path / "clotho", train=6, validation=1)
    clips = folder / "development"
    (clips / "clip 1.wav").write_bytes(b"no audio at all")
    (clips / "clip 2.wav").write_bytes(b"")
    soundfile.write(clips / "clip 3.wav", np.array([0.5], dtype=np.float32), 8000)
    soundfile.write(clips / "clip 4.wav", np.full(800, np.nan, dtype=np.float32), 8000, subtype="FLOAT")
    encoded = encode_dataset(load_captions("clotho", folder).dataset, model, processor, tmp_path)
    assert [key is None for key in encoded.keys] == [False, True, True, True, True, False]
    reasons = {problem.clip_id: problem.detail for problem in encoded.problems}
    assert list(reasons) == [f"clip {number}.wav" for number in (1, 2, 3, 4)]
    assert "1 samples (0.125 ms) are too short" in reasons["clip 3.wav"]
    assert "NaN" in reasons["clip 4.wav"]
    assert all(problem.kind == "unreadable" for problem in encoded.problems)


def test_content_key_ignores_the_name(tmp_path: Path):
    path = write_clip(tmp_path / "a.wav", 3)
    content = path.read_bytes()
    assert content_key({"path": str(path), "bytes": None}) == content_key({"path": None, "bytes": content})
    assert content_key({"path": None, "bytes": content + b"x"}) != content_key({"path": None, "bytes": content})


def test_hidden_states_beyond_fp16_are_refused(tmp_path: Path):
    store = FeatureStore(tmp_path, {"weights": "x"})
    with pytest.raises(ValueError, match="exceeds fp16"):
        store.add_shard({"k": {"states": torch.full((1, 2, 3), 1e6).half().numpy()}})


def test_a_damaged_shard_is_named(captioner, data, tmp_path: Path):
    first = encode_dataset(data, *captioner, tmp_path)
    (shard,) = first.store.folder.glob("shard-*")
    damaged = shard.with_name("shard-damaged.safetensors")
    damaged.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=re.escape(f"{damaged} is damaged")):
        encode_dataset(data, *captioner, tmp_path)


# ------------------------------------------------------------------ neighbours


@pytest.fixture
def search():
    """Four clips of three captions; a clip's own captions are the nearest to it, and one text stands twice."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    records, vectors = [], []
    for clip in range(4):
        for number, text in enumerate(captions_of(clip, 3)):
            records.append({"caption": text, "clip_id": f"train/Clip {clip}.wav"})
            vectors.append(centres[clip] + 0.01 * number * rng.normal(size=8))
    # The text of clip 0's first caption, spelt another way, under another clip.
    records.append({"caption": captions_of(0)[0].upper() + "!", "clip_id": "other.wav"})
    vectors.append(centres[0])
    store = CaptionDatastore.from_embeddings(records, np.array(vectors))
    embeds = centres.astype(np.float32)
    queries = [Query(embeds[clip][None], f"clip_{clip}", tuple(captions_of(clip, 3))) for clip in range(4)]
    return store, queries


def test_own_captions_are_never_retrieved(search, tmp_path: Path):
    store, queries = search
    # The premise: without the exclusion, a clip's own captions come first.
    assert {hit["clip_id"] for hit in store.search(queries[1].embeds, k=3)[0]} == {"train/Clip 1.wav"}
    found = find_neighbours(store, queries, 6, tmp_path)
    for clip, query in enumerate(queries):
        rows = found.of(clip)
        assert len(rows) == 6
        own = {normalize_text(text) for text in query.captions}
        assert not own & {normalize_text(found.captions[row]) for row in rows}
        ids = {normalize_clip_id(store.records[row]["clip_id"]) for row in rows}
        assert normalize_clip_id(query.clip_id) not in ids


def test_fewer_captions_than_asked_for(search, tmp_path: Path):
    store, queries = search
    found = find_neighbours(store, queries, 50, tmp_path)
    # 13 captions less the three own; the doubled text counts once, and not at all for its own clip.
    assert [len(found.of(clip)) for clip in range(4)] == [9, 9, 9, 9]


def test_search_again_only_when_something_changed(search, tmp_path: Path):
    store, queries = search
    first = find_neighbours(store, queries, 4, tmp_path)
    (path,) = tmp_path.glob("neighbours-*.npy")
    stored = np.load(path)
    np.save(path, stored[:, ::-1])
    assert np.array_equal(find_neighbours(store, queries, 4, tmp_path).rows, first.rows[:, ::-1])
    key = search_key(store, queries, 4)
    assert search_key(store, queries, 5) != key
    assert search_key(store, queries[:3], 4) != key
    smaller = CaptionDatastore(store.records[:-1], store.embeddings[:-1])
    assert search_key(smaller, queries, 4) != key
    moved = CaptionDatastore(store.records, store.embeddings[::-1])
    assert search_key(moved, queries, 4) != key
