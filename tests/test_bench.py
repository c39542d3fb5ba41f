"""`recap bench`: what it reports, that it checks the captions; never how fast."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import synthetic_clip
from transformers import GenerationMixin

from recap_hf.cli import main
from recap_hf.modeling.cache_name_recap import CACHE
from recap_hf.speed.workload import BenchmarkOptions, make_workload


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tiny_processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def recordings(tmp_path):
    paths = []
    for seed, seconds in enumerate((1.0, 2.5, 0.6)):
        paths.append(str(tmp_path / f"{seed}.wav"))
        soundfile.write(paths[-1], synthetic_clip(seconds, seed, 16_000), 16_000)
    return paths


def bench(capsys, *args):
    threads = torch.get_num_threads()
    try:
        status = main(["bench", *map(str, args), "--format", "json", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
    return status, json.loads(capsys.readouterr().out)


def test_speed(capsys, checkpoint, recordings, tmp_path):
    status, report = bench(
        capsys, "--model", checkpoint, "--audio", *recordings, "--batch-sizes", 1, 2, "--new-tokens", 4,
        "--max-minutes", 0.001, "--output", tmp_path / "report.json",
    )  # fmt: skip
    assert status == 0 and report["identical_captions"] is True
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [(row["dtype"], row["batch"]) for row in report["settings"]] == [
        (dtype, batch) for dtype in ("float32", "bfloat16", "int8") for batch in (1, 2)
    ]
    for row in report["settings"]:
        assert row["reference"] > 0 and row["recap"] > 0 and 0 <= row["identical"] <= 1
        assert row["ratio"] == pytest.approx(row["recap"] / row["reference"], rel=1e-6) or report["rounds"] > 1
    main_row = next(row for row in report["settings"] if (row["dtype"], row["batch"]) == ("float32", 2))
    assert report["ratio"] == main_row["ratio"]
    stages = {"decode_file", "resample", "mel", "encode", "retrieve", "prompt", "prefill", "decode_steps"}
    assert [row["path"] for row in report["stages"]] == ["reference", "recap", "recap", "recap"]
    assert all({f"{stage}_ms" for stage in stages} <= row.keys() for row in report["stages"])


def test_another_caption_is_reported(capsys, checkpoint, monkeypatch):
    from recap_hf.speed.workload import ReferencePath

    caption = ReferencePath.caption
    monkeypatch.setattr(ReferencePath, "caption", lambda self, waveform: caption(self, waveform) + "!")
    arguments = ("--model", checkpoint, "--batch-sizes", 2, "--clips", 2, "--dtypes", "float32", "--new-tokens", 3)
    assert main(["bench", *map(str, arguments), "--max-minutes", "0.001", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "OTHER CAPTIONS" in printed.out and "other captions" in printed.err


def test_the_reference_is_transformers_alone(checkpoint, monkeypatch):
    workload = make_workload(BenchmarkOptions(model=str(checkpoint), clips=2, new_tokens=3))
    reference = workload.reference()
    assert reference.model is not workload.model
    caches = []
    generate = GenerationMixin.generate

    def watching(self, **kwargs):
        result = generate(self, **kwargs, return_dict_in_generate=True)
        caches.append(type(result[CACHE]).__name__)
        return result.sequences

    monkeypatch.setattr(GenerationMixin, "generate", watching)
    expected = [reference.caption(waveform) for waveform in workload.waveforms]
    assert caches == ["EncoderDecoderCache"] * 2
    monkeypatch.undo()
    assert workload.caption(workload.waveforms) == expected


def test_default_part(capsys, checkpoint, recordings):
    status, report = bench(
        capsys, "default", "--model", checkpoint, "--audio", *recordings, "--batch-sizes", 2, "--dtypes", "float32",
        "bfloat16",
    )  # fmt: skip
    assert status == 0 and report["clips"] == 3
    assert report["settings"][0]["identical"] == report["settings"][0]["same_events"] == 1.0


def test_default_part_needs_recordings(capsys, checkpoint):
    assert main(["bench", "default", "--model", str(checkpoint)]) == 1
    assert "--audio" in capsys.readouterr().err


def test_mel_part(capsys):
    status, report = bench(capsys, "mel", "--batch-sizes", 1, "--threads", 1)
    assert status == 0
    assert {(row["dtype"], row["clip_s"]) for row in report["settings"]} == {
        (dtype, seconds) for dtype in ("float32", "float64") for seconds in (1, 5, 10)
    }
    assert all(row["difference_db"] < (1e-4 if row["dtype"] == "float64" else 0.1) for row in report["settings"])


def test_steady_part(capsys, checkpoint):
    status, report = bench(
        capsys, "steady", "--model", checkpoint, "--clips", 12, "--batch-sizes", 4, "--dtypes", "float32"
    )
    assert status == 0 and report["clips"] == 12
    assert report["settings"][0]["memory_mb"] > 0


@pytest.mark.slow
def test_costs_part(capsys, checkpoint):
    status, report = bench(
        capsys, "costs", "--model", checkpoint, "--batch-sizes", 2, "--dtypes", "float32", "--new-tokens", 2
    )
    assert status == 0
    assert {row["varied"] for row in report["settings"]} == {
        "batch_size", "clip_seconds", "num_beams", "readings", "k", "datastore_size"
    }  # fmt: skip


@pytest.mark.slow
def test_startup_part(capsys):
    status, report = bench(capsys, "startup")
    assert status == 0 and "caption one recording" in [row["step"] for row in report["settings"]]
    assert all({"seconds", "usual_seconds"} <= row.keys() for row in report["settings"])


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_default_captions_real_recordings_as_transformers_alone_does(shared_dir, num_beams):
    """64 recordings of the fold that no training has seen, float32, in batches of 16."""
    import csv

    from recap_hf import default_model_path

    folder = shared_dir / "data" / "sound_events"
    with open(folder / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "5"]
    chosen = [rows[index] for index in np.linspace(0, len(rows) - 1, 64).astype(int)]
    files = tuple(str(folder / row["file_name"]) for row in chosen)
    options = BenchmarkOptions(model=str(default_model_path()), audio=files, new_tokens=0, num_beams=num_beams)
    workload = make_workload(options)
    reference = workload.reference()
    expected = [reference.caption(waveform) for waveform in workload.waveforms]
    found = []
    for start in range(0, 64, 16):
        found += workload.caption(workload.waveforms[start : start + 16])
    assert found == expected
