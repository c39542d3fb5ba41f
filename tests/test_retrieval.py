"""The datastore: neighbours known by hand, own captions left out, files that are data only."""

from __future__ import annotations

import copy
import json
import pickle
import time

import numpy as np
import pytest
import torch

from recap_hf import CaptionDatastore
from recap_hf.modeling import index_recap
from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text

# Angles in degrees on a circle: the cosine with a query at angle q is cos(a - q).
ANGLES = {"north": 90, "east": 0, "north east": 45, "west": 180, "south": 270}


def on_circle(*angles):
    radians = np.radians(np.array(angles, dtype=np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


@pytest.fixture(params=["faiss", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(index_recap, "faiss", None)
    elif index_recap.faiss is None:
        pytest.skip("faiss is not installed")


@pytest.fixture
def store(backend):
    return CaptionDatastore.from_embeddings(list(ANGLES), on_circle(*ANGLES.values()))


def captions(results):
    return [[hit["caption"] for hit in hits] for hits in results]


def test_neighbours_by_hand(store):
    results = store.search(on_circle(10, 100), k=3)
    assert captions(results) == [["east", "north east", "north"], ["north", "north east", "west"]]
    expected = np.cos(np.radians([10, 35, 80]))
    np.testing.assert_allclose([hit["score"] for hit in results[0]], expected, atol=1e-6)
    assert [hit["row"] for hit in results[0]] == [1, 2, 0]


def test_tensors_and_fewer_captions_than_k(store):
    results = store.search(torch.from_numpy(on_circle(10)), k=50)
    assert captions(results)[0] == ["east", "north east", "north", "south", "west"]
    assert captions(store.search(on_circle(10), k=0)) == [[]]


def test_ties_go_to_the_lower_row(backend):
    store = CaptionDatastore.from_embeddings([f"caption {i}" for i in range(300)], on_circle(*[20] * 300))
    assert [hit["row"] for hit in store.search(on_circle(0), k=5)[0]] == [0, 1, 2, 3, 4]


def test_no_text_twice_however_often_it_is_stored(backend):
    texts = ["A dog barks."] * 200 + ["a dog  barks", "rain"]
    store = CaptionDatastore.from_embeddings(texts, on_circle(*[5] * 201, 60))
    results = store.search(on_circle(0), k=3)[0]
    assert [(hit["caption"], hit["row"]) for hit in results] == [("A dog barks.", 0), ("rain", 201)]


def test_own_captions_are_left_out_by_clip_and_by_text(backend):
    records = [
        {"caption": "a dog barks", "clip_id": "train/Santa Motor.wav"},
        {"caption": "the engine of a car", "clip_id": "Santa_Motor.wav"},
        {"caption": "A dog barks!", "clip_id": "other.wav"},
        {"caption": "rain", "clip_id": "other.wav"},
        {"caption": "wind", "clip_id": None},
    ]
    store = CaptionDatastore.from_embeddings(records, on_circle(0, 1, 2, 30, 40))
    results = store.search(on_circle(0, 0, 0), k=4, exclude_clip_ids=["santa motor", None, "unknown"])
    assert captions(results)[0] == ["rain", "wind"]
    assert captions(results)[1] == captions(results)[2] == ["a dog barks", "the engine of a car", "rain", "wind"]
    results = store.search(on_circle(0), k=4, exclude_texts=[["Rain.", "the engine of a car"]])
    assert captions(results)[0] == ["a dog barks", "wind"]


def test_windows_are_merged_round_robin(backend):
    """Both windows of a clip retrieve, however similar one of them is to everything."""
    store = CaptionDatastore.from_embeddings(["a", "b", "c", "d", "x", "y"], on_circle(0, 1, 2, 3, 130, 140))
    windows = np.stack([on_circle(0)[0], on_circle(120)[0], np.zeros(2, np.float32)])[None]
    results = store.search(windows, k=4)[0]
    assert [hit["caption"] for hit in results] == ["a", "b", "x", "y"]
    np.testing.assert_allclose([hit["score"] for hit in results], np.cos(np.radians([0, 1, 10, 20])), atol=1e-6)
    # More windows than k: the most similar first choices.
    many = np.stack([on_circle(angle)[0] for angle in (0, 131, 145, 200)])[None]
    assert [hit["caption"] for hit in store.search(many, k=2)[0]] == ["a", "x"]


def test_scores_do_not_depend_on_the_batch(backend):
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((500, 16)).astype(np.float32)
    store = CaptionDatastore.from_embeddings([f"caption {i}" for i in range(500)], embeddings)
    queries = generator.standard_normal((9, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    together = store.search(queries, k=5)
    for row in range(9):
        assert store.search(queries[row : row + 1], k=5)[0] == together[row]
    exact = queries.astype(np.float64) @ store.embeddings.astype(np.float64).T
    for row in range(9):
        assert [hit["row"] for hit in together[row]] == np.argsort(-exact[row])[:5].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": np.zeros((1, 3), np.float32)}, r"got \(1, 1, 3\)"),
        ({"queries": on_circle(0), "k": -1}, "`k` must be"),
        ({"queries": on_circle(0), "exclude_clip_ids": ["a", "b"]}, "got 2 for 1 clips"),
    ],
)
def test_bad_searches_are_refused(store, arguments, message):
    with pytest.raises(ValueError, match=message):
        store.search(**arguments)


def test_bad_captions_are_refused(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="Row 1 has no caption"):
        CaptionDatastore.from_captions(["a dog", "  "], tiny_model, tiny_processor)
    with pytest.raises(ValueError, match="got 2 captions and embeddings of shape"):
        CaptionDatastore.from_embeddings(["a", "b"], on_circle(0))
    with pytest.raises(ValueError, match="not zero"):
        CaptionDatastore.from_embeddings(["a"], np.zeros((1, 2)))


def test_normalisation():
    assert normalize_text("  A dog—barks,  TWICE! ") == "a dog barks twice"
    assert normalize_text("Ｃafé") == normalize_text("cafÉ")
    assert normalize_clip_id("folder/Santa Motor.wav") == normalize_clip_id("Santa_Motor") == "santa motor"
    assert normalize_clip_id("v1.5 take") == normalize_clip_id("v1.5 take.FLAC")
    assert normalize_clip_id(17) == "17"
    # The same clip in EnCLAP's list of features, in AudioSet's spelling, and in a CSV of AudioCaps.
    assert normalize_clip_id("train/Santa Motor.npy") == "santa motor"
    assert normalize_clip_id("Y7fmOlUlwoNg.wav") == normalize_clip_id("7fmOlUlwoNg") != normalize_clip_id("Y7fmOlUlw")


def test_captions_stay_verbatim_through_files(tmp_path, store):
    texts = ["  Two  spaces. ", "ümläut “quoted” \u2028 line", "a\nnewline", "{braces} \\ back"]
    records = [{"caption": text, "clip_id": f"c{i}", "source": "own", "year": 2026} for i, text in enumerate(texts)]
    saved = CaptionDatastore.from_embeddings(records, on_circle(1, 2, 3, 4), fingerprint=on_circle(1, 2, 3, 4))
    saved.save_pretrained(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "moved")
    loaded = CaptionDatastore.from_pretrained(tmp_path / "moved")
    assert loaded.records == records
    assert loaded.captions == texts
    np.testing.assert_array_equal(loaded.embeddings, saved.embeddings)
    assert loaded.search(on_circle(3), k=2) == saved.search(on_circle(3), k=2)
    assert isinstance(loaded.embeddings, np.memmap)
    assert str(tmp_path) not in (tmp_path / "moved" / "datastore.json").read_text()


def the_file(folder, kind):
    (path,) = folder.glob(f"{kind}*")
    return path


def break_json(folder):
    (folder / "datastore.json").write_text("{")


def newer_format(folder):
    edit_manifest(folder, format_version=99)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "datastore.json").read_text())
    (folder / "datastore.json").write_text(json.dumps({**manifest, **changes}))


def tamper_captions(folder):
    path = the_file(folder, "captions")
    path.write_text(path.read_text().replace("north", "morth"))


def truncate_embeddings(folder):
    path = the_file(folder, "embeddings")
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "not the description of a caption datastore"),
        (newer_format, "format version 99"),
        (tamper_captions, "the checksum differs"),
        (truncate_embeddings, "truncated or not of this datastore"),
        (lambda folder: edit_manifest(folder, num_captions=6), "checksum differs"),
        (lambda folder: edit_manifest(folder, checksum=None, num_captions=6), "announces 6 captions"),
        (lambda folder: edit_manifest(folder, checksum=None, dimension=3), "announces 5 captions of dimension 3"),
        (lambda folder: the_file(folder, "embeddings").unlink(), "missing, the datastore is incomplete"),
        (lambda folder: (folder / "datastore.json").unlink(), "it has no datastore.json"),
    ],
)
def test_damaged_datastores_are_refused(tmp_path, damage, message):
    CaptionDatastore.from_embeddings(list(ANGLES), on_circle(*ANGLES.values())).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        CaptionDatastore.from_pretrained(tmp_path)


