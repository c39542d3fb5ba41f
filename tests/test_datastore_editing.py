"""Edits of a datastore: what is there afterwards, what they cost, and that no moment leaves half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datastore_parts import WordEmbedder, numbered, save_store

from recap_hf import CaptionDatastore
from recap_hf.datastore import (
    FilterOptions,
    LeakGuard,
    Selection,
    add_captions,
    filter_datastore,
    index_datastore,
    merge_datastores,
    reembed_datastore,
    remove_captions,
)
from recap_hf.datastore.editing import editing
from recap_hf.datastore.files import locked
from recap_hf.hub.push import copy_files, datastore_files

NO_LIMIT = FilterOptions(max_tokens=None)


def opened(folder):
    return CaptionDatastore.from_pretrained(folder)


def texts(folder):
    return opened(folder).captions


def assert_consistent(folder):
    """Every row has the embedding of its own caption, and finds itself."""
    store = opened(folder)
    expected = WordEmbedder()._vectors(store.captions)
    np.testing.assert_allclose(np.asarray(store.embeddings), expected, atol=1e-6)
    rows = range(0, len(store), max(1, len(store) // 7))
    for row in rows:
        (hits,) = store.search(expected[row : row + 1], k=1)
        assert hits[0]["caption"] == store.captions[row]
        assert hits[0]["score"] == pytest.approx(1, abs=1e-5)


@pytest.fixture
def folder(tmp_path):
    save_store(tmp_path / "store", numbered(0, 40))
    return tmp_path / "store"


def test_add_and_remove(folder):
    embedder = WordEmbedder()
    report = add_captions(folder, numbered(40, 45, source="new"), embedder)
    assert report["added"] == 5
    # What was there is not embedded again.
    assert embedder.embedded == [f"sound {number}" for number in range(40, 45)]
    assert texts(folder) == [f"sound {number}" for number in range(45)]
    assert_consistent(folder)
    assert remove_captions(folder, Selection(clip_ids=["CLIP3.wav", "clip44"], texts=["Sound, 7!"], rows=[0])) == 4
    left = [number for number in range(45) if number not in (0, 3, 7, 44)]
    assert texts(folder) == [f"sound {number}" for number in left]
    assert_consistent(folder)
    # Rows are those that a search shows, also after a removal.
    assert opened(folder).search(embedder._vectors(["sound 8"]), k=1)[0][0]["row"] == left.index(8)
    assert remove_captions(folder, Selection(sources=["new"])) == 4
    assert texts(folder) == [f"sound {number}" for number in left if number < 40]
    assert opened(folder).manifest["generation"] == 4


def test_removed_texts_leave_the_disk_and_readers_go_on(folder):
    reader = opened(folder)
    remove_captions(folder, Selection(clip_ids=["clip17"]))
    assert not any(b"sound 17" in path.read_bytes() for path in folder.iterdir())
    query = WordEmbedder()._vectors(["sound 17"])
    assert reader.search(query, k=1)[0][0]["caption"] == "sound 17"
    assert np.asarray(reader.embeddings).shape == (40, 16)
    assert opened(folder).search(query, k=1)[0][0]["caption"] != "sound 17"
    assert {path.name for path in folder.iterdir()} == {
        "datastore.json",
        "datastore.lock",
        *opened(folder).manifest["files"],
    }


def test_no_file_of_others_is_replaced_or_deleted(tmp_path):
    kept = dict.fromkeys(("captions.jsonl", "notes.txt", "embeddings.npy", "index.faiss", ".hidden.tmp"), b"mine")
    for name, contents in kept.items():
        (tmp_path / name).write_bytes(contents)
    folder = tmp_path
    save_store(folder, numbered(0, 40))
    add_captions(folder, numbered(40, 45), WordEmbedder())
    opened(folder).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_version_1_is_read_and_edited(tmp_path):
    """The layout that the first releases wrote."""
    folder = tmp_path / "old"
    folder.mkdir()
    embeddings = WordEmbedder()._vectors(["sound 0", "sound 1"])
    np.save(folder / "embeddings.npy", embeddings)
    lines = [json.dumps(record) + "\n" for record in numbered(0, 2)]
    (folder / "captions.jsonl").write_text("".join(lines))
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    manifest = {"format_version": 1, "num_captions": 2, "dimension": 16, "fingerprint": None, "files": files}
    (folder / "datastore.json").write_text(json.dumps(manifest))
    assert texts(folder) == ["sound 0", "sound 1"]
    add_captions(folder, numbered(2, 4), WordEmbedder())
    assert json.loads((folder / "datastore.json").read_text())["format_version"] == 3
    assert texts(folder) == [f"sound {number}" for number in range(4)]
    assert_consistent(folder)


def test_merge_copies_embeddings_and_refuses_other_encoders(folder, tmp_path):
    for name, first in (("a", 100), ("b", 200)):
        save_store(tmp_path / name, numbered(first, first + 10))
    remove_captions(tmp_path / "a", Selection(rows=[0]))
    assert merge_datastores(folder, [tmp_path / "a", tmp_path / "b"]) == 19
    assert texts(folder)[40:] == [f"sound {number}" for number in (*range(101, 110), *range(200, 210))]
    assert_consistent(folder)
    save_store(tmp_path / "other", numbered(0, 3), WordEmbedder(seed=1))
    with pytest.raises(ValueError, match="made by another CLAP"):
        merge_datastores(folder, [tmp_path / "other"])
    save_store(tmp_path / "wide", numbered(0, 3), WordEmbedder(dimension=8))
    with pytest.raises(ValueError, match="of dimension 8"):
        merge_datastores(folder, [tmp_path / "wide"])
    with pytest.raises(ValueError, match="made by another CLAP"):
        add_captions(folder, numbered(0, 1), WordEmbedder(seed=1))
    assert len(texts(folder)) == 59


def test_reembed_moves_to_another_encoder(folder):
    remove_captions(folder, Selection(rows=[2]))
    reembed_datastore(folder, WordEmbedder(seed=1, dimension=8))
    store = opened(folder)
    assert store.dimension == 8
    assert len(store) == 39
    store.check_encoder(WordEmbedder(seed=1, dimension=8).fingerprint)
    np.testing.assert_allclose(store.embeddings, WordEmbedder(seed=1, dimension=8)._vectors(store.captions), atol=1e-6)


def test_filter_removes_clips_texts_and_long_captions(folder, tmp_path):
    add_captions(folder, [{"caption": "Sound 5", "clip_id": "x"}, {"caption": "one two three four"}], WordEmbedder())
    (tmp_path / "test.csv").write_text("file_name,caption\nclip5.wav,sound 5\nclip6.wav,another\n")
    guard = LeakGuard.from_sources([tmp_path / "test.csv"])
    report = filter_datastore(folder, FilterOptions(max_tokens=3, guard=guard), WordEmbedder().count_tokens)
    assert report["removed"] == 3
    assert report["leak_guard"] == {
        "clips": 2,
        "removed_by_clip_id": 2,
        "of_these_weak": 0,
        "with_identical_text": 1,
        "clips_with_identical_text": 1,
        "identical_texts_removed": False,
    }
    assert "Sound 5" in texts(folder)
    assert not {"sound 5", "sound 6", "one two three four"} & set(texts(folder))
    report = filter_datastore(folder, FilterOptions(max_tokens=None, guard=guard, guard_texts=True))
    assert report["removed"] == 1
    assert "Sound 5" not in texts(folder)


def test_the_index_goes_on_through_edits(folder):
    add_captions(folder, numbered(40, 400), WordEmbedder())
    description = index_datastore(folder, "ivf_flat", recall=0.9)
    assert description["kind"].startswith("IVF")
    files = opened(folder).manifest["files"]
    # Captions and embeddings were not written again.
    index_datastore(folder, "ivf_sq8", recall=0.9)
    assert len(set(files) & set(opened(folder).manifest["files"])) == 2
    description = index_datastore(folder, "ivf_flat", recall=0.9)
    add_captions(folder, numbered(400, 420), WordEmbedder())
    remove_captions(folder, Selection(clip_ids=["clip5", "clip405"]))
    store = opened(folder)
    # What was learnt and measured stays; the rows are those of the datastore.
    assert store.index == description
    assert store.search_index.num_rows == len(store) == 418
    for text in ("sound 3", "sound 410", "sound 419"):
        (hits,) = store.search(WordEmbedder()._vectors([text]), k=3)
        assert hits[0]["caption"] == text
    for text in ("sound 5", "sound 405"):
        assert text not in [hit["caption"] for hit in store.search(WordEmbedder()._vectors([text]), k=5)[0]]
    index_datastore(folder, "exact")
    assert opened(folder).index is None


def test_an_outgrown_index_is_trained_again(folder, monkeypatch):
    monkeypatch.setattr("recap_hf.datastore.editing.EXACT_UP_TO", 100)
    monkeypatch.setattr("recap_hf.datastore.indexing.EXACT_UP_TO", 100)
    add_captions(folder, numbered(40, 99), WordEmbedder())
    assert opened(folder).index is None
    add_captions(folder, numbered(99, 300), WordEmbedder(), index="keep")
    assert opened(folder).index is None
    add_captions(folder, numbered(300, 310), WordEmbedder())
    assert opened(folder).index["trained_rows"] == 310
    add_captions(folder, numbered(310, 400), WordEmbedder())
    assert (opened(folder).index["trained_rows"], opened(folder).search_index.num_rows) == (310, 400)
    add_captions(folder, numbered(400, 500), WordEmbedder())
    assert opened(folder).index["trained_rows"] == 500
    index_datastore(folder, "exact")
    add_captions(folder, numbered(500, 600), WordEmbedder())
    assert opened(folder).index is None


def test_an_index_made_anew_beside_readers(folder):
    add_captions(folder, numbered(40, 200), WordEmbedder())
    query = WordEmbedder()._vectors(["sound 11"])
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(lambda: [index_datastore(folder, kind, 0.5) for kind in ("ivf_flat", "ivf_sq8") * 3])
        opens = 0
        while not writer.done() or not opens:
            assert opened(folder).search(query, k=1)[0][0]["caption"] == "sound 11"
            opens += 1
        assert len(writer.result()) == 6
    assert opened(folder).index["wanted_kind"] == "ivf_sq8"


def test_only_what_belongs_to_it_is_pushed(folder):
    add_captions(folder, numbered(40, 45), WordEmbedder())
    remove_captions(folder, Selection(rows=[1]))
    (folder / f".captions.{os.getpid()}.tmp").write_text("left by a kill")
    copy_files(folder, folder.parent / "pushed", datastore_files(folder))
    copied = {path.name for path in (folder.parent / "pushed").iterdir()}
    assert copied == {"datastore.json", *opened(folder).manifest["files"]}


def test_edits_that_cannot_be_are_refused(folder):
    with pytest.raises(ValueError, match="would leave no caption"):
        remove_captions(folder, Selection(rows=range(40)))
    with pytest.raises(ValueError, match="no row 40"):
        remove_captions(folder, Selection(rows=[40]))
    with pytest.raises(ValueError, match="which captions to remove"):
        remove_captions(folder, Selection())
    with pytest.raises(FileNotFoundError, match="not a datastore"):
        remove_captions(folder.parent, Selection(rows=[1]))
    assert len(texts(folder)) == 40


def test_one_writer_at_a_time(folder, monkeypatch):
    monkeypatch.setattr("recap_hf.datastore.editing._LOCK_TIMEOUT_S", 0.05)
    with locked(folder), pytest.raises(OSError, match="another process is writing"), editing(folder):
        pass


def test_saving_over_a_datastore_replaces_it_at_once(folder):
    reader = opened(folder)
    save_store(folder, numbered(70, 75))
    assert texts(folder) == [f"sound {number}" for number in range(70, 75)]
    # What was opened before stays readable.
    assert reader.captions[39] == "sound 39"
    assert sum(path.suffix == ".npy" for path in folder.iterdir()) == 1


WRITER = """
import os
import sys
sys.path.insert(0, sys.argv[1])
from datastore_parts import WordEmbedder, numbered
from recap_hf.datastore import Selection, add_captions, merge_datastores, remove_captions
print("ready", flush=True)
for line in sys.stdin:
    folder, action = line.split()
    child = os.fork()
    if child == 0:
        if action == "add":
            add_captions(folder, numbered(1000, 1400), WordEmbedder())
        elif action == "remove":
            remove_captions(folder, Selection(rows=range(0, 300, 2)))
        else:
            merge_datastores(folder, [folder + "-other"])
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
KILLS_PER_ACTION = int(os.environ.get("RECAP_TEST_KILLS", "8"))


