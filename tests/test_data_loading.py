"""Loaders of the published layouts, on folders of a few rows, and on the real caption files where they are at hand."""

from __future__ import annotations

import json
import re
import wave
from collections import Counter
from pathlib import Path

import pytest

from recap_hf.data import CaptionData, LoadOptions, join, load_captions
from recap_hf.data.general import from_dataset
from recap_hf.data.published import parse_abstract_captions, parse_youtube_name
from recap_hf.modeling.retrieval_recap import normalize_clip_id


def write_wav(path: Path, samples: int = 80) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(2 * samples))
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def counts(data: CaptionData) -> dict[str, int]:
    captions = sum(map(len, data.dataset["captions"]))
    return {"clips": len(data.dataset), "captions": captions, **Counter(problem.kind for problem in data.problems)}


@pytest.fixture
def clotho_folder(tmp_path: Path) -> Path:
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    rows = 'Rain on a roof.wav,a,"b, with comma",c,d,e\nnull.wav,NA,None,nan,d,\n'
    write(tmp_path / "clotho_captions_development.csv", header + rows)
    write_wav(tmp_path / "development" / "Rain on a roof.wav")
    write_wav(tmp_path / "development" / "null.wav")
    return tmp_path


def test_clotho_as_published(clotho_folder: Path):
    data = load_captions("clotho", clotho_folder)
    assert data.dataset.column_names == [
        *("clip_id", "audio", "captions", "split", "source", "licence"),
        *("classes", "class_scores"),
    ]
    assert data.dataset["clip_id"][:] == ["Rain on a roof.wav", "null.wav"]
    assert data.dataset[0]["captions"] == ["a", "b, with comma", "c", "d", "e"]
    assert data.dataset[0]["audio"]["path"] == str(clotho_folder / "development" / "Rain on a roof.wav")
    # Words that pandas would read as missing values are captions like any other, but for "nan".
    assert data.dataset[1]["captions"] == ["NA", "None", "d"]
    assert counts(data) == {"clips": 2, "captions": 8, "empty-caption": 2}
    assert set(data.dataset["split"]) == {"train"}


def test_split_words_of_every_dataset(clotho_folder: Path):
    assert load_captions("clotho", clotho_folder, split="development").dataset[0]["split"] == "train"
    with pytest.raises(FileNotFoundError, match=re.escape("clotho_captions_evaluation.csv")):
        load_captions("clotho", clotho_folder, split="evaluation")
    with pytest.raises(ValueError, match=r"dataset 'cloto' is unknown: expected clotho, .* or a file or folder"):
        load_captions("cloto")
    with pytest.raises(ValueError, match="unknown split 'evalution'"):
        load_captions("clotho", clotho_folder, split="evalution")


