"""Ways to break a datastore, forty or more: each is refused with a reason. Earlier formats are read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datastore_parts import WordEmbedder, numbered, save_store

from recap_hf import CaptionDatastore
from recap_hf.datastore import Selection, add_captions, index_datastore, remove_captions, verify_datastore
from recap_hf.modeling.datastore_files_recap import manifest_checksum

EARLIER = Path(__file__).parent / "datastores"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A datastore with all sorts of files."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    save_store(folder, numbered(0, 300))
    index_datastore(folder, "ivf_flat", recall=0.5)
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
    return manifest["index"]["file"] if kind == "index" else manifest[kind]


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
        else:
            manifest[kind] = new

    change(folder, trick)


KINDS = ("captions", "embeddings", "index")
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
            ("embeddings", "sub/embeddings.npy"),
            ("index", "index-0123456789abcdef.pkl"),
            ("captions", ""),
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
    "newer format": (lambda f: change(f, lambda m: m.update(format_version=4)), "format version 4"),
    "fingerprint of unequal rows": (lambda f: change(f, lambda m: m["fingerprint"][0].pop()), "not the description"),
    "infinite fingerprint": (lambda f: change(f, lambda m: m["fingerprint"][0].__setitem__(0, 1e308)), "unit vectors"),
    "array with a broken header": (
        lambda f: replace_sealed(
            f, "embeddings", array_bytes(np.zeros((300, 16), np.float32)).replace(b"'descr'", b"'descr\\", 1)
        ),
        "not a NumPy array",
    ),
    "number of captions as text": (lambda f: change(f, lambda m: m.update(num_captions="x")), "not the description"),
    "infinite dimension": (lambda f: change(f, lambda m: m.update(dimension=1e999)), "not the description"),
    "no captions": (lambda f: change(f, lambda m: m.pop("captions")), "not the description"),
    "unknown keys": (lambda f: change(f, lambda m: m.update(keys="image")), "'text' or 'audio'"),
    "unlisted file": (lambda f: change(f, lambda m: m["files"].popitem()), "have a checksum differ"),
    "wrong count": (lambda f: change(f, lambda m: m.update(num_captions=298)), "announces 298 captions"),
    "wrong dimension": (lambda f: change(f, lambda m: m.update(dimension=24)), "dimension"),
    "wrong type": (lambda f: change(f, lambda m: m.update(dtype="object")), "expected embeddings in"),
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


SEGMENTS = [*(f"sound {n}" for n in range(40) if n not in (3, 4)), *(f"sound {n}" for n in range(40, 46) if n != 41)]


@pytest.fixture
def earlier(tmp_path):
    """Datastores that the releases before format 3 wrote: an index over one segment, two segments with removed rows
    and an index over the first, and embeddings in int8."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.mark.parametrize(
    ("name", "captions", "tolerance"),
    [
        ("segments", SEGMENTS, 1e-6),
        ("indexed", [f"sound {n}" for n in range(40)], 1e-6),
        ("int8", [f"sound {n}" for n in range(20)], 0.02),
    ],
)
def test_earlier_formats_are_read_saved_and_edited(earlier, tmp_path, name, captions, tolerance):
    folder = earlier / name
    assert verify_datastore(folder, WordEmbedder()) == []
    store = CaptionDatastore.from_pretrained(folder)
    assert store.captions == captions
    expected = WordEmbedder()._vectors(captions)
    np.testing.assert_allclose(np.asarray(store.embeddings), expected, atol=tolerance)
    assert (store.index is None) == (name != "indexed")
    queries = expected[[2, 10, -1]]
    found = store.search(queries, 3)
    assert [hits[0]["caption"] for hits in found] == [captions[2], captions[10], captions[-1]]
    store.save_pretrained(tmp_path / "saved")
    again = CaptionDatastore.from_pretrained(tmp_path / "saved")
    assert (again.search(queries, 3), again.captions) == (found, captions)
    assert again.manifest["format_version"] == 3
    # The first edit writes the new format, and nothing of the old one stays.
    add_captions(folder, numbered(90, 92), WordEmbedder())
    assert remove_captions(folder, Selection(texts=["sound 91"])) == 1
    assert CaptionDatastore.from_pretrained(folder).captions == [*captions, "sound 90"]
    assert {path.name for path in folder.iterdir()} == {"datastore.json", "datastore.lock", *read(folder)["files"]}


def test_an_earlier_format_is_indexed_anew(earlier):
    for name, rows in (("segments", 43), ("indexed", 40)):
        assert index_datastore(earlier / name, "ivf_flat", 0.5)["kind"].startswith("IVF")
        store = CaptionDatastore.from_pretrained(earlier / name)
        assert (len(store), store.search_index.num_rows, store.manifest["format_version"]) == (rows, rows, 3)


@pytest.mark.parametrize(
    ("rows", "message"), [([3, 40], "below 40"), ([3, 3], "ascending"), ([], "ascending"), ([0.5], "ascending")]
)
def test_broken_lists_of_removed_rows_are_refused(earlier, rows, message):
    folder = earlier / "segments"
    name = read(folder)["segments"][0]["deleted"]
    data = array_bytes(np.array(rows) if rows else np.empty(0, np.int64))
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(folder, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(ValueError, match=message):
        CaptionDatastore.from_pretrained(folder)
