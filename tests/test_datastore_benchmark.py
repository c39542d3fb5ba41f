"""The benchmark's material: captions of clauses, embeddings by TF-IDF and SVD, and a whole run in small."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from recap_hf.datastore.benchmark import made_captions, main, tfidf_svd

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