def test_clotho_missing_clip_stops_unless_allowed(clotho_folder: Path):
    (clotho_folder / "development" / "null.wav").unlink()
    message = (
        "1 clips have no audio file, 1 have (no audio file null.wav). To go on without them, give --allow-missing"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_captions("clotho", clotho_folder)
    data = load_captions("clotho", clotho_folder, allow_missing=True)
    assert [(p.clip_id, p.kind) for p in data.problems] == [("null.wav", "missing")]
    assert len(data.dataset) == 1


def test_column_errors_teach(tmp_path: Path):
    write(tmp_path / "metadata.csv", "path,text\nx.wav,a dog barks\n")
    write_wav(tmp_path / "x.wav")
    message = (
        "has the columns 'path', 'text'. Expected: file_name (path of the audio file, from the metadata file); "
        "caption (the caption, or a list of them). Not found: 'file_name', 'caption'. If the same thing stands under "
        "another name, map it: --columns file_name=YOURS caption=YOURS"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_captions("audiofolder", tmp_path)
    data = load_captions("audiofolder", tmp_path, columns={"file_name": "path", "caption": "text"})
    assert data.dataset[0]["captions"] == ["a dog barks"]
    with pytest.raises(ValueError, match=re.escape("the mapping caption=words names none of them")):
        load_captions("audiofolder", tmp_path, columns={"file_name": "path", "caption": "words"})


@pytest.mark.parametrize(
    ("stem", "youtube_id", "start"),
    [
        ("7fmOlUlwoNg", "7fmOlUlwoNg", None),
        ("Y7fmOlUlwoNg", "7fmOlUlwoNg", None),
        ("7fmOlUlwoNg_20", "7fmOlUlwoNg", 20.0),
        ("Y7fmOlUlwoNg_20000_30000", "7fmOlUlwoNg", 20000.0),
        ("YU-_UXSaFCQ_130.000", "YU-_UXSaFCQ", 130.0),
    ],
)
def test_youtube_names(stem: str, youtube_id: str, start: float | None):
    assert (youtube_id, start) in parse_youtube_name(stem)


def test_audiocaps_finds_every_naming(tmp_path: Path):
    ids = ["7fmOlUlwoNg", "6BJ455B1aAs", "GOD8Bt5LfDE", "Yabcdefghi0", "-bcdefghij_"]
    rows = "".join(f'{number},{name},{number * 10},"caption {number}"\n' for number, name in enumerate(ids))
    write(tmp_path / "train.csv", "audiocap_id,youtube_id,start_time,caption\n" + rows)
    files = ["Y7fmOlUlwoNg.wav", "6BJ455B1aAs_10.flac", "YGOD8Bt5LfDE_20000_30000.wav", "Yabcdefghi0.wav"]
    for name in files:
        write_wav(tmp_path / "audio" / name)
    write_wav(tmp_path / "audio" / "-bcdefghij__90.wav")
    data = load_captions("audiocaps", tmp_path, allow_missing=True)
    assert [Path(audio["path"]).name for audio in data.dataset["audio"]] == files
    # The fifth clip is there, but from 90 s and not from 40 s: another clip.
    assert [(p.clip_id, p.detail) for p in data.problems] == [
        ("-bcdefghij_", "no audio of YouTube id -bcdefghij_ from 40 s")
    ]


def test_audiocaps_rows_of_one_clip_are_merged(tmp_path: Path):
    rows = "1,7fmOlUlwoNg,20,one\n2,7fmOlUlwoNg,20,two\n"
    write(tmp_path / "val.csv", "audiocap_id,youtube_id,start_time,caption\n" + rows)
    write_wav(tmp_path / "7fmOlUlwoNg.wav")
    data = load_captions("audiocaps", tmp_path, split="validation")
    assert data.dataset["captions"][:] == [["one", "two"]]


def test_recap_csv_folds_clip_names(tmp_path: Path):
    header = ",file_name,caption_num,caption,abstract_captions\n"
    row = "0,Distorted_AM_Radio_noise.wav,caption_1,a muddled noise.,\"[['A.', 'B.'], ['C.', 'A.']]\"\n"
    write(tmp_path / "recap_train_clotho.csv", header + row)
    write_wav(tmp_path / "audio" / "Distorted AM Radio noise.wav")
    data = load_captions("recap", tmp_path)
    assert Path(data.dataset[0]["audio"]["path"]).name == "Distorted AM Radio noise.wav"
    assert data.dataset[0]["source"] == "recap-clotho"


def test_abstract_captions():
    assert parse_abstract_captions("[['A.', 'B.'], ['C.', 'A.']]") == ["A.", "B.", "C."]
    with pytest.raises(ValueError, match="expected a list of lists"):
        parse_abstract_captions("__import__('os')")


def test_wavcaps_json(tmp_path: Path):
    rows = {
        "num_captions_per_audio": 1,
        "data": [{"id": "NHU1", "caption": "Birds."}, {"id": "2", "caption": "Rain."}],
    }
    write(tmp_path / "json_files" / "bbc_final.json", json.dumps(rows))
    write_wav(tmp_path / "waveforms" / "NHU1.flac")
    data = load_captions("wavcaps", tmp_path, allow_missing=True)
    assert data.dataset[0]["clip_id"] == "NHU1"
    assert data.dataset[0]["source"] == "wavcaps-bbc"
    assert [p.clip_id for p in data.problems] == ["2"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_audiofolder_metadata_kinds(tmp_path: Path, kind: str):
    from datasets import Dataset

    table = Dataset.from_dict({"file_name": ["a.wav", "b.wav"], "caption": ["x", "y"], "split": ["train", "dev"]})
    target = str(tmp_path / f"metadata.{kind}")
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](target)
    for name in ("a.wav", "b.wav"):
        write_wav(tmp_path / name)
    assert load_captions("audiofolder", tmp_path).dataset["clip_id"][:] == ["a.wav"]
    assert load_captions("audiofolder", tmp_path, split="validation").dataset["clip_id"][:] == ["b.wav"]


def test_dataset_in_memory_with_mapping(tmp_path: Path):
    from datasets import Audio, Dataset

    path = write_wav(tmp_path / "clip.wav")
    sounds = [{"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}]
    table = Dataset.from_dict({"sound": sounds, "text": [["a", "b"], ["c"]]})
    table = table.cast_column("sound", Audio(decode=False))
    data = from_dataset(table, LoadOptions(columns={"audio": "sound", "caption": "text"}), source="mine")
    assert data.dataset["captions"][:] == [["a", "b"], ["c"]]
    assert data.dataset["clip_id"][:] == ["clip.wav", "mine-1"]
    assert data.dataset[1]["audio"]["bytes"] == path.read_bytes()


def test_dataset_in_a_folder_of_parquet(tmp_path: Path):
    """As the Hub serves them: audio as bytes in Parquet, a split by another name, several captions in columns."""
    from datasets import Audio, Dataset

    content = write_wav(tmp_path / "clip.wav").read_bytes()
    rows = {
        "sound": [{"path": f"{n}.wav", "bytes": content} for n in "ab"],
        "caption_1": ["x", "y"],
        "caption_2": ["z", ""],
    }
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows).cast_column("sound", Audio(decode=False)).to_parquet(tmp_path / "data" / "dev.parquet")
    data = load_captions(str(tmp_path / "data"), split="validation", columns={"audio": "sound"})
    assert data.dataset["captions"][:] == [["x", "z"], ["y"]]
    assert data.dataset["clip_id"][:] == ["a.wav", "b.wav"]
    assert data.dataset[0]["audio"]["bytes"] == content
    with pytest.raises(ValueError, match="none of them is a test split"):
        load_captions(str(tmp_path / "data"), split="test")
    with pytest.raises(ValueError, match=re.escape("Not found: 'audio'")):
        load_captions(str(tmp_path / "data"), split="validation")


def test_join_keeps_one_schema(clotho_folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    write(other / "metadata.csv", "file_name,caption\nx.wav,a dog barks\ny.wav,\n")
    write_wav(other / "x.wav")
    write_wav(other / "y.wav")
    both = join([load_captions("clotho", clotho_folder), load_captions("audiofolder", other)])
    assert counts(both) == {"clips": 3, "captions": 9, "empty-caption": 3}
    assert both.dataset["source"][:] == ["clotho", "clotho", "other"]


def test_unparsable_table_names_the_file(tmp_path: Path):
    write(tmp_path / "metadata.jsonl", "{not json\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'metadata.jsonl'}, line 1: not readable as JSON")):
        load_captions("audiofolder", tmp_path)


def test_real_caption_files(shared_dir: Path):
    """Row counts of the published files, as the notes beside them give them."""
    folder = shared_dir / "data" / "captions"
    train = load_captions("audiocaps", folder, needs_audio=False)
    assert counts(train)["clips"] == counts(train)["captions"] == 49_838
    val = load_captions("audiocaps", folder, split="val", needs_audio=False)
    assert (counts(val)["clips"], counts(val)["captions"]) == (495, 2_475)
    recap = load_captions("recap", folder / "recap_train_clotho.csv", needs_audio=False)
    assert (counts(recap)["clips"], counts(recap)["captions"]) == (2_216, 11_090)
    columns = {"file_name": "file_path"}
    clotho = load_captions("audiofolder", folder / "clotho_development_enclap.csv", columns=columns, needs_audio=False)
    assert counts(clotho)["captions"] == 19_175
    known = {normalize_clip_id(name) for name in clotho.dataset["clip_id"]}
    folded = [name for name in recap.dataset["clip_id"] if normalize_clip_id(name) in known]
    assert len(folded) >= 2_203