@pytest.fixture(scope="module")
def writer():
    """A process that writes in children, each of which may be killed."""
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer forks")
@pytest.mark.parametrize("action", ["add", "remove", "merge"])
def test_sigkill_leaves_the_old_or_the_new_state(tmp_path, writer, action):
    """`RECAP_TEST_KILLS=50` kills 150 times (three actions)."""
    folder = tmp_path / "store"
    save_store(tmp_path / "store-other", numbered(2000, 2300))
    rng = random.Random(action)
    old = [f"sound {number}" for number in range(300)]
    new = {
        "add": old + [f"sound {number}" for number in range(1000, 1400)],
        "remove": old[1::2],
        "merge": old + [f"sound {number}" for number in range(2000, 2300)],
    }[action]
    whole_s, states = 0.0, []
    for attempt in range(KILLS_PER_ACTION + 1):
        save_store(folder, numbered(0, 300))
        started = time.perf_counter()
        writer.stdin.write(f"{folder} {action}\n")
        writer.stdin.flush()
        child = int(writer.stdout.readline())
        if attempt:
            time.sleep(rng.uniform(0, 1.1 * whole_s))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = int(writer.stdout.readline())
        if not attempt:
            # The first runs to its end, which tells how long that takes.
            assert status == 0
            whole_s = time.perf_counter() - started
        found = texts(folder)
        assert found in (old, new)
        states.append("new" if found == new else "old")
        assert_consistent(folder)
        # The next writer is not kept out, and sweeps.
        add_captions(folder, numbered(5000, 5001), WordEmbedder())
        used = set(json.loads((folder / "datastore.json").read_text())["files"])
        assert {path.name for path in folder.iterdir()} - used <= {"datastore.json", "datastore.lock"}
    assert states[0] == "new"
    print(f"{action}: {states[1:].count('old')} old, {states[1:].count('new')} new of {KILLS_PER_ACTION} kills")


