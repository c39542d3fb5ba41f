"""Captions out of files of every kind, what is left out of them, and builds that go on where they stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datastore_parts import WordEmbedder, load_in_worker, numbered, save_store

from recap_hf import CaptionDatastore
from recap_hf.datastore import (
    BuildOptions,
    FilterOptions,
    LeakGuard,
    SourceOptions,
    build_datastore,
    describe,
    export_datastore,
    read_blacklist,
    read_source,
    read_sources,
)
from recap_hf.datastore.filters import CaptionFilter, text_problem

CSV = 'file_name,caption,licence,weather\na.wav,"A dog barks, twice",CC0,dry\nb.wav,Rain falls,,wet\n'
RECORDS = [
    {"caption": "A dog barks, twice", "clip_id": "a.wav", "licence": "CC0", "weather": "dry"},
    {"caption": "Rain falls", "clip_id": "b.wav", "weather": "wet"},
]
AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n1,7fmOlUlwoNg,20,Rattling\n2,7fmOlUlwoNg,20,Noise\n"
RECAP = (
    ",file_name,caption_num,caption,abstract_captions\n"
    "0,7fmOlUlwoNg.wav,caption_1,rattling,\"[['Metal rattles', 'Noise'], ['Metal rattles']]\"\n"
    "1,7fmOlUlwoNg.wav,caption_2,noise,\"[['Metal rattles', 'Noise'], ['Metal rattles']]\"\n"
)


def write_source(folder, suffix):
    path = folder / f"mine.{suffix}"
    if suffix == "csv":
        path.write_text(CSV)
    elif suffix == "tsv":
        path.write_text(
            CSV.replace('"A dog barks, twice"', "\0").replace(",", "\t").replace("\0", "A dog barks, twice")
        )
    elif suffix in ("json", "jsonl"):
        text = "\n".join(map(json.dumps, RECORDS)) if suffix == "jsonl" else json.dumps(RECORDS)
        path.write_text(text)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_tables_give_records(tmp_path, suffix):
    found = list(read_source(write_source(tmp_path, suffix)))
    assert found == [{**record, "source": "mine"} for record in RECORDS]


def test_text_files_lists_and_mapped_columns(tmp_path):
    (tmp_path / "own.txt").write_text("rain\n\n  wind \n")
    options = SourceOptions(source="me", licence="CC BY 4.0", split="train")
    known = {"source": "me", "licence": "CC BY 4.0", "split": "train"}
    assert list(read_source(tmp_path / "own.txt", options)) == [
        {"caption": text, **known} for text in ("rain", "wind")
    ]
    (tmp_path / "lists.json").write_text(json.dumps(["rain", {"captions": ["wind", "sea"], "id": 5}]))
    with pytest.raises(ValueError, match="columns 'text'"):
        (tmp_path / "other.jsonl").write_text('{"text": "rain"}\n')
        list(read_source(tmp_path / "other.jsonl"))
    mapped = SourceOptions(columns={"caption": "text"})
    assert list(read_source(tmp_path / "other.jsonl", mapped)) == [{"caption": "rain", "source": "other"}]
    assert [record["caption"] for record in read_source(tmp_path / "own.txt", mapped)] == ["rain", "wind"]
    (tmp_path / "both.jsonl").write_text('{"text": "rain", "caption": "title"}\n')
    expected = [{"caption": "rain", "caption_": "title", "source": "both"}]
    assert list(read_source(tmp_path / "both.jsonl", mapped)) == expected


def test_saved_datasets_and_datastores(tmp_path):
    from datasets import Dataset

    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    assert [record["caption"] for record in read_source(tmp_path / "saved")] == ["A dog barks, twice", "Rain falls"]
    save_store(tmp_path / "store", [{**record, "source": "elsewhere", "weak": True} for record in RECORDS])
    assert list(read_source(tmp_path / "store")) == [
        {**record, "source": "elsewhere", "weak": True} for record in RECORDS
    ]


def test_published_layouts_are_known(tmp_path):
    (tmp_path / "audiocaps_test.csv").write_text(AUDIOCAPS)
    first = next(iter(read_source(tmp_path / "audiocaps_test.csv")))
    assert first == {
        "caption": "Rattling",
        "clip_id": "7fmOlUlwoNg",
        "source": "audiocaps",
        "licence": "MIT",
        "split": "test",
        "audiocap_id": "1",
        "start_time": "20",
    }
    (tmp_path / "recap_dev_audiocaps.csv").write_text(RECAP)
    records = list(read_source(tmp_path / "recap_dev_audiocaps.csv"))
    weak = {"source": "recap-weak-audiocaps", "weak": True, "clip_id": "7fmOlUlwoNg.wav", "split": "validation"}
    assert [record for record in records if record.get("weak")] == [
        {"caption": "Metal rattles", **weak},
        {"caption": "Noise", **weak},
    ]
    assert [record["caption"] for record in records if not record.get("weak")] == ["rattling", "noise"]
    published = read_source(tmp_path / "recap_dev_audiocaps.csv", SourceOptions(captions="published"))
    assert [record["caption"] for record in published] == ["rattling", "noise"]
    named = list(read_source(f"recap:{tmp_path}", SourceOptions(split="dev")))
    assert sorted(record["caption"] for record in named) == ["Metal rattles", "Noise", "noise", "rattling"]


def test_sources_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    for name, message in (
        ("absent.csv", "no such file"),
        ("notes.docx", "not from '.docx'"),
        ("broken.json", "not readable as JSON"),
        ("latin.txt", "not UTF-8"),
        (".", "holds neither"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            list(read_source(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A dog barks", None),
        ("雨が降っている", None),
        ("Un chien aboie près du café", None),
        ("...", "empty"),
        ("CafÃ© noises", "garbled"),
        ("rain \ufffd falls", "garbled"),
        ("a\x00b", "garbled"),
        ("0101 1010 1010 0101 x", "garbled"),
        ("a " * 1500, "garbled"),
    ],
)
def test_unreadable_captions(text, problem):
    assert text_problem(text) == problem


def test_a_block_of_which_nothing_stays_is_not_tokenized():
    def refuses_nothing(captions: list[str]) -> list[int]:
        # As the fast tokenizers of transformers.
        return [len(text.split()) for text in captions] if captions[0] else []

    left_out = CaptionFilter(FilterOptions(), refuses_nothing)
    assert list(left_out.filter([{"caption": "--"}, {"caption": "!!!"}])) == []
    assert left_out.report()["dropped"] == {"empty": 2}


def test_a_mapping_of_a_column_that_no_source_has_is_refused(tmp_path):
    """A mistyped `clip_id` would leave the captions of test clips in a datastore."""
    (tmp_path / "own.csv").write_text("clipname,sentence\nt1.wav,a cat meows\n")
    (tmp_path / "other.csv").write_text("clip_id,caption\n2,rain\n")
    names = [tmp_path / "own.csv", tmp_path / "other.csv"]

    def read(columns):
        return [record for _, records in read_sources(names, SourceOptions(columns=columns)) for record in records]

    found = read({"caption": "sentence", "clip_id": "clipname"})
    assert [(record["caption"], record["clip_id"]) for record in found] == [("a cat meows", "t1.wav"), ("rain", "2")]
    with pytest.raises(ValueError, match="No source has the column that a mapping names: clip_id=clip_nam"):
        read({"caption": "sentence", "clip_id": "clip_nam"})
    with pytest.raises(ValueError, match="captoin=sentence names no column of ours: expected one of caption"):
        SourceOptions(columns={"captoin": "sentence"})
    with pytest.raises(ValueError, match="No source has the column"):
        build_datastore(
            names[:1],
            tmp_path / "s",
            WordEmbedder(),
            source_options=SourceOptions(columns={"caption": "sentence", "clip_id": "x"}),
        )
    assert not (tmp_path / "s").exists()


def test_filters_count_what_they_drop():
    records = [
        {"caption": "rain falls", "source": "a", "licence": "CC BY-NC 4.0"},
        {"caption": "Rain falls!", "source": "b"},
        {"caption": "rain falls", "source": "b"},
        {"caption": "wind " * 51, "source": "b"},
        {"caption": "--", "source": "b"},
        {"caption": "sea", "source": "c"},
    ]
    embedder = WordEmbedder()
    keep = CaptionFilter(FilterOptions(), embedder.count_tokens)
    assert len(list(keep.filter(records))) == 4
    report = keep.report()
    assert report["dropped"] == {"empty": 1, "too_long": 1}
    assert report["inputs"] == {"captions": {"read": 6, "exact_duplicates": 1}}
    assert report["duplicates"] == {
        "exact": 1,
        "normalised": 2,
        "unique": 3,
        "unique_normalised": 2,
        "shared": {"a + b": 1},
    }
    assert report["sources"]["b"] == {"read": 4, "too_long": 1, "empty": 1, "kept": 2}
    for choice, captions in (("exact", ["rain falls", "Rain falls!", "sea"]), ("normalised", ["rain falls", "sea"])):
        chosen = CaptionFilter(FilterOptions(duplicates=choice, max_tokens=None)).filter(records[:3] + records[5:])
        assert [record["caption"] for record in chosen] == captions
    commercial = CaptionFilter(FilterOptions(commercial=True, max_tokens=None)).filter(records[:2])
    assert [record["caption"] for record in commercial] == ["Rain falls!"]


def test_the_leak_guard_knows_clips_by_every_spelling(tmp_path):
    (tmp_path / "test.csv").write_text("file_name,caption\nSanta Motor.wav,An engine\n7fmOlUlwoNg.wav,Rattling\n")
    guard = LeakGuard.from_sources([tmp_path / "test.csv"])
    records = [
        {"caption": "one", "clip_id": "Santa_Motor.npy", "source": "s"},
        {"caption": "two", "clip_id": "Y7fmOlUlwoNg.wav", "source": "s", "weak": True},
        {"caption": "an engine", "clip_id": "other", "source": "s"},
        {"caption": "three", "clip_id": "another", "source": "s"},
    ]
    for texts, left in ((False, ["an engine", "three"]), (True, ["three"])):
        chosen = CaptionFilter(FilterOptions(max_tokens=None, guard=guard, guard_texts=texts))
        assert [record["caption"] for record in chosen.filter(records)] == left
        report = chosen.report()["leak_guard"]
        assert (report["removed_by_clip_id"], report["of_these_weak"], report["with_identical_text"]) == (2, 1, 1)
    (tmp_path / "no_clips.txt").write_text("rain\n")
    with pytest.raises(ValueError, match="names no clip"):
        LeakGuard.from_sources([tmp_path / "no_clips.txt"])
    for split, text in (("development", "learnt"), ("evaluation", "tested")):
        (tmp_path / f"clotho_captions_{split}.csv").write_text(f"file_name,caption_1\n{text}.wav,{text}\n")
    assert LeakGuard.from_sources([f"clotho:{tmp_path}"]).clip_ids == {"tested"}


def test_wavcaps_blacklists_hold_for_their_source(tmp_path):
    path = tmp_path / "blacklist.json"
    path.write_text(json.dumps({"FreeSound": ["12"], "AudioSet": ["Y7fmOlUlwoNg.wav"]}))
    data = [
        {"id": "12", "caption": "rain", "download_link": "x"},
        {"id": "13", "caption": "sea", "download_link": "x"},
    ]
    for name in ("fsd_final.json", "bbc_final.json"):
        (tmp_path / name).write_text(json.dumps({"num_captions_per_audio": 1, "data": data}))
    options = FilterOptions(max_tokens=None, blacklists=tuple(read_blacklist(path)))
    (tmp_path / "broken.txt").write_text("12\n13\n")
    with pytest.raises(ValueError, match="does not read as JSON"):
        read_blacklist(tmp_path / "broken.txt")
    for name, left in (("fsd_final.json", ["sea"]), ("bbc_final.json", ["rain", "sea"])):
        chosen = list(CaptionFilter(options).filter(read_source(tmp_path / name)))
        assert [record["caption"] for record in chosen] == left
        assert chosen[0]["source"] == f"wavcaps-{name[:3]}"
        assert chosen[0]["licence"] == "WavCaps (academic use only)"


def test_a_build_counts_and_exports(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.txt").write_text("rain falls\nRain falls\nwind\n")
    store = build_datastore([tmp_path / "a.csv", tmp_path / "b.txt"], tmp_path / "store", WordEmbedder())
    info = describe(store, queries=5)
    assert info["captions"] == 5
    assert (info["duplicates"]["exact"], info["duplicates"]["normalised"]) == (1, 2)
    assert info["duplicates"]["shared"] == {"a + b": 1}
    assert info["dimension"] == 16
    assert info["index"] == {"kind": "exact"}
    assert info["recall"] == {"k": 4, "text": 1.0, "audio": 1.0}
    assert info["licences"] == {"not stated": 4, "CC0": 1}
    assert info["report"]["inputs"] == {
        "a.csv": {"read": 2, "exact_duplicates": 0},
        "b.txt": {"read": 3, "exact_duplicates": 0},
    }
    assert info["encoder_known"]
    assert not list((tmp_path / "store").glob(".building"))
    for suffix in ("jsonl", "csv", "parquet", "json"):
        path = tmp_path / f"out.{suffix}"
        assert export_datastore(store, path, tmp_path / "out.npy") == 5
        assert [record["caption"] for record in read_source(path)] == store.captions
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), store.embeddings)
    assert export_datastore(store, tmp_path / "out.txt") == 5
    assert (tmp_path / "out.txt").read_text().splitlines() == store.captions
    with pytest.raises(FileExistsError, match="--overwrite"):
        build_datastore([tmp_path / "b.txt"], tmp_path / "store", WordEmbedder())
    build_datastore(
        [tmp_path / "b.txt"], tmp_path / "store", WordEmbedder(), options=BuildOptions(overwrite=True, dtype="float16")
    )
    half = CaptionDatastore.from_pretrained(tmp_path / "store")
    assert half.embeddings.dtype == np.float16
    assert half.search(WordEmbedder().embed(["wind"]), k=1)[0][0]["caption"] == "wind"
    with pytest.raises(ValueError, match="No caption is left"):
        (tmp_path / "empty.txt").write_text("--\n")
        build_datastore([tmp_path / "empty.txt"], tmp_path / "none", WordEmbedder())


class Interrupted(Exception):
    pass


class StoppingEmbedder(WordEmbedder):
    """Gives up after some captions, as a machine does that is switched off."""

    def embed(self, captions):
        if len(self.embedded) >= 8192:
            raise Interrupted
        return super().embed(captions)


def test_a_build_that_was_cut_off_goes_on(tmp_path):
    records = numbered(0, 9000)
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(Interrupted):
        build_datastore([tmp_path / "many.jsonl"], tmp_path / "store", StoppingEmbedder())
    assert not (tmp_path / "store" / "datastore.json").exists()
    messages, embedder = [], WordEmbedder()
    store = build_datastore(
        [tmp_path / "many.jsonl"], tmp_path / "store", embedder, options=BuildOptions(progress=messages.append)
    )
    assert "Continuing a build that was cut off: 1 of 2 chunks exist" in messages
    assert embedder.embedded == [record["caption"] for record in records[8192:]]
    assert store.captions == [record["caption"] for record in records]
    np.testing.assert_allclose(store.embeddings[8190:8195], WordEmbedder().embed(store.captions[8190:8195]), atol=1e-6)


def test_a_source_that_is_not_there_costs_no_earlier_build(tmp_path):
    records = numbered(0, 9000)
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(Interrupted):
        build_datastore([tmp_path / "many.jsonl"], tmp_path / "store", StoppingEmbedder())
    with pytest.raises(OSError, match="mnay"):
        build_datastore([tmp_path / "mnay.jsonl"], tmp_path / "store", WordEmbedder())
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="No caption is left"):
        build_datastore([tmp_path / "empty.txt"], tmp_path / "store", WordEmbedder())
    embedder = WordEmbedder()
    build_datastore([tmp_path / "many.jsonl"], tmp_path / "store", embedder)
    assert embedder.embedded == [record["caption"] for record in records[8192:]]
    assert sorted(path.name for path in (tmp_path / "store").glob(".b*")) == []


def test_several_processes_embed_the_same(tmp_path):
    records = numbered(0, 20_000)
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    embedder = WordEmbedder()
    with pytest.raises(ValueError, match="each load the encoder"):
        build_datastore([tmp_path / "many.jsonl"], tmp_path / "store", embedder, options=BuildOptions(processes=2))
    embedder.recipe = load_in_worker
    store = build_datastore([tmp_path / "many.jsonl"], tmp_path / "store", embedder, options=BuildOptions(processes=2))
    assert embedder.embedded == []
    assert store.captions == [record["caption"] for record in records]
    np.testing.assert_allclose(store.embeddings, WordEmbedder().embed(store.captions), atol=1e-6)
