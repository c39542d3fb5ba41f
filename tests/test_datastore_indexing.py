"""Indexes: kinds by size, recall that counts ties, effort that reaches its target, and what search makes of them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from datastore_parts import WordEmbedder, numbered, save_store

from recap_hf import CaptionDatastore
from recap_hf.datastore import add_captions, build_index, describe, index_datastore
from recap_hf.datastore.indexing import Queries, answer, exact_rows, factory_string, tuning_queries, with_audio_gap
from recap_hf.datastore.summary import hubness, measure
from recap_hf.modeling import index_recap


def clustered(rows, dimension=32, clusters=60, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dimension))
    vectors = centres[rng.integers(clusters, size=rows)] + 0.7 * rng.standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings():
    return clustered(6000)


@pytest.fixture
def store(embeddings):
    return CaptionDatastore.from_embeddings([f"caption {row}" for row in range(len(embeddings))], embeddings)


@pytest.mark.parametrize(
    ("kind", "rows", "dimension", "expected"),
    [
        ("ivf_sq8", 50_000, 512, "IVF512,SQ8"),
        ("ivf_pq", 600_000, 512, "IVF2048(PQ128x4fs,RFlat),PQ128x4fs"),
        ("ivf_pq", 600_000, 128, "IVF2048(PQ128x4fs,RFlat),PQ128x4fs"),
        ("ivf_pq", 10_000_000, 512, "IVF4096(PQ128x4fs,RFlat),PQ128x4fs"),
        ("ivf_pq", 100_000_000, 512, "IVF8192(PQ128x4fs,RFlat),PQ128x4fs"),
        ("ivf_flat", 300, 16, "IVF7,Flat"),
        ("hnsw", 600_000, 512, "HNSW32,SQ8"),
        ("IVF64,SQfp16", 600_000, 512, "IVF64,SQfp16"),
    ],
)
def test_kinds_by_size(kind, rows, dimension, expected):
    assert factory_string(kind, rows, dimension) == expected


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_every_kind_reaches_its_target(store, kind):
    index = build_index(store.embeddings, kind, recall=0.9)
    store.set_index(index)
    # Other queries than those that it was tuned on; a twentieth is left to chance.
    found = measure(store, tuning_queries(store.embeddings, 200, seed=9))
    assert found["recall"]["text"] > 0.87
    assert found["recall"]["audio"] > 0.87
    assert index.description["recall"]["text"] > 0.87
    queries = store.embeddings[:5]
    for row, hits in enumerate(store.search(queries, k=4)):
        assert hits[0]["row"] == row
        # Whatever the index stores, scores are those of the stored embeddings.
        for hit in hits:
            exact = float(store.embeddings[hit["row"]].astype(np.float64) @ queries[row].astype(np.float64))
            assert hit["score"] == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("kind", ["OPQ8,IVF32,PQ8x4fs", "IVF32,PQ8x4fs,RFlat"])
def test_an_index_inside_another_one_is_tuned(embeddings, kind):
    index = build_index(embeddings, kind, recall=0.9)
    assert index.description["recall"]["text"] > 0.87
    faiss = pytest.importorskip("faiss")
    assert faiss.extract_index_ivf(index.index).nprobe == index.description["effort"] > 1


def test_a_higher_target_costs_more_effort(embeddings):
    low, high = (build_index(embeddings, "ivf_flat", recall=recall).description for recall in (0.5, 0.99))
    assert low["effort"] < high["effort"]
    assert high["recall"]["text"] > 0.97


def test_exclusions_that_empty_the_candidates_are_searched_exactly(embeddings):
    """A whole cluster is of one clip: nothing near the query may be given, and yet k captions are."""
    records = [{"caption": f"caption {row}", "clip_id": "own" if row < 5990 else row} for row in range(6000)]
    store = CaptionDatastore.from_embeddings(records, embeddings)
    store.set_index(build_index(embeddings, "ivf_flat", recall=0.8))
    (hits,) = store.search(embeddings[:1], k=4, exclude_clip_ids=["own"])
    expected = 5990 + np.argsort(-(embeddings[5990:] @ embeddings[0]))[:4]
    assert [hit["row"] for hit in hits] == expected.tolist()


def test_an_index_is_saved_and_checked(store, tmp_path, embeddings):
    store.set_index(build_index(store.embeddings, "ivf_sq8", recall=0.9))
    store.save_pretrained(tmp_path / "store")
    loaded = CaptionDatastore.from_pretrained(tmp_path / "store")
    assert loaded.index == store.index
    queries = clustered(20, seed=3)
    assert loaded.search(queries) == store.search(queries)
    loaded.save_pretrained(tmp_path / "copy")
    assert CaptionDatastore.from_pretrained(tmp_path / "copy").search(queries) == store.search(queries)
    assert pickle.loads(pickle.dumps(loaded)).search(queries) == store.search(queries)
    assert copy.deepcopy(loaded).search(queries) == store.search(queries)
    with pytest.raises(ValueError, match="made of another one"):
        CaptionDatastore.from_embeddings(["a"], embeddings[:1]).set_index(store.search_index)


def test_without_faiss_the_search_is_exact(store, tmp_path, monkeypatch, caplog):
    queries = clustered(5, seed=3)
    expected = store.search(queries)
    store.set_index(build_index(store.embeddings, "ivf_sq8", recall=0.6))
    store.save_pretrained(tmp_path / "store")
    monkeypatch.setattr(index_recap, "faiss", None)
    loaded = CaptionDatastore.from_pretrained(tmp_path / "store")
    assert "needs FAISS" in caplog.text
    assert loaded.index is None
    assert loaded.search(queries) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("module", [None, index_recap.faiss])
def test_exact_search(dtype, module, monkeypatch):
    monkeypatch.setattr(index_recap, "faiss", module)
    rng = np.random.default_rng(0)
    stored, queries = rng.standard_normal((70_000, 4)).astype(dtype), rng.standard_normal((3, 4)).astype(np.float32)
    rows, scores = index_recap.ExactIndex(stored).search(queries, 5)
    cosines = queries @ stored.astype(np.float32).T
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.sort(np.argsort(-cosines, axis=1)[:, :5], axis=1))
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, rows, axis=1), atol=1e-5)


def test_recall_counts_ties():
    """Four rows of the same score as the second best: any of them is as right as another."""
    angles = np.radians([0, 10, 10, 10, 10, 50])
    stored = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    queries = Queries("text", stored[:1], np.array([-1]))
    # A query that was made of row 0 must do without it.
    own = Queries("text", stored[:1], np.array([0]))
    answer([queries, own], stored, 2)
    assert queries.recall(np.array([[0, 4]]), k=2) == 1.0
    assert queries.recall(np.array([[0, 5]]), k=2) == 0.5
    assert queries.recall(np.array([[5, -1]]), k=2) == 0.0
    assert own.recall(np.array([[0, 3, 1]]), k=2) == 1.0
    assert own.recall(np.array([[0, 3, 5]]), k=2) == 0.5


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_exact_search_of_few_rows_finds_all_that_there_is(rows):
    stored = clustered(rows)
    queries = tuning_queries(stored, 10)
    answer(queries, stored, 4)
    found = index_recap.ExactIndex(stored).search(queries[0].vectors, rows)[0]
    assert [each.recall(found, 4) for each in queries] == [1.0, 1.0]
    if rows == 4:
        # Each has three others, of which the rows 0 and 1 are two or one.
        assert queries[0].recall(found[:, :0], 4) == 0.0
        assert queries[0].recall([np.array([0, 1])] * 4, 4) == (1 + 1 + 2 + 2) / 12


def test_a_kind_that_needs_more_rows_is_refused_in_a_sentence(store, embeddings):
    with pytest.raises(ValueError, match=r"FAISS cannot train .* on 10 captions: take `exact`"):
        build_index(embeddings[:10], "ivf_pq")
    assert build_index(embeddings[:0], "hnsw") is None


def test_exact_rows_are_those_of_a_sorted_list(embeddings):
    rows, scores = exact_rows(embeddings[:7], embeddings, 5)
    np.testing.assert_array_equal(rows, np.argsort(-(embeddings[:7] @ embeddings.T), axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-(embeddings[:7] @ embeddings.T), axis=1)[:, :5], atol=1e-6)


def test_audio_queries_lie_outside_the_cloud(embeddings):
    """One shift for all of them: their mean is moved, as that of audio embeddings is, and they stay unit vectors."""
    moved = with_audio_gap(embeddings[:500], np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-5)
    assert np.linalg.norm(moved.mean(axis=0)) > 2 * np.linalg.norm(embeddings.mean(axis=0))
    nearest = (moved @ embeddings.T).max(axis=1)
    assert nearest.mean() < 0.9


def test_hubness_of_a_hub(embeddings):
    rng = np.random.default_rng(0)
    even = rng.standard_normal((400, 3)).astype(np.float32)
    even /= np.linalg.norm(even, axis=1, keepdims=True)
    (text, _) = tuning_queries(even, 400)
    plain = hubness(even, text)
    assert plain["largest_share"] < 0.1
    # One row beside every query: it is among the ten nearest of all of them.
    hub = np.concatenate([even[:, :1] * 0 + even, np.array([[1, 0, 0]], np.float32)])
    queries = Queries("text", np.tile([[1, 0.01, 0]], (50, 1)), np.full(50, -1))
    assert hubness(hub, queries)["largest_share"] == 1.0


def test_info_of_an_indexed_datastore(store):
    store.set_index(build_index(store.embeddings, "ivf_pq", recall=0.9))
    info = describe(store, queries=32)
    assert info["index"]["kind"].endswith(",PQ32x4fs")
    assert set(info["recall"]) == {"k", "text", "audio"}
    assert 0 < info["latency_ms"]["median"] <= info["latency_ms"]["p95"]
    assert info["memory"]["held"] == store.embeddings.nbytes
    with pytest.raises(ValueError, match="no kind of index"):
        build_index(store.embeddings, "ivf_magic")
    with pytest.raises(ValueError, match="`recall` must be"):
        build_index(store.embeddings, "ivf_flat", recall=95)


def test_codes_too_coarse_for_the_embeddings_give_way_to_finer_ones(embeddings, monkeypatch):
    """With four candidates, of which a query's own row is one, no code reaches the target: `auto` tries finer ones."""
    monkeypatch.setattr("recap_hf.datastore.indexing.EXACT_UP_TO", 100)
    monkeypatch.setattr("recap_hf.datastore.indexing.PQ_FROM", 200)
    monkeypatch.setattr("recap_hf.datastore.indexing._CANDIDATES", (4,))
    with pytest.warns(UserWarning, match="An index of the kind .*SQ8 reaches a recall of 0.*, not 0.9: try another"):
        index = build_index(embeddings[:2000], "auto", recall=0.9)
    assert index.description["kind"].endswith("SQ8")
    assert index.description["wanted_kind"] == "auto"


