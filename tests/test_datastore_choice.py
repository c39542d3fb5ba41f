"""Diverse captions, none below a threshold, and embeddings in int8."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import soundfile

from recap_cli import main
from recap_hf import CaptionDatastore
from recap_hf.datastore.files import encode_int8
from recap_hf.modeling.datastore_files_recap import Int8Embeddings, decode_int8
from recap_hf.modeling.index_recap import choose_diverse, merge_round_robin


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def store():
    """Three captions that say the same, and one of something else that is a little farther from the query."""
    embeddings = unit([[1, 0.1, 0], [1, 0.11, 0], [1, 0.12, 0], [0.8, 0, 0.6], [0, 1, 0]])
    return CaptionDatastore.from_embeddings(["dog", "a dog", "the dog", "dog and rain", "rain"], embeddings)


QUERY = np.array([[1.0, 0.0, 0.0]], dtype=np.float32)


def captions(hits):
    return [hit["caption"] for hit in hits[0]]


def test_diversity_brings_what_the_nearest_do_not_say(store):
    assert captions(store.search(QUERY, 2)) == ["dog", "a dog"]
    # By hand: without its part along "dog" the query is (1, 0, 0) - 0.995 (0.995, 0.0995, 0) = (0.0099, -0.099, 0), of
    # which "a dog" explains 0.0098 - 0.0108 = -0.001, and "dog and rain" 0.8 * 0.0099 = 0.008.
    assert captions(store.search(QUERY, 2, diversity=1.0)) == ["dog", "dog and rain"]
    # Of the half that stays, (0.505, -0.0495, 0), "a dog" explains 0.497, "dog and rain" 0.404.
    assert captions(store.search(QUERY, 2, diversity=0.5)) == ["dog", "a dog"]
    found = store.search(QUERY, 3, diversity=1.0)[0]
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)


def test_no_diversity_is_the_plain_search(store):
    assert store.search(QUERY, 3, diversity=0.0) == store.search(QUERY, 3)
    hits = [(0, 0.9), (1, 0.8), (2, 0.7)]
    query = np.ones(3, dtype=np.float32)
    assert choose_diverse(query, hits, np.eye(3), 2, 0.0) == hits[:2]
    assert choose_diverse(query, hits, np.eye(3), 5, 0.9) == hits


def test_a_mixture_finds_captions_of_both_sounds():
    """Two orthogonal sounds, the first louder: its captions are all nearer than those of the second."""
    embeddings = unit([[1, 0, 0], [1, 0, 0.1], [1, 0, -0.1], [1, 0, 0.2], [0, 1, 0]])
    store = CaptionDatastore.from_embeddings(["dog", "a dog", "the dog", "dogs", "rain"], embeddings)
    mixture = unit([[1, 0.8, 0]])
    assert captions(store.search(mixture, 3)) == ["dog", "a dog", "the dog"]
    assert set(captions(store.search(mixture, 2, diversity=1.0))) == {"dog", "rain"}
    # A faint second sound is not searched for: its caption has 0.6 of the first one's cosine.
    assert set(captions(store.search(unit([[1, 0.6, 0]]), 2, diversity=1.0))) == {"dog", "a dog"}


def test_captions_below_the_threshold_are_left_out(store):
    # Cosines: 0.9950, 0.9940, 0.9929, 0.8, 0.
    assert captions(store.search(QUERY, 5, score_threshold=0.9935)) == ["dog", "a dog"]
    assert captions(store.search(QUERY, 5, score_threshold=0.79)) == ["dog", "a dog", "the dog", "dog and rain"]
    assert captions(store.search(QUERY, 5, score_threshold=0.999)) == []
    assert len(store.search(QUERY, 5, score_threshold=-1)[0]) == 5
    # Each window for itself.
    windows = np.array([[[1.0, 0, 0], [0, 1.0, 0]]], dtype=np.float32)
    assert captions(store.search(windows, 3)) == ["rain", "dog", "a dog"]
    assert captions(store.search(windows, 4, score_threshold=0.9935)) == ["rain", "dog", "a dog"]
    for name, value in (
        ("score_threshold", 1.5),
        ("score_threshold", "high"),
        ("diversity", 1.5),
        ("diversity", None),
    ):
        with pytest.raises(ValueError, match=name):
            store.search(QUERY, 5, **{name: value})


def test_round_robin():
    texts = ["dog", "cat", "dog", "rain"]
    merged = merge_round_robin([[(0, 0.9), (1, 0.5)], [(2, 0.95), (3, 0.6)]], 3, texts.__getitem__)
    assert merged == [(2, 0.95), (3, 0.6), (1, 0.5)]


def test_int8_keeps_lengths_and_cosines(tmp_path):
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((500, 64)))
    codes = encode_int8(vectors)
    decoded = decode_int8(codes)
    assert codes.dtype == np.int8
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)
    assert (decoded * vectors).sum(axis=1).min() > 0.999
    # Written again, nothing moves.
    np.testing.assert_array_equal(encode_int8(decoded), codes)


@pytest.fixture
def int8_folder(tmp_path):
    vectors = unit(np.random.default_rng(1).standard_normal((300, 64)))
    records = [{"caption": f"caption {row}", "clip_id": str(row)} for row in range(300)]
    store = CaptionDatastore(records, vectors)
    store.embeddings = Int8Embeddings(encode_int8(vectors))
    store.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8", vectors


def test_a_datastore_in_int8_is_searched_saved_and_edited(int8_folder, tmp_path):
    from recap_hf.datastore import Selection, remove_captions, verify_datastore

    folder, vectors = int8_folder
    store = CaptionDatastore.from_pretrained(folder)
    (file,) = folder.glob("embeddings*.npy")
    assert file.stat().st_size == 300 * 64 + 128
    queries = unit(vectors[:20] + 0.05)
    for row, hits in enumerate(store.search(queries, 3)):
        assert hits[0]["row"] == row
        # Scores are exact for what is stored, and near those of what was stored.
        assert hits[0]["score"] == pytest.approx(float(store.embeddings[row] @ queries[row]), abs=1e-6)
        assert hits[0]["score"] == pytest.approx(float(vectors[row] @ queries[row]), abs=0.01)
    store.save_pretrained(tmp_path / "saved")
    assert CaptionDatastore.from_pretrained(tmp_path / "saved").search(queries, 3) == store.search(queries, 3)
    assert pickle.loads(pickle.dumps(store)).search(queries, 3) == store.search(queries, 3)
    assert verify_datastore(folder) == []
    remove_captions(folder, Selection(rows=[0, 1]))
    left = CaptionDatastore.from_pretrained(folder)
    assert len(left) == 298
    assert left.search(queries[2:3], 1)[0][0]["caption"] == "caption 2"
    left.save_pretrained(tmp_path / "left")
    assert CaptionDatastore.from_pretrained(tmp_path / "left").manifest["dtype"] == "int8"


def test_a_processor_retrieves_as_it_is_set(tiny_processor, store):
    tiny_processor.datastore = store
    assert captions(tiny_processor.retrieve(QUERY, 2)) == ["dog", "a dog"]
    tiny_processor.retrieval_diversity = 1.0
    assert captions(tiny_processor.retrieve(QUERY, 2)) == ["dog", "dog and rain"]
    tiny_processor.retrieval_diversity, tiny_processor.retrieval_score_threshold = 0.0, 0.9945
    assert captions(tiny_processor.retrieve(QUERY, 4)) == ["dog"]


def test_options_of_the_commands(model_folder, clips, tmp_path, capsys):
    """A threshold between the two captions' scores leaves the nearest alone."""
    recording = tmp_path / "clip.wav"
    soundfile.write(recording, clips[0], 48_000)
    asked = ["--model", model_folder, "--format", "json"]

    def retrieved(*options):
        assert main(["caption", str(recording), *asked, *options]) == 0
        return json.loads(capsys.readouterr().out)[0]["retrieved"]

    both = retrieved()
    between = str(sum(hit["score"] for hit in both) / 2)
    assert len(both) == 2
    assert retrieved("--retrieval-score-threshold", between) == both[:1]
    assert len(retrieved("--retrieval-diversity", "1")) == 2
    search = ["datastore", "search", f"{model_folder}/datastore", "--audio", str(recording), *asked]
    assert main([*search, "--score-threshold", between]) == 0
    assert [hit["caption"] for hit in json.loads(capsys.readouterr().out)] == [both[0]["caption"]]
    assert main([*search, "--score-threshold", "2"]) == 1
    assert "`score_threshold` must be a number from -1 to 1" in capsys.readouterr().err


