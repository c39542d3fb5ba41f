"""Forty ways to break a datastore: each is refused with a reason, and none is opened."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from datastore_parts import WordEmbedder, numbered, save_store

from recap_hf import CaptionDatastore
from recap_hf.datastore import Selection, add_captions, index_datastore, remove_captions, verify_datastore
from recap_hf.modeling.datastore_files_recap import manifest_checksum


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A datastore with all sorts of files: two segments, tombstones, an index."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    save_store(folder, numbered(0, 300))
    index_datastore(folder, "ivf_flat", recall=0.5)
    add_captions(folder, numbered(300, 320), WordEmbedder())
    remove_captions(folder, Selection(rows=[3, 4, 310]))
    save_store(folder.parent / "other", numbered(500, 800))
    index_datastore(folder.parent / "other", "ivf_flat", recall=0.5)
    save_store(folder.parent / "wide", numbered(0, 300), WordEmbedder(dimension=24))
    index_datastore(folder.parent / "wide", "ivf_flat", recall=0.5)
    return folder


@pytest.fixture
def store(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def read(folder):
    return json.loads((folder / "datastore.json").read_text())


def write(folder, manifest, seal=True):
    if seal:
        manifest["checksum"] = manifest_checksum(manifest)
    (folder / "datastore.json").write_text(json.dumps(manifest))


def name_of(folder, kind):
    manifest = read(folder)
    if kind == "index":
        return manifest["index"]["file"]
    return next(segment[kind] for segment in manifest["segments"] if segment[kind])


def flip_bit(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    (folder / name).write_bytes(data)


def replace_sealed(folder, kind, data):
    """Another content under a right checksum, as an attacker or a careless tool would leave it."""
    name, manifest = name_of(folder, kind), read(folder)
    (folder / name).write_bytes(data)
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write(folder, manifest)


def array_bytes(array, allow_pickle=False):
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def change(folder, function, seal=True):
    manifest = read(folder)
    function(manifest)
    write(folder, manifest, seal)


def rename_file(folder, kind, new):
    """A path trick: the manifest names a file elsewhere, with its true checksum."""

    def trick(manifest):
        old = name_of(folder, kind)
        manifest["files"][new] = manifest["files"].pop(old)
        if kind == "index":
            manifest["index"]["file"] = new
        for segment in manifest["segments"]:
            segment[kind] = new if segment.get(kind) == old else segment.get(kind)

    change(folder, trick)


KINDS = ("captions", "embeddings", "deleted", "index")
CASES = {
    **{
        f"bit flip in {kind} at {place:.0%}": (
            lambda f, kind=kind, place=place: flip_bit(f, name_of(f, kind), place),
            "checksum differs",
        )
        for kind in KINDS
        for place in (0, 0.5, 1)
    },
    **{
        f"{kind} truncated": (
            lambda f, kind=kind: (f / name_of(f, kind)).write_bytes((f / name_of(f, kind)).read_bytes()[:-5]),
            "truncated or not of this",
        )
        for kind in KINDS
    },
    **{
        f"{kind} missing": (
            lambda f, kind=kind: (f / name_of(f, kind)).unlink(),
            "missing, the datastore is incomplete",
        )
        for kind in KINDS
    },
    **{
        f"{kind} named {new}": (lambda f, kind=kind, new=new: rename_file(f, kind, new), "cannot be the name")
        for kind, new in (
            ("captions", "../captions.jsonl"),
            ("embeddings", "/etc/passwd"),
            ("deleted", "sub/deleted.npy"),
            ("index", "..\\index.faiss"),
            ("captions", "captions-0123456789abcdef.pkl"),
        )
    },
    "manifest truncated": (
        lambda f: (f / "datastore.json").write_text((f / "datastore.json").read_text()[:200]),
        "not the description",
    ),
    "manifest empty": (lambda f: (f / "datastore.json").write_text(""), "not the description"),
    "manifest binary": (lambda f: (f / "datastore.json").write_bytes(b"\x80\x04\x95"), "not the description"),
    "manifest a list": (lambda f: (f / "datastore.json").write_text("[1]"), "not the description"),
    "manifest nested without end": (lambda f: (f / "datastore.json").write_text("[" * 99999), "not the description"),
    "manifest edited": (
        lambda f: change(f, lambda m: m["fingerprint"][0].__setitem__(0, 0.5), seal=False),
        "description was changed",
    ),
    "generation edited": (
        lambda f: change(f, lambda m: m.update(generation=7), seal=False),
        "description was changed",
    ),
    "newer format": (lambda f: change(f, lambda m: m.update(format_version=3)), "format version 3"),
    "no segments": (lambda f: change(f, lambda m: m.update(segments=[])), "no segment"),
    "unlisted file": (lambda f: change(f, lambda m: m["files"].popitem()), "have a checksum differ"),
    "wrong count": (lambda f: change(f, lambda m: m.update(num_captions=318)), "announces 318 captions"),
    "wrong dimension": (lambda f: change(f, lambda m: m.update(dimension=24)), "dimension"),
    "wrong type": (lambda f: change(f, lambda m: m.update(dtype="object")), "expected embeddings in"),
    "segments swapped": (lambda f: change(f, lambda m: m["segments"].reverse()), "announces|expected 300"),
    "captions of another datastore": (
        lambda f: replace_sealed(f, "captions", b'{"caption": "x"}\n' * 299),
        "has 299 lines, expected 300",
    ),
    "embeddings of another encoder's size": (
        lambda f: replace_sealed(
            f, "embeddings", (f.parent / "w" / name_of(f.parent / "w", "embeddings")).read_bytes()
        ),
        r"embeddings of shape \(300, 24\)",
    ),
    "embeddings pickled": (
        lambda f: replace_sealed(f, "embeddings", array_bytes(np.array([{}], dtype=object), True)),
        "not a NumPy array",
    ),
    "embeddings in float64": (
        lambda f: replace_sealed(f, "embeddings", array_bytes(np.zeros((300, 16)))),
        "in float64",
    ),
    "tombstones out of range": (lambda f: replace_sealed(f, "deleted", array_bytes(np.array([3, 300]))), "below 300"),
    "tombstones repeated": (lambda f: replace_sealed(f, "deleted", array_bytes(np.array([3, 3]))), "ascending"),
    "index of another dimension": (
        lambda f: replace_sealed(f, "index", (f.parent / "w" / name_of(f.parent / "w", "index")).read_bytes()),
        "of another datastore",
    ),
    "index that is none": (lambda f: replace_sealed(f, "index", b"IwFl" + bytes(500)), "not an index"),
}


def test_there_are_forty_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_broken_datastores_are_refused(store, whole, case):
    damage, message = CASES[case]
    shutil.copytree(whole.parent / "wide", store.parent / "w")
    damage(store)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        CaptionDatastore.from_pretrained(store)
    assert str(store) in str(caught.value)
    assert verify_datastore(store) == [str(caught.value)]


def test_verify_reads_what_opening_does_not(store, whole):
    assert verify_datastore(store, WordEmbedder()) == []
    replace_sealed(store, "captions", b'{"text": 1}\n' + b'{"caption": " "}\n' * 299)
    problems = verify_datastore(store)
    assert "expected a JSON object with a caption" in problems[0]
    assert problems[1] == "row 1: the caption is empty"
    shutil.copytree(whole, store, dirs_exist_ok=True)
    replace_sealed(store, "embeddings", array_bytes(np.ones((300, 16), dtype=np.float32)))
    assert "has the length 4.0000, expected 1" in verify_datastore(store)[0]
    shutil.copytree(whole, store, dirs_exist_ok=True)
    assert "made by another CLAP" in verify_datastore(store, WordEmbedder(seed=2))[0]
    # Right files, but the captions are not those that were embedded.
    lines = [json.dumps({"caption": f"another {number}"}) + "\n" for number in range(300)]
    replace_sealed(store, "captions", "".join(lines).encode())
    assert "do not belong together" in verify_datastore(store, WordEmbedder())[0]
