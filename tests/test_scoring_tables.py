"""Predictions and references in the shapes in which people keep them."""

from __future__ import annotations

import json

import pytest

from recap_hf.scoring import (
    clip_list_hash,
    match_clips,
    read_clip_list,
    read_predictions,
    read_training_captions,
    select_listed,
)
from recap_hf.scoring.tables import parse_references

EXPECTED = ["a dog barks", "it's raining"]


@pytest.mark.parametrize(
    "cell",
    [
        EXPECTED,
        json.dumps(EXPECTED),
        repr(EXPECTED),
        '["a dog barks", "it\'s raining"]',
        [{"caption": "a dog barks", "score": 0.5}, {"caption": "it's raining"}],
        json.dumps([{"caption": "a dog barks", "score": 0.5}, {"caption": "it's raining"}]),
    ],
)
def test_references_in_one_cell(cell):
    assert parse_references(cell, "here") == EXPECTED


def test_a_caption_with_a_bracket_is_a_caption():
    assert parse_references("[music] a band plays", "here") == ["[music] a band plays"]
    assert parse_references("", "here") == []


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("['a dog' 'a cat']", r"without commas between them \(a printed NumPy array\?\)"),
        ("['a dog', 'a cat'", "neither JSON nor Python"),
        ("[1, 2]", "here is 1; expected text"),
        (None, "here is None; expected text"),
        (0.5, "here is 0.5; expected text"),
    ],
)
def test_malformed_references_are_refused(cell, message):
    with pytest.raises(ValueError, match=message):
        parse_references(cell, "here")


ROWS = [
    {"clip_id": "a.wav", "prediction": "a dog barks", "references": ["dog", "a dog"], "spice": 0.25},
    {"clip_id": "b.wav", "prediction": "", "references": ["rain, rain"], "spice": 0.5},
]


def references_of(table):
    return [row["references"] for row in table]


def write(tmp_path, kind):
    path = tmp_path / f"file.{kind.split('-')[0]}"
    if kind == "csv":
        lines = ["clip_id,prediction,references,spice"]
        lines += [f'{r["clip_id"]},{r["prediction"]},"{r["references"]!r}",{r["spice"]}' for r in ROWS]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "json-columns":
        path.write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), encoding="utf-8")
    else:
        path.write_text(json.dumps({"model": "x", "predictions": ROWS}), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "json-columns", "json-nested"])
def test_every_kind_of_file_reads_the_same(tmp_path, kind):
    table = read_predictions(write(tmp_path, kind), numbers=["spice"])
    assert table == ROWS


def test_references_in_several_columns(tmp_path):
    path = tmp_path / "clotho.csv"
    path.write_text("file_name,mine,caption_1,caption_2\nx.wav,hum,a,b\ny.wav,buzz,c,\n")
    named = read_predictions(path, prediction="mine", references=["caption_1", "caption_2"])
    found = read_predictions(path, prediction="mine")
    assert named == found and references_of(found) == [["a", "b"], ["c"]]


