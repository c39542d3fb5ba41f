"""The benchmark's material: captions of clauses, embeddings by TF-IDF and SVD, and a whole run in small."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from benchmarks import datastore_growth
from benchmarks.datastore_growth import laws
from benchmarks.datastore_search import main
from benchmarks.synthetic_captions import MixedRows, made_captions, tfidf_svd

REAL = [
    "A dog barks and a man speaks",
    "Rain falls while thunder rumbles",
    "A car passes by, then birds chirp",
    "Water flows as people talk",
    "A violin plays a melody followed by applause from a crowd",
    "A dog barks loudly while rain falls",
    "People talk and birds chirp in the distance",
    "Thunder rumbles as a car passes by",
]


def test_made_captions_are_new_and_of_real_clauses():
    made = made_captions(REAL, 60)
    assert len(set(made)) == 60
    assert not set(made) & set(REAL)
    assert all(
        any(
            clause in text
            for clause in (
                "dog barks",
                "Rain",
                "rain",
                "car",
                "Water",
                "violin",
                "hunder",
                "eople",
                "birds",
                "applause",
                "man speaks",
            )
        )
        for text in made
    )
    assert made == made_captions(REAL, 60)
    with pytest.raises(ValueError, match="are needed"):
        made_captions(REAL[:1], 10**4)


def test_projected_cosines_are_those_of_the_whole_space():
    """With as many dimensions as the texts have, the projection keeps every cosine of TF-IDF."""
    pytest.importorskip("scipy")
    # Terms that occur once are left out, so each text is given twice.
    texts = REAL * 2
    found = tfidf_svd(texts, len(texts), dimension=len(REAL))
    words = [[*t.lower().replace(",", "").split()] for t in REAL]
    terms = [each + [f"{a} {b}" for a, b in itertools.pairwise(each)] for each in words]
    vocabulary = sorted({term for each in terms for term in each})
    counts = np.array([[each.count(term) for term in vocabulary] for each in terms], dtype=float)
    weighted = counts * (np.log(len(REAL) / (counts > 0).sum(axis=0)) + 1)
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    np.testing.assert_allclose(found[: len(REAL)] @ found[: len(REAL)].T, weighted @ weighted.T, atol=1e-4)


def test_a_small_run(tmp_path, capsys):
    pytest.importorskip("scipy")
    (tmp_path / "real.txt").write_text("\n".join(REAL))
    arguments = [str(tmp_path / "real.txt"), "--work", str(tmp_path / "work"), "--rows", "120", "--dimension", "8"]
    assert main([*arguments, "--queries", "2", "--index", "ivf_flat", "--recall", "0.9", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["dimension"]) == (120, 8)
    assert result["index"]["kind"] == "IVF3,Flat"
    assert set(result["queries"]) == {"text", "audio gap"}
    for found in result["queries"].values():
        assert 0.5 <= found["recall@4"] <= 1
        assert found["search_ms"]["median"] > 0
        assert found["exact_faiss_ms"]["median"] > 0


def test_growth_is_measured_kept_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    # In this process: starting others takes ten seconds each.
    monkeypatch.setattr(datastore_growth, "in_own_process", lambda function, *arguments: function(*arguments))
    (tmp_path / "real.txt").write_text("\n".join(REAL * 3))
    arguments = [str(tmp_path / "real.txt"), "--growth", "--work", str(tmp_path / "work"), "--dimension", "8"]
    arguments += ["--queries", "2", "--threads", "1", "--plot", str(tmp_path / "growth.png"), "--sizes", "300"]
    assert main(arguments) == 0
    (size,) = json.loads((tmp_path / "work" / "growth.json").read_text())["sizes"]
    assert (size["rows"], size["kind"], size["recall_text"]) == (300, "exact", 1)
    assert "| 300 |" in capsys.readouterr().out
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "work" / "store-300").exists()


def test_the_law_of_growth():
    """Twice the rows, twice the memory, and the square root of two times the latency."""
    sizes = [
        {"rows": n, "kind": "IVF", "latency_ms": n**0.5, "anonymous_mb": 3 * n, "build_s": n, "index_mb": n}
        for n in (10, 100, 1000)
    ]
    found = laws([{**sizes[0], "rows": 1, "kind": "exact", "latency_ms": 99}, *sizes])
    assert found["latency_ms"] == {"exponent": 0.5, "factor": 1.0}
    assert found["anonymous_mb"] == {"exponent": 1.0, "factor": 3.0}


def test_mixed_rows_repeat_and_lie_near_what_they_are_made_of():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 64)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    rows = MixedRows(base, seed=1, noise=0.1)
    first = np.concatenate(list(rows.blocks(20_000)))
    assert first.shape == (20_000, 64)
    np.testing.assert_array_equal(first[:100], rows.block(0)[:100])
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    # Half or more of every row is one of the base.
    assert (first @ base.T).max(axis=1).min() > 0.5
