"""Captions as Parquet: every value comes back, whatever the rows hold."""

from __future__ import annotations

import json

import pyarrow.parquet

from recap_hf.hub.parquet import write_parquet


def test_rows_come_back_in_order_across_files(tmp_path):
    records = [{"caption": f"caption {row}", "clip_id": str(row)} for row in range(7)]
    assert write_parquet(records, tmp_path, rows_per_file=3) == ["caption", "clip_id"]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"train-0000{part}-of-00003.parquet" for part in range(3)]
    assert pyarrow.parquet.read_table(tmp_path).to_pylist() == records


def test_the_same_rows_give_the_same_bytes(tmp_path):
    records = [{"caption": "rain", "source": "a"}, {"caption": "wind", "year": 2020}]
    write_parquet(records, tmp_path / "first")
    write_parquet([dict(reversed(record.items())) for record in records], tmp_path / "second")
    first, second = (next((tmp_path / name).iterdir()).read_bytes() for name in ("first", "second"))
    assert first == second


def test_columns_of_every_kind(tmp_path):
    records = [
        {"caption": "é ü 犬", "number": 1, "score": 1, "mixed": 1, "tags": ["a", "b"], "big": 2**70, "flag": True},
        {"caption": "b", "score": 0.5, "mixed": "x", "nested": {"b": 1, "a": [2]}, "tags": [], "none": None},
    ]
    columns = write_parquet(records, tmp_path, rows_per_file=1)
    assert columns == ["caption", "big", "flag", "mixed", "nested", "number", "score", "tags"]
    rows = pyarrow.parquet.read_table(tmp_path).to_pylist()
    assert [row["caption"] for row in rows] == ["é ü 犬", "b"]
    assert [row["score"] for row in rows] == [1.0, 0.5]
    assert [row["tags"] for row in rows] == [["a", "b"], []]
    assert [(row["number"], row["flag"]) for row in rows] == [(1, True), (None, None)]
    # Without a common type: JSON texts.
    assert [json.loads(row["mixed"]) for row in rows] == [1, "x"]
    assert json.loads(rows[0]["big"]) == 2**70
    assert json.loads(rows[1]["nested"]) == {"b": 1, "a": [2]}


def test_a_datastore_without_captions(tmp_path):
    assert write_parquet([], tmp_path) == []
    assert pyarrow.parquet.read_table(tmp_path).num_rows == 0
