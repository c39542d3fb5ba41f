"""The benchmark at a toy size: both sides train on the same captions, and what it prints adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_parts import captions_of

from recap_cli import main
from recap_hf.training.benchmark import (
    BenchmarkOptions,
    format_table,
    make_model,
    make_processor,
    read_clips,
    reference_length,
    run_benchmark,
)


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = [f'clip {clip}.wav,"{text}"' for clip in range(16) for text in captions_of(clip)]
    path = tmp_path / "captions.csv"
    path.write_text("file_name,caption\n" + "\n".join(rows) + "\n")
    return path


def small(path: Path, **changes) -> BenchmarkOptions:
    settings = {"batch_size": 4, "steps": 2, "reference_steps": 2, "layers": 1, "width": 48, "vocabulary": 7_000}
    return BenchmarkOptions((str(path),), **{**settings, **changes})


def test_both_sides_have_the_same_loss(captions: Path):
    report = run_benchmark(small(captions))
    (result,) = report["results"]
    assert result["clips"] == 16
    sides = [(row["side"], row["dtype"]) for row in result["settings"]]
    ours = ("ours", "ours, shared prompt")
    assert sides == [("reference", "fp32"), *((side, dtype) for side in ours for dtype in ("fp32", "bf16"))]
    for row in result["settings"][1:]:
        # bfloat16 keeps eight bits; the bound is 1e-3 for either.
        assert row["loss_difference"] < (1e-5 if row["dtype"] == "fp32" else 1e-3)
        assert row["steps"] == 2
    for row in result["settings"]:
        # Two steps of four captions each; seconds are given to the microsecond, a step takes some thousands of them.
        assert row["captions_per_s"] == pytest.approx(8 / sum(row["seconds_per_step"]), rel=1e-2)
    table = list(format_table(report))
    assert sum(line.startswith(ours) for line in table) == 4


def test_the_reference_pads_as_the_authors_do(captions: Path):
    options = small(captions)
    processor = make_processor([text for _, texts in read_clips(str(captions)) for text in texts], options)
    template = processor.tokenizer("Audios similar to this audio sounds like: . This audio sounds like:")["input_ids"]
    # Sixty tokens for each of the four captions and for the target.
    assert reference_length(processor, 4) == len(template) + 5 * 60


def test_full_size_is_gpt2_small_at_the_papers_factor(captions: Path):
    """7,094,016 trained parameters: the paper's 5.4 % of decoder and cross-attention; on the meta device."""
    import torch

    options = BenchmarkOptions((str(captions),))
    processor = make_processor(["a dog barks"], options)
    with torch.device("meta"):
        model = make_model(options, processor)
    assert sum(parameter.numel() for parameter in model.cross_attention_parameters()) == 7_094_016


def test_the_command_prints_json(captions: Path, capsys, tmp_path: Path):
    flags = ["--batch-size", "4", "--steps", "1", "--reference-steps", "1", "--layers", "1", "--width", "48"]
    flags += [
        "--dtypes",
        "fp32",
        "--reference-passes",
        "2",
        "--format",
        "json",
        "--output",
        str(tmp_path / "out.json"),
    ]
    assert main(["bench-training", str(captions), *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out.json").read_text())
    assert printed["options"]["reference_passes"] == 2


def test_a_file_without_captions_is_explained(tmp_path: Path, capsys):
    path = tmp_path / "x.csv"
    path.write_text("file_name,text\na,b\n")
    assert main(["bench-training", str(path)]) == 1
    assert "Not found: 'caption'" in capsys.readouterr().err
