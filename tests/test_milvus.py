"""Captions in Milvus Lite: the same answers as from files, and the same through the command line."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from recap_cli import main
from recap_hf import CaptionDatastore, open_datastore
from recap_hf.datastore import build_index, describe

pytest.importorskip("pymilvus", reason="needs recap-hf[milvus]")
pytest.importorskip("milvus_lite", reason="needs recap-hf[milvus]")

from recap_hf.datastore.milvus import MilvusCaptionDatastore, connect, parse_milvus_name


def unit_vectors(rows, dimension=24, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def store():
    """Every caption twice, the second time without punctuation, of clips of three captions."""
    embeddings = np.repeat(unit_vectors(150), 2, axis=0)
    records = [
        {"caption": f"sound number {row // 2}{'.' if row % 2 else ''}", "clip_id": f"clip {row // 3}.wav", "n": row}
        for row in range(300)
    ]
    return CaptionDatastore.from_embeddings(records, embeddings, unit_vectors(4, seed=5))


@pytest.fixture(scope="module")
def name(store, tmp_path_factory):
    name = f"milvus:{tmp_path_factory.mktemp('milvus') / 'captions.db'}#captions"
    MilvusCaptionDatastore.from_datastore(store, name)
    return name


@pytest.fixture
def copied(name):
    return CaptionDatastore.from_pretrained(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("milvus:a.db#b", ("a.db", "b")),
        ("milvus:a.db", ("a.db", "captions")),
        ("milvus:http://host:19530#b", ("http://host:19530", "b")),
        ("milvus://host:19530#b", ("http://host:19530", "b")),
        ("milvus:///data/a.db", ("/data/a.db", "captions")),
    ],
)
def test_names(name, expected):
    assert parse_milvus_name(name) == expected


def test_the_same_queries_find_the_same_in_files_faiss_and_milvus(store, copied):
    """Exact search, an index of FAISS and Milvus Lite: captions, scores, rows, order and metadata are equal."""
    indexed = CaptionDatastore(store.records, store.embeddings, store.fingerprint)
    indexed.set_index(build_index(store.embeddings, "ivf_flat", recall=1.0))
    queries = np.concatenate([unit_vectors(40, seed=1), store.embeddings[:10]])
    expected = store.search(queries, k=4)
    assert copied.search(queries, k=4) == expected
    assert indexed.search(queries, k=4) == expected
    for again in (pickle.loads(pickle.dumps(copied)), copy.deepcopy(copied)):
        assert again.search(queries, k=4) == expected
    windows = queries[:48].reshape(16, 3, -1)
    assert copied.search(windows, k=5) == store.search(windows, k=5)


def test_exclusions_are_those_of_files(store, copied):
    queries = store.embeddings[:6]
    clip_ids = [f"clip_{row // 3}" for row in range(6)]
    texts = [["Sound number 1"]] * 6
    found = copied.search(queries, 4, clip_ids, texts)
    assert found == store.search(queries, 4, clip_ids, texts)
    assert all(hit["caption"].rstrip(".") != "sound number 1" for hits in found for hit in hits)
    assert all(hit["clip_id"] != "clip 0.wav" for hit in found[0])


def test_it_is_a_datastore(store, copied, tmp_path):
    assert len(copied) == 300
    assert copied.dimension == 24
    np.testing.assert_allclose(copied.fingerprint, store.fingerprint, atol=1e-6)
    assert copied.records == store.records
    np.testing.assert_array_equal(np.asarray(copied.embeddings), store.embeddings)
    np.testing.assert_array_equal(copied.embeddings[[5, -1]], store.embeddings[[5, -1]])
    found = describe(copied, queries=20)
    assert found["captions"] == 300
    assert found["index"]["kind"] == "HNSW"
    assert found["recall"]["text"] == 1
    # Back into files.
    copied.save_pretrained(tmp_path / "back")
    back = CaptionDatastore.from_pretrained(tmp_path / "back")
    assert back.records == store.records
    np.testing.assert_array_equal(back.embeddings, store.embeddings)


def test_rows_are_added_and_removed(store, tmp_path):
    name = f"milvus:{tmp_path / 'edited.db'}#captions"
    small = CaptionDatastore(store.records[:20], store.embeddings[:20])
    copied = MilvusCaptionDatastore.from_datastore(small, name, "FLAT")
    copied.remove([0, 1, 7])
    left = [row for row in range(20) if row not in (0, 1, 7)]
    expected = CaptionDatastore([store.records[row] for row in left], store.embeddings[left])
    queries = unit_vectors(5, seed=2)
    assert copied.search(queries, 4) == expected.search(queries, 4)
    copied.add(store.records[20:23], store.embeddings[20:23])
    left += [20, 21, 22]
    expected = CaptionDatastore([store.records[row] for row in left], store.embeddings[left])
    assert copied.search(queries, 4, ["clip 7"] * 5) == expected.search(queries, 4, ["clip 7"] * 5)
    assert copied.records == expected.records
    assert MilvusCaptionDatastore.from_pretrained(name).records == expected.records


@pytest.mark.parametrize("kind", ["IVF_FLAT", "HNSW", "AUTOINDEX"])
def test_kinds_and_their_options_are_passed_on(store, tmp_path, kind):
    name = f"milvus:{tmp_path / 'kinds.db'}#captions"
    parameters = {"IVF_FLAT": ({"nlist": 8}, {"nprobe": 128}), "HNSW": ({"M": 8}, {"ef": 400})}.get(kind, (None, None))
    copied = MilvusCaptionDatastore.from_datastore(store, name, kind, *parameters)
    assert copied.index["kind"] == kind
    assert copied.index["search"] == (parameters[1] or {})
    queries = unit_vectors(10, seed=3)
    assert copied.search(queries, 4) == store.search(queries, 4)


def test_what_cannot_be_done_is_said(store, name, tmp_path):
    with pytest.raises(FileExistsError, match="already"):
        MilvusCaptionDatastore.from_datastore(store, name)
    with pytest.raises(FileNotFoundError, match="no collection 'other'"):
        CaptionDatastore.from_pretrained(name.replace("#captions", "#other"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        CaptionDatastore.from_pretrained(f"milvus:{tmp_path / 'absent.db'}")
    assert not (tmp_path / "absent.db").exists()
    # Lite knows no DISKANN; a refused export leaves nothing behind.
    refused = f"milvus:{tmp_path / 'refused.db'}#captions"
    with pytest.raises(ValueError, match="DISKANN"):
        MilvusCaptionDatastore.from_datastore(store, refused, "DISKANN")
    with pytest.raises(FileNotFoundError, match="it has: none"):
        CaptionDatastore.from_pretrained(refused)
    with pytest.raises(OSError, match="no Milvus answers"):
        connect("http://127.0.0.1:9")
    client = connect(str(tmp_path / "foreign.db"))
    client.create_collection("captions", dimension=8)
    with pytest.raises(ValueError, match="no datastore of captions"):
        CaptionDatastore.from_pretrained(f"milvus:{tmp_path / 'foreign.db'}#captions")


def test_an_export_that_was_cut_off_is_not_opened_and_made_again(store, tmp_path):
    name = f"milvus:{tmp_path / 'cut.db'}#captions"

    class Records(list):
        def __getitem__(self, part):
            raise KeyboardInterrupt

    broken = CaptionDatastore(store.records, store.embeddings)
    broken.records = Records(store.records)
    with pytest.raises(KeyboardInterrupt):
        MilvusCaptionDatastore.from_datastore(broken, name)
    with pytest.raises(FileNotFoundError):
        CaptionDatastore.from_pretrained(name)
    assert len(MilvusCaptionDatastore.from_datastore(store, name)) == 300


def test_command_line(tmp_path, capsys):
    """Exported, described, searched and captioned from."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog barking\nrain falling\na baby crying\na clock ticking\na violin playing\n")
    store, uri = tmp_path / "store", tmp_path / "captions.db"
    assert main(["datastore", "build", str(captions), "--output", str(store)]) == 0
    assert main(["datastore", "export", str(store), "--to", "milvus", "--uri", str(uri)]) == 0
    name = f"milvus:{uri}#captions"
    capsys.readouterr()
    answers = []
    for where in (str(store), name):
        assert main(["datastore", "search", where, "--text", "a dog", "--k", "3", "--format", "json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert main(["datastore", "info", name, "--queries", "2", "--format", "json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["captions"], info["index"]["backend"]) == (5, "milvus")
    assert main(["datastore", "export", str(store), "--to", "milvus", "--uri", str(uri)]) == 1
    assert "already" in capsys.readouterr().err
    opened = open_datastore(name, None, None)
    assert opened.captions == CaptionDatastore.from_pretrained(store).captions
    opened.collection.client.close()
    edit_by_commands(name, tmp_path, capsys)
    caption_from_both(store, name, tmp_path, capsys)


def edit_by_commands(name, tmp_path, capsys):
    """Captions are added and removed; what a collection cannot do is said."""
    more = tmp_path / "more.csv"
    more.write_text("caption,clip_id\na cow moos,c1\nwind blows,c2\n")
    assert main(["datastore", "add", name, str(more)]) == 0
    assert "added: 2" in capsys.readouterr().out
    assert main(["datastore", "remove", name, "--clip-id", "C1.wav", "--text", "Wind blows."]) == 0
    assert capsys.readouterr().out == "removed: 2\n"
    assert main(["datastore", "info", name, "--queries", "0", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 5
    everything = [option for row in range(5) for option in ("--row", str(row))]
    assert main(["datastore", "remove", name, *everything]) == 1
    assert "would leave no caption" in capsys.readouterr().err
    for wrong in (["filter", name, "--max-tokens", "0"], ["index", name], ["merge", name, name]):
        assert main(["datastore", *wrong]) == 1
        assert "is in Milvus, where captions are added and removed" in capsys.readouterr().err
    assert main(["datastore", "verify", name]) == 1
    assert "is in Milvus" in capsys.readouterr().out


def caption_from_both(store, name, tmp_path, capsys):
    """`recap caption` prompts and answers the same from files and from Milvus, and the diverse ones too."""
    import soundfile

    recording = tmp_path / "clip.wav"
    times = np.arange(48_000 * 2) / 48_000
    soundfile.write(recording, 0.3 * np.sin(2 * np.pi * 440 * times) * np.exp(-3 * (times % 0.5)), 48_000)
    for options in ([], ["--retrieval-diversity", "0.5"], ["--retrieval-score-threshold", "-1"]):
        answers = []
        for where in (str(store), name):
            assert main(["caption", str(recording), "--datastore", where, "--format", "json", *options]) == 0
            answers.append(json.loads(capsys.readouterr().out))
        assert answers[0] == answers[1]
        assert len(answers[0][0]["retrieved"]) == 4
    missing = name.replace("#captions", "#others")
    assert main(["caption", str(recording), "--datastore", missing]) == 1
    assert "no collection 'others' (it has: captions)" in capsys.readouterr().err