class SortedIndex:
    """A kind of index that another package might bring: all scores of a matrix product, sorted."""

    backend, suffix, kinds, exact = "sorted", "npy", ("sorted",), False

    def __init__(self, embeddings, description):
        self.embeddings, self.description = np.asarray(embeddings), dict(description)

    num_rows = max_k = property(lambda self: len(self.embeddings))
    dimension = property(lambda self: self.embeddings.shape[1])
    num_candidates = 8

    @classmethod
    def build(cls, embeddings, kind, recall):
        return cls(embeddings, {"kind": kind})

    @classmethod
    def read(cls, path, description):
        return cls(np.load(path), description)

    def write(self, path):
        with open(path, "wb") as file:
            np.save(file, self.embeddings)

    def refill(self, embeddings, appended):
        self.embeddings = np.asarray(embeddings)

    def search(self, queries, k):
        scores = queries @ self.embeddings.T
        rows = np.argsort(-scores, axis=1)[:, :k]
        return rows, np.take_along_axis(scores, rows, axis=1)


def test_a_further_kind_is_a_class_and_an_entry(monkeypatch, tmp_path, embeddings, caplog):
    """By name, so that it is imported when it is needed: built, saved, opened, edited and searched."""
    save_store(tmp_path / "store", numbered(0, 50))
    queries = WordEmbedder()._vectors(["sound 7", "sound 51"])
    with monkeypatch.context() as patch:
        patch.setitem(index_recap.INDEX_BACKENDS, "sorted", f"{__name__}:SortedIndex")
        assert index_datastore(tmp_path / "store", "sorted")["kind"] == "sorted"
        add_captions(tmp_path / "store", numbered(50, 60), WordEmbedder())
        store = CaptionDatastore.from_pretrained(tmp_path / "store")
        assert type(store.search_index) is SortedIndex
        found = store.search(queries, 3)
        assert [hits[0]["caption"] for hits in found] == ["sound 7", "sound 51"]
    # Elsewhere the datastore is searched exactly.
    store = CaptionDatastore.from_pretrained(tmp_path / "store")
    assert "'sorted'" in caplog.text
    assert (store.index, store.search(queries, 3)) == (None, found)
