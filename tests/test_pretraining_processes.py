"""`recap pretrain` as its users start it: killed and resumed, and in two processes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretraining_run import TINY
from test_training_processes import kill_at_step, recap
from training_parts import write_clotho

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    write_clotho(folder / "clotho", train=13, validation=4)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def flags(start: Path, stage: str, output: Path, *more: str) -> list[str]:
    settings = {
        "--dataset": "clotho",
        "--data-dir": start / "clotho",
        "--output-dir": output,
        "--vocab-size": 400,
        "--learning-rate": 3e-3,
        "--warmup-steps": 1,
        "--logging-steps": 1,
        "--save-steps": 3,
        "--device": "cpu",
    }
    if stage == "clap":
        settings |= {"--clap-config": start / "tiny.json", "--feature-cache": start / "mels", "--batch-size": 6}
        settings |= {"--num-train-epochs": 6, "--random-gain-db": 6, "--mask-frames": 50}
    else:
        settings |= {"--num-layers": 1, "--width": 32, "--num-heads": 2, "--max-positions": 256}
        settings |= {"--batch-size": 11, "--num-train-epochs": 2}
    return ["pretrain", stage, *(str(part) for pair in settings.items() for part in pair), *more]


@pytest.mark.parametrize("stage", ["clap", "language-model"])
def test_killed_and_resumed(start: Path, stage: str):
    """Twelve steps each; with dropout, which is keyed by the step."""
    whole, killed = start / f"{stage}-whole", start / f"{stage}-killed"
    recap(*flags(start, stage, whole, "--dropout", "0.1"))
    for step in sorted(random.Random(3).sample(range(2, 12), 2)):
        kill_at_step(step, *flags(start, stage, killed, "--dropout", "0.1", "--resume"))
    recap(*flags(start, stage, killed, "--dropout", "0.1", "--resume"))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, killed)]
    assert reports[0]["steps"] == 12
    for name in ("losses", "evaluations"):
        assert reports[0][name] == reports[1][name]


@pytest.mark.parametrize("stage", ["clap", "language-model"])
def test_two_processes_give_the_losses_of_one(start: Path, stage: str):
    one, two = start / f"{stage}-one", start / f"{stage}-two"
    recap(*flags(start, stage, one))
    result = recap(*flags(start, stage, two, "--num-processes", "2"))
    assert "World size 2" in result.stderr
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert [report["machine"]["world_size"] for report in reports] == [1, 2]
    for name in ("losses", "evaluations"):
        for first, second in zip(reports[0][name], reports[1][name], strict=True):
            assert first == pytest.approx(second, abs=1e-4 if name == "losses" else 1e-3)