def test_pickles_are_never_read(tmp_path):
    import hashlib

    CaptionDatastore.from_embeddings(list(ANGLES), on_circle(*ANGLES.values())).save_pretrained(tmp_path)
    path = the_file(tmp_path, "embeddings")
    np.save(path, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((tmp_path / "datastore.json").read_text())
    manifest["files"][path.name] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    edit_manifest(tmp_path, files=manifest["files"], checksum=None)
    with pytest.raises(ValueError, match="not a NumPy array"):
        CaptionDatastore.from_pretrained(tmp_path)


def test_copies_find_the_same(tmp_path, store):
    """Pickled (a worker process) and deep-copied, from memory and from files, also after those were replaced."""
    store.save_pretrained(tmp_path)
    queries = on_circle(10, 100)
    expected = store.search(queries, k=3)
    for each in (store, CaptionDatastore.from_pretrained(tmp_path)):
        assert pickle.loads(pickle.dumps(each)).search(queries, k=3) == expected
        assert copy.deepcopy(each).search(queries, k=3) == expected
    loaded = CaptionDatastore.from_pretrained(tmp_path)
    store.records[0]["caption"] = "changed"
    CaptionDatastore.from_embeddings(["other"], on_circle(0)).save_pretrained(tmp_path)
    assert copy.deepcopy(loaded).search(queries, k=3) == expected
    large = CaptionDatastore.from_embeddings([f"caption {n}" for n in range(999)], on_circle(*range(999)))
    large.save_pretrained(tmp_path)
    # Files are opened again, and not copied into the pickle.
    assert len(pickle.dumps(CaptionDatastore.from_pretrained(tmp_path))) < 3000


def test_a_part_of_a_memory_map_is_pickled_as_that_part(tmp_path):
    CaptionDatastore.from_embeddings([f"caption {n}" for n in range(300)], on_circle(*range(300))).save_pretrained(
        tmp_path
    )
    whole = CaptionDatastore.from_pretrained(tmp_path)
    for part in (slice(100, 200), slice(None, None, -1)):
        store = CaptionDatastore(whole.captions[part], whole.embeddings[part])
        twins = [pickle.loads(pickle.dumps(store)), copy.copy(store), copy.deepcopy(store)]
        for each in (store, *twins):
            assert each.search(on_circle(150), k=1)[0][0]["caption"] == "caption 150"


def test_own_columns_do_not_replace_the_result(backend):
    records = [{"caption": "rain", "score": 99, "row": -5, "year": 1999}]
    (hit,) = CaptionDatastore.from_embeddings(records, on_circle(60)).search(on_circle(0))[0]
    assert hit == {"caption": "rain", "score": pytest.approx(0.5, abs=1e-6), "row": 0, "year": 1999}


def test_what_json_does_not_know_is_missing(tmp_path):
    records = [{"caption": "rain", "year": float("nan"), "levels": [1.0, float("inf")], "more": {"a": float("nan")}}]
    CaptionDatastore.from_embeddings(records, on_circle(0)).save_pretrained(tmp_path)

    def refuse(name):
        raise AssertionError(name)

    line = json.loads(the_file(tmp_path, "captions").read_text(), parse_constant=refuse)
    assert line == {"caption": "rain", "year": None, "levels": [1.0, None], "more": {"a": None}}


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_a_thousand_captions_are_found_at_once(backend, diversity):
    generator = np.random.default_rng(0)
    store = CaptionDatastore.from_embeddings(
        [f"caption {n}" for n in range(20_000)], generator.normal(size=(20_000, 64))
    )
    started = time.process_time()
    (hits,) = store.search(generator.normal(size=(1, 64)).astype(np.float32), k=1000, diversity=diversity)
    assert time.process_time() - started < 2
    assert len({hit["row"] for hit in hits}) == 1000


def test_the_encoder_is_checked(tiny_model, tiny_processor):
    store = tiny_processor.datastore
    store.check_encoder(tiny_model.embed_fingerprint(tiny_processor))
    # Other dtypes and a trained decoder are the same encoder.
    with torch.no_grad():
        tiny_model.decoder.lm_head.weight.add_(1.0)
    store.check_encoder(tiny_model.to(torch.bfloat16).embed_fingerprint(tiny_processor))
    tiny_model.float()
    with torch.no_grad():
        tiny_model.clap.text_projection.linear1.weight.normal_()
    with pytest.raises(ValueError, match="was made by another CLAP: embeddings of the same texts have a cosine"):
        store.check_encoder(tiny_model.embed_fingerprint(tiny_processor))
    with pytest.raises(ValueError, match="16 dimensions and the model's have 2"):
        store.check_encoder(on_circle(1, 2, 3, 4))


def test_embeddings_do_not_depend_on_the_batch(tiny_model, tiny_processor):
    texts = ["rain", "a dog barks twice and then a rooster crows far away", "a baby cries", ""]
    together = tiny_model.embed_captions(texts, tiny_processor, batch_size=3)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(
            tiny_model.embed_captions([text], tiny_processor)[0], together[row], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