def test_a_recording_that_no_caption_fits_is_unrecognised(model_folder, clips, tmp_path, capsys):
    """Of two recordings the one whose nearest caption is less similar is refused, with a warning; the other is
    captioned as it is without a threshold."""
    names = []
    for number, clip in enumerate(clips[:2]):
        names.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(names[-1], clip, 48_000)

    def run(*options):
        assert main(["caption", *names, "--model", model_folder, "--format", "json", *options]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    plain, _ = run()
    best = [result["retrieved"][0]["score"] for result in plain]
    near, far = (0, 1) if best[0] > best[1] else (1, 0)
    between = str(sum(best) / 2)
    results, warnings = run("--retrieval-score-threshold", between, "--k", "1")
    assert {name: results[far][name] for name in ("caption", "score", "retrieved", "fits")} == {
        "caption": "an unrecognised sound", "score": 0.0, "retrieved": [], "fits": False
    }  # fmt: skip
    expected = run("--k", "1")[0][near]
    # The other recording beside it in the batch moves the score by a rounding on some processors.
    assert results[near] == expected | {"fits": True, "score": pytest.approx(expected["score"], rel=1e-5)}
    assert warnings.splitlines() == [f"recap caption: {names[far]}: no caption of the datastore fits"]
    # Without retrieval nothing can be missing.
    assert "fits" not in run("--retrieval-score-threshold", "1", "--k", "0")[0][0]


def test_diversity_is_measured_on_mixtures(shared_dir, capsys, monkeypatch):
    from benchmarks import retrieval_diversity

    found = retrieval_diversity.coverage_and_precision(
        [["dog", "dog rain"], ["cat"], [""]],
        [{"dog", "rain"}, {"dog", "cat"}, {"dog", "cat"}],
        lambda caption: set(caption.split()),
    )
    # Coverage 1, 1/2, 0; precision 1, 1 and none named.
    assert found == {"coverage": 0.5, "precision": 1.0, "captions": 1.33}
    monkeypatch.setattr(retrieval_diversity, "SETTINGS", {"nearest 4": {}, "diversity 0.3": {"diversity": 0.3}})
    sounds = str(shared_dir / "data" / "sound_events")
    arguments = ["--sounds", sounds, "--mixtures", "3", "--captions", "--device", "cpu"]
    assert retrieval_diversity.main(arguments) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| nearest 4", "| diversity 0.3"]
