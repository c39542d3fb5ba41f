"""Diverse captions, as many as are near, embeddings in int8, and the search on a device."""

from __future__ import annotations

import numpy as np
import pytest

from recap_hf import CaptionDatastore
from recap_hf.modeling.datastore_choice_recap import choose_diverse, cut_at_drop, take_turns
from recap_hf.modeling.datastore_files_recap import decode_int8, encode_int8


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
    # By hand: the second gains (1 - d) * cosine - d * similarity to the first: at d = 0.5 "a dog" gives
    # 0.5 * 0.994 - 0.5 * 1.0 = -0.003, "dog and rain" 0.5 * 0.8 - 0.5 * 0.796 = 0.002.
    assert captions(store.search(QUERY, 2, diversity=0.5)) == ["dog", "dog and rain"]
    found = store.search(QUERY, 3, diversity=0.5)[0]
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)


def test_no_diversity_is_the_plain_search(store):
    assert store.search(QUERY, 3, diversity=0.0) == store.search(QUERY, 3)
    hits = [(0, 0.9), (1, 0.8), (2, 0.7)]
    assert choose_diverse(hits, np.eye(3), 2, 0.0) == hits[:2]
    assert choose_diverse(hits, np.eye(3), 5, 0.9) == hits


def test_k_follows_the_drop_of_the_scores(store):
    assert captions(store.search(QUERY, 5, score_drop=0.01)) == ["dog", "a dog", "the dog"]
    assert captions(store.search(QUERY, 5, score_drop=0.0)) == ["dog"]
    assert len(store.search(QUERY, 5, score_drop=2.0)[0]) == 5
    assert cut_at_drop([], 0.1) == []
    with pytest.raises(ValueError, match="score_drop"):
        store.search(QUERY, 5, score_drop=-1)
    with pytest.raises(ValueError, match="diversity"):
        store.search(QUERY, 5, diversity=1.5)


def test_windows_take_turns():
    texts = ["dog", "cat", "dog", "rain"]
    merged = take_turns([[(0, 0.9), (1, 0.5)], [(2, 0.95), (3, 0.6)]], 3, texts.__getitem__)
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
    from recap_hf.modeling.datastore_writing_recap import write_manifest, write_segment

    vectors = unit(np.random.default_rng(1).standard_normal((300, 64)))
    records = [{"caption": f"caption {row}", "clip_id": str(row)} for row in range(300)]
    files: dict = {}
    segment = write_segment(tmp_path, records, vectors, files, "int8")
    manifest = {"num_captions": 300, "dimension": 64, "dtype": "int8", "fingerprint": None, "segments": [segment]}
    write_manifest(tmp_path, {**manifest, "index": None, "report": None, "files": files})
    return tmp_path, vectors


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
    assert verify_datastore(folder) == []
    remove_captions(folder, Selection(rows=[0, 1]))
    left = CaptionDatastore.from_pretrained(folder)
    assert len(left) == 298
    assert left.search(queries[2:3], 1)[0][0]["caption"] == "caption 2"
    left.save_pretrained(tmp_path / "left")
    assert CaptionDatastore.from_pretrained(tmp_path / "left").manifest["dtype"] == "int8"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_device_finds_the_same(dtype):
    rng = np.random.default_rng(2)
    vectors = unit(rng.standard_normal((400, 32)))
    records = [{"caption": f"caption {row // 2}", "clip_id": f"{row // 4}"} for row in range(400)]
    store = CaptionDatastore.from_embeddings(records, vectors)
    queries = unit(rng.standard_normal((9, 32)))
    clip_ids = [str(number) for number in range(9)]
    expected = store.search(queries, 4, clip_ids)
    store.set_device("cpu", dtype)
    assert store.search(queries, 4, clip_ids) == expected
    store.set_device(None)
    assert store.search(queries, 4, clip_ids) == expected
    with pytest.raises(ValueError, match="float16"):
        store.set_device("cpu", "int4")


def test_coverage_and_precision_by_hand():
    from recap_hf.datastore.diversity import coverage_and_precision

    retrieved = [["dog", "dog rain"], ["cat"], [""]]
    truths = [{"dog", "rain"}, {"dog", "cat"}, {"dog", "cat"}]
    found = coverage_and_precision(retrieved, truths, lambda caption: set(caption.split()))
    # Coverage 1, 1/2, 0; precision 1, 1 and none named.
    assert found == {"coverage": 0.5, "precision": 1.0, "captions": 1.33}