def test_one_reference_a_row_becomes_one_clip(tmp_path):
    path = tmp_path / "audiocaps.csv"
    path.write_text("youtube_id,prediction,captions\nQ1,hum,a\nQ1,hum,b\nQ2,buzz,c\n")
    table = read_predictions(path)
    assert references_of(table) == [["a", "b"], ["c"]]
    path.write_text("youtube_id,prediction,captions\nQ1,hum,a\nQ1,buzz,b\n")
    with pytest.raises(ValueError, match="the clip 'Q1' has different predictions in its 2 rows"):
        read_predictions(path, clip_id="youtube_id")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, r"has the columns 'a', 'b'; name the one with the predictions \(--prediction-column\)"),
        ("prediction,b\n1,2\n", {}, r"name the one with the references \(--references-column\)"),
        (
            "prediction,references\n1,2\n",
            {"prediction": "c"},
            "no column 'c'; it has 'prediction', 'references'",
        ),
        ("prediction,references\nx,\n", {}, "row 1 has no reference caption in 'references'"),
        ("prediction,references\nx,y,z\n", {}, "line 2: expected 2 cells, as in the first line, got 3"),
        ("prediction,references\n", {}, "has no row"),
        ("prediction,references,spice\nx,y,high\n", {"numbers": ["spice"]}, "'high'; expected a number"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, options, message):
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(path, **options)


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_predictions(path)
    (tmp_path / "latin.csv").write_bytes("prediction,references\ncafé,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_predictions(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match=r"read from \.txt, \.csv.* files, not from '\.xlsx'"):
        read_predictions(tmp_path / "file.xlsx")


def test_captions_of_a_training_set(tmp_path, shared_dir):
    path = tmp_path / "captions.txt"
    path.write_text("a dog barks\n\n rain \n")
    assert read_training_captions(path) == ["a dog barks", "rain"]
    # 49,838 captions by the file's own description.
    assert len(read_training_captions(shared_dir / "data" / "captions" / "audiocaps_train.csv")) == 49_838


def test_clips_are_matched_by_name_then_by_folding():
    first = ["Santa Motor.wav", "watering_can.wav", "Watering Can.wav", "only here.wav"]
    second = ["evaluation/watering_can.npy", "Santa_Motor.wav", "watering-can.wav"]
    # `Watering Can` and `watering-can` are the only ones left under their folding; nothing else may pair.
    assert match_clips(first, second) == [(0, 1), (1, 0), (2, 2)]
    assert match_clips(["Train_1", "train-1"], ["TRAIN 1"]) == []


def test_youtube_names_are_matched_on_request():
    first, second = ["7fmOlUlwoNg_20.flac", "6BJ455B1aAs_0.flac"], ["Y6BJ455B1aAs.wav", "Y7fmOlUlwoNg.wav"]
    assert match_clips(first, second) == []
    assert match_clips(first, second, youtube=True) == [(0, 1), (1, 0)]


def test_folders_may_hold_clips_of_one_name():
    assert match_clips(["dog/1.wav", "cat/1.wav"], ["cat/1.wav", "dog/1.wav"]) == [(0, 1), (1, 0)]
    assert match_clips(["dog/1.wav", "cat/1.wav"], ["1.flac"]) == []


def test_a_clip_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"the clip 'a\.wav' is named twice"):
        match_clips(["a.wav", "b", "a.wav"], ["a"])


def test_same_names_in_different_folders_stay_apart(tmp_path):
    path = tmp_path / "folders.csv"
    path.write_text("file_name,prediction,captions\ndog/1.wav,hum,a\ncat/1.wav,hum,b\n")
    table = read_predictions(path)
    assert references_of(table) == [["a"], ["b"]]
    assert [row["clip_id"] for row in table] == ["dog/1.wav", "cat/1.wav"]


def test_hash_tells_lists_apart_not_spellings():
    assert clip_list_hash(["Santa Motor.wav", "b"]) == clip_list_hash(["b.flac", "dev/Santa_Motor"])
    assert clip_list_hash(["a", "b"]) != clip_list_hash(["a"])


def test_restriction_to_a_list(tmp_path, shared_dir):
    path = tmp_path / "short.txt"
    path.write_text("# three clips\nb.wav\nc.wav\nz.wav\n")
    assert read_clip_list(path) == ["b.wav", "c.wav", "z.wav"]
    positions, notes = select_listed(["a.flac", "b.flac", "c.flac"], path, "here")
    assert positions == [1, 2]
    assert notes == [
        "1 of the 3 clips of the list short are not in here (first: z.wav)",
        "1 clips of here are not on the list short and were left out",
    ]
    with pytest.raises(ValueError, match="none of the 1 clips of here is on the list short"):
        select_listed(["q"], path, "here")
    # RECAP's AudioCaps test list has 748 clips, five rows each.
    assert len(read_clip_list(shared_dir / "data" / "captions" / "recap_test_audiocaps.csv")) == 748
