"""Every kind of dataset goes into one run: as published, with mapped columns, from Parquet, joined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_parts import captions_of, make_captioner, write_clip, write_clotho

from recap_cli import build_parser
from recap_hf.training.config import load_config
from recap_hf.training.run import train
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Seven datasets of two clips each, one in every layout."""
    folder = tmp_path_factory.mktemp("datasets")
    model, processor = make_captioner()
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    write_clotho(folder / "clotho", train=2, validation=1)
    _audiocaps(folder / "audiocaps", 10)
    _wavcaps(folder / "wavcaps", 20)
    _recap(folder / "recap", 30)
    for kind, first in (("csv", 40), ("jsonl", 50), ("parquet", 60)):
        _audiofolder(folder / kind, kind, first)
    _parquet_of_bytes(folder / "hub", 70)
    return folder


def _audiocaps(folder: Path, first: int) -> None:
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for number in (first, first + 1):
        youtube_id = f"{number:011d}"
        write_clip(folder / f"Y{youtube_id}_30.wav", number)
        lines.append(f'{number},{youtube_id},30,"{captions_of(number)[0]}"')
    (folder / "train.csv").write_text("\n".join(lines) + "\n")


def _wavcaps(folder: Path, first: int) -> None:
    rows = [{"id": str(number), "caption": captions_of(number)[0]} for number in (first, first + 1)]
    (folder / "json_files").mkdir(parents=True)
    (folder / "json_files" / "bbc_final.json").write_text(json.dumps({"data": rows}))
    for number in (first, first + 1):
        write_clip(folder / "waveforms" / f"{number}.flac", number)


def _recap(folder: Path, first: int) -> None:
    lines = [",file_name,caption_num,caption,abstract_captions"]
    for number in (first, first + 1):
        write_clip(folder / "audio" / f"{number}.wav", number)
        lines.append(f'0,{number}.wav,caption_1,"{captions_of(number)[0]}","[[\'A.\']]"')
    (folder / "recap_train_clotho.csv").write_text("\n".join(lines) + "\n")


def _audiofolder(folder: Path, kind: str, first: int) -> None:
    from datasets import Dataset

    names = [f"{number}.wav" for number in (first, first + 1)]
    for number, name in zip((first, first + 1), names, strict=True):
        write_clip(folder / name, number)
    table = Dataset.from_dict({"file_name": names, "caption": [captions_of(n)[0] for n in (first, first + 1)]})
    target = str(folder / f"metadata.{kind}")
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](target)


def _parquet_of_bytes(folder: Path, first: int) -> None:
    """As the Hub serves a dataset."""
    from datasets import Audio, Dataset

    contents = [write_clip(folder.parent / f"{number}.wav", number).read_bytes() for number in (first, first + 1)]
    rows = {"audio": [{"path": f"{n}.wav", "bytes": content} for n, content in enumerate(contents)]}
    rows["caption"] = [captions_of(number)[:3] for number in (first, first + 1)]
    folder.mkdir()
    Dataset.from_dict(rows).cast_column("audio", Audio(decode=False)).to_parquet(folder / "train.parquet")


def run(start: Path, output: Path, *flags: object) -> dict:
    base = [
        "train",
        "--model",
        start / "untrained",
        "--output-dir",
        output,
        "--max-steps",
        1,
        "--device",
        "cpu",
        "--num-workers",
        0,
    ]
    args = build_parser("train").parse_args([str(flag) for flag in (*base, *flags)])
    return train(load_config(args, CaptionerTrainingConfig))


def test_all_of_them_joined(start: Path, tmp_path: Path):
    flags: list[object] = ["--validation-share", "0.2"]
    for name in ("clotho", "audiocaps", "wavcaps", "recap"):
        flags += ["--dataset", name, "--data-dir", start / name]
    for kind in ("csv", "jsonl", "parquet"):
        flags += ["--dataset", "audiofolder", "--data-dir", start / kind]
    report = run(start, tmp_path, *flags, "--dataset", start / "hub")
    splits = report["data"]["splits"]
    assert splits["train"]["clips"] + splits["validation"]["clips"] == 16
    assert splits["train"]["captions"] + splits["validation"]["captions"] == 2 * 5 + 2 * 3 + 6 * 2
    names = {source["name"] for source in report["data"]["sources"]}
    # At a fifth for validation, a dataset of two clips may be there as a whole, but no more than one of them is.
    assert len(names & {"clotho", "audiocaps", "wavcaps-bbc", "recap-clotho", "csv", "jsonl", "parquet"}) >= 6


def test_columns_under_other_names(start: Path, tmp_path: Path):
    from datasets import Audio, Dataset

    table = Dataset.from_parquet(str(start / "hub" / "train.parquet"))
    table = table.cast_column("audio", Audio(decode=False)).rename_columns({"audio": "sound", "caption": "text"})
    (tmp_path / "mine").mkdir()
    table.to_parquet(tmp_path / "mine" / "train.parquet")
    flags = ["--dataset", tmp_path / "mine", "--validation-split", "none"]
    with pytest.raises(ValueError, match="map it: --columns audio=YOURS caption=YOURS"):
        run(start, tmp_path / "out", *flags)
    report = run(start, tmp_path / "out", *flags, "--columns", "audio=sound", "caption=text")
    assert report["data"]["splits"]["train"]["captions"] == 6
