"""The benchmark of training at a small size: both sides train on the same captions."""

from __future__ import annotations

import json
from pathlib import Path

from training_parts import captions_of

from benchmarks.training import main


def test_both_sides_have_the_same_loss(tmp_path: Path, capsys):
    rows = [f'clip {clip}.wav,"{text}"' for clip in range(16) for text in captions_of(clip)]
    (tmp_path / "captions.csv").write_text("file_name,caption\n" + "\n".join(rows) + "\n")
    flags = [
        "--batch-size",
        "2",
        "--steps",
        "1",
        "--reference-steps",
        "1",
        "--layers",
        "1",
        "--width",
        "48",
        "--output",
    ]
    assert main([str(tmp_path / "captions.csv"), *flags, str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    sides = [(row["side"], row["dtype"]) for row in result["settings"]]
    ours = ("ours", "ours, shared prompt")
    assert sides == [("reference", "fp32"), *((side, dtype) for side in ours for dtype in ("fp32", "bf16"))]
    for row in result["settings"][1:]:
        # bfloat16 keeps eight bits.
        assert row["loss_difference"] < (1e-5 if row["dtype"] == "fp32" else 1e-3)
    assert sum(line.startswith(ours) for line in capsys.readouterr().out.splitlines()) == 4