READER = """
import sys
import time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from datastore_parts import WordEmbedder
from recap_hf import CaptionDatastore
folder = sys.argv[2]
query = WordEmbedder()._vectors(["sound 0"])
print("ready", flush=True)
opened = searches = 0
generation = -1
while not Path(folder + ".stop").exists() or not opened:
    store = CaptionDatastore.from_pretrained(folder)
    assert store.manifest["generation"] >= generation
    generation = store.manifest["generation"]
    (hits,) = store.search(query, k=3)
    assert hits[0]["caption"] == "sound 0", hits
    # An edit adds or removes ten captions together: a reader that sees some of them sees them all.
    numbers = [int(caption.split()[1]) for caption in store.captions]
    tens = [number // 10 for number in numbers]
    assert all(tens.count(each) == 10 for each in set(tens)), numbers
    assert len(store) == store.manifest["num_captions"]
    opened += 1
    time.sleep(0.02)
print(opened, flush=True)
"""
READERS = int(os.environ.get("RECAP_TEST_READERS", "1"))
EDITS = int(os.environ.get("RECAP_TEST_EDITS", "30"))


def test_readers_during_edits(tmp_path):
    """`RECAP_TEST_READERS=8 RECAP_TEST_EDITS=1000` is the full size."""
    folder = tmp_path / "store"
    save_store(folder, numbered(0, 100))
    command = [sys.executable, "-c", READER, str(Path(__file__).parent), str(folder)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(READERS)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    rng, there, embedder = random.Random(0), [], WordEmbedder()
    for edit in range(EDITS):
        if len(there) > 5 and rng.random() < 0.5:
            ten = there.pop(rng.randrange(len(there)))
            clips = [f"clip{number}" for number in range(10 * ten, 10 * ten + 10)]
            assert remove_captions(folder, Selection(clip_ids=clips)) == 10
        else:
            there.append(10 + edit)
            add_captions(folder, numbered(10 * there[-1], 10 * there[-1] + 10), embedder)
    Path(f"{folder}.stop").touch()
    counts = [int(reader.communicate(timeout=120)[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * READERS
    print(f"{EDITS} edits beside {READERS} readers, which opened the datastore {counts} times")
    expected = {f"sound {number}" for ten in (*range(10), *there) for number in range(10 * ten, 10 * ten + 10)}
    assert set(texts(folder)) == expected