def test_diversity_is_measured_on_mixtures(shared_dir, capsys):
    import json

    from recap_hf.datastore.diversity import main

    sounds = str(shared_dir / "data" / "sound_events")
    assert main(["--sounds", sounds, "--mixtures", "4", "--format", "json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mixtures"] == 4
    for found in result["settings"].values():
        assert 0 <= found["all"]["coverage"] <= 1
    assert result["settings"]["score drop 0.02"]["all"]["captions"] <= 4


def test_the_choice_is_saved_with_a_captioner(tiny_model, decoder_tokenizer, clap_tokenizer, tmp_path):
    """In the configuration, from there in the processor, and in what either saves; off by default."""
    from recap_hf import RecapConfig, RecapProcessor

    assert (tiny_model.config.retrieval_diversity, tiny_model.config.retrieval_score_drop) == (0.0, None)
    tiny_model.config.retrieval_diversity, tiny_model.config.retrieval_score_drop = 0.25, 0.0
    processor = RecapProcessor.from_config(tiny_model.config, decoder_tokenizer, clap_tokenizer)
    tiny_model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for each in (RecapConfig.from_pretrained(tmp_path), RecapProcessor.from_pretrained(tmp_path)):
        assert (each.retrieval_diversity, each.retrieval_score_drop) == (0.25, 0.0)
    for wrong in ({"retrieval_diversity": 1.5}, {"retrieval_diversity": "much"}, {"retrieval_score_drop": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RecapConfig(**wrong)


def test_a_processor_retrieves_as_it_is_set(tiny_processor, store):
    tiny_processor.datastore = store
    assert captions(tiny_processor.retrieve(QUERY, 2)) == ["dog", "a dog"]
    tiny_processor.retrieval_diversity = 0.5
    assert captions(tiny_processor.retrieve(QUERY, 2)) == ["dog", "dog and rain"]
    tiny_processor.retrieval_diversity, tiny_processor.retrieval_score_drop = 0.0, 0.0
    assert captions(tiny_processor.retrieve(QUERY, 4)) == ["dog"]


def test_options_of_the_pipeline_and_the_commands(model_folder, clips, tmp_path, capsys):
    """A drop of 0 leaves the nearest caption alone in the prompt, wherever it is asked for."""
    import json

    import soundfile

    import recap_hf  # noqa: F401 (registers the pipeline)
    from recap_cli import main

    recording = tmp_path / "clip.wav"
    soundfile.write(recording, clips[0], 48_000)
    asked = ["--model", model_folder, "--format", "json"]
    found = []
    for options in ([], ["--retrieval-score-drop", "0"], ["--retrieval_diversity", "1"]):
        assert main(["caption", str(recording), *asked, *options]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["retrieved"])
    assert [len(hits) for hits in found] == [2, 1, 2]
    assert found[1] == found[0][:1]
    datastore = f"{model_folder}/datastore"
    assert main(["datastore", "search", datastore, "--text", "rain falls", *asked, "--score-drop", "0"]) == 0
    assert [hit["caption"] for hit in json.loads(capsys.readouterr().out)] == ["rain falls"]
    for options, message in (
        (["--retrieval-diversity", "2"], "from 0 to 1"),
        (["--retrieval-score-drop", "-1"], "at least 0"),
        (["--retrieval-score-drop", "x"], "invalid number value"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["caption", str(recording), *options])
        assert message in capsys.readouterr().err


def test_the_pipeline_saves_what_it_was_given(model_folder, tmp_path):
    from transformers import pipeline

    from recap_hf import RecapProcessor

    given = {"retrieval_diversity": 0.5, "retrieval_score_drop": 0.1}
    pipeline("audio-captioning", model=model_folder, **given).save_pretrained(tmp_path)
    saved = RecapProcessor.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in given} == given
    with pytest.raises(ValueError, match="retrieval_diversity"):
        pipeline("audio-captioning", model=model_folder, retrieval_diversity=-1)


def test_the_captions_that_follow_are_measured_too(shared_dir, monkeypatch, capsys):
    from recap_hf.datastore import diversity

    settings = {name: diversity.SETTINGS[name] for name in ("nearest 4", "diversity 0.3")}
    monkeypatch.setattr(diversity, "SETTINGS", settings)
    sounds = str(shared_dir / "data" / "sound_events")
    assert diversity.main(["--sounds", sounds, "--mixtures", "3", "--captions", "--device", "cpu"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("| of the generated caption |")
    assert [row.split(" | ")[0] for row in rows] == ["| nearest 4", "| diversity 0.3"]
    for row in rows:
        coverage, precision = map(float, row.split(" | ")[-1].strip(" |").split(" / "))
        assert 0 <= coverage <= 1
        assert 0 <= precision <= 1
