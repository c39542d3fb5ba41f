"""Runs as their users start them, in processes of their own: killed, launched by Accelerate, several at once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from training_parts import ACCELERATE_LAUNCH, make_captioner, write_clotho

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    model, processor = make_captioner()
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    write_clotho(folder / "clotho", train=12, validation=5)
    return folder


def flags(start: Path, output: Path, *more: str) -> list[str]:
    settings = {
        "--dataset": "clotho",
        "--data-dir": start / "clotho",
        "--model": start / "untrained",
        "--output-dir": output,
        "--batch-size": 8,
        "--num-train-epochs": 3,
        "--learning-rate": 5e-3,
        "--logging-steps": 1,
        "--save-steps": 4,
        "--audio-dropout": 0.3,
        "--draw-from": 15,
        "--dropout": 0.1,
        "--num-workers": 1,
        "--device": "cpu",
    }
    return [str(part) for pair in settings.items() for part in pair] + list(more)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def recap_train(*arguments: str) -> subprocess.CompletedProcess:
    return recap("train", *arguments)


def recap(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recap_cli", *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result


def kill_at_step(step: int, *arguments: str) -> None:
    """Start a run and kill it as soon as it has logged `step`."""
    command = [sys.executable, "-m", "recap_cli", *arguments]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if re.search(rf" step {step}/", line):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


def test_killed_at_random_steps_and_resumed(start: Path):
    """60 captions in steps of 8 are 8 steps an epoch, 24 in all."""
    recap_train(*flags(start, start / "whole"))
    steps = sorted(random.Random(5).sample(range(2, 24), 3))
    for step in steps:
        kill_at_step(step, "train", *flags(start, start / "killed", "--resume"))
    recap_train(*flags(start, start / "killed", "--resume"))
    whole, killed = (load_file(start / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    reports = [json.loads((start / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0]["losses"] == reports[1]["losses"]


def test_two_processes_give_the_losses_of_one(start: Path):
    # Dropout draws differ between processes, so the comparison is without it.
    more = ("--dropout", "0")
    recap_train(*flags(start, start / "one", *more))
    result = recap_train(*flags(start, start / "two", "--num-processes", "2", *more))
    assert "World size 2, 1 torch threads each" in result.stderr
    one, two = (json.loads((start / name / "report.json").read_text()) for name in ("one", "two"))
    assert (one["machine"]["world_size"], two["machine"]["world_size"]) == (1, 2)
    for first, second in zip(one["losses"], two["losses"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
    for first, second in zip(one["evaluations"], two["evaluations"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
    # Both encoded their share: every clip once.
    assert two["data"]["splits"]["train"]["clips_encoded"] == 12


def test_an_error_in_processes_has_no_traceback(start: Path):
    (start / "broken").mkdir()
    (start / "broken" / "clotho_captions_development.csv").write_text("file_name,caption_1\nnothing.wav,a dog\n")
    arguments = flags(start, start / "none", "--num-processes", "2")
    arguments[arguments.index("--data-dir") + 1] = str(start / "broken")
    command = [sys.executable, "-m", "recap_cli", "train", *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    named = [line for line in lines if line.startswith("recap train: error: ") and str(start / "broken") in line]
    assert named, result.stderr
    assert re.fullmatch("recap train: error: process [01] of 2 ended with exit code 1", lines[-1])
    assert "Traceback" not in result.stderr


def test_accelerate_launch_starts_the_same_run(start: Path):
    command = [*ACCELERATE_LAUNCH]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no", str(REPOSITORY / "train.py")]
    command += flags(start, start / "launched", "--max_train_steps", "2")
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((start / "launched" / "report.json").read_text())
    assert report["steps"] == 2
    # Not given to us, so the launcher's holds.
    assert report["machine"]["mixed_precision"] == "bf16"


def test_torchrun_with_another_number_of_processes_is_refused(start: Path):
    command = [sys.executable, "-m", "recap_cli", "train", *flags(start, start / "x", "--num-processes", "2")]
    result = subprocess.run(
        command, env=environment(WORLD_SIZE="1"), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert "--num-processes 2, but this was launched as 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failing_process_ends_the_others(start: Path):
    command = [sys.executable, "-m", "recap_cli", "train"]
    command += flags(start, start / "y", "--num-processes", "2", "--datastore", str(start / "nowhere"))
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert re.search(r"^recap train: error: .*nowhere", result.stderr, re.MULTILINE)


def test_push_to_hub_at_the_end(start: Path, tmp_path: Path):
    """Over HTTP, with the real client, against the test Hub; then pulled from there."""
    (tmp_path / "home").mkdir()
    with HubServer() as hub:
        command = [sys.executable, "-m", "recap_cli", "train", *flags(start, tmp_path / "out", "--max-steps", "1")]
        command += ["--push_to_hub", "--hub_model_id", "user/trained", "--hub_datastore_id", "user/captions"]
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables |= hub.environment(tmp_path / "home", "hf_owner") | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        code = (
            "from recap_hf import RecapProcessor; print(len(RecapProcessor.from_pretrained('user/trained').datastore))"
        )
        pulled = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
        )
        assert pulled.stdout.strip() == "60", pulled.stderr


def test_bfloat16_trains_close_to_float32(start: Path):
    more = ("--dropout", "0", "--max-steps", "6")
    recap_train(*flags(start, start / "fp32", *more))
    recap_train(*flags(start, start / "bf16", *more, "--mixed_precision", "bf16"))
    fp32, bf16 = (json.loads((start / name / "report.json").read_text()) for name in ("fp32", "bf16"))
    assert bf16["machine"]["mixed_precision"] == "bf16"
    for first, second in zip(fp32["losses"], bf16["losses"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-2)
    assert [entry["loss"] for entry in fp32["losses"]] != [entry["loss"] for entry in bf16["losses"]]
