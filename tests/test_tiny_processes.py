"""`recap tiny clap` as its users start it: in one process or in two, and resumed by another number of them."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recap_hf.cli import main
from recap_hf.tiny.lexicon import HEARD
from recap_hf.tiny.tokenization import train_tokenizers


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Half a second of noise of its own for each event."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "event", "fold", "source"])
        for event in HEARD:
            soundfile.write(folder / f"{event}.wav", rng.uniform(-0.3, 0.3, 8000), 16000)
            writer.writerow([f"{event}.wav", event, 1, "test"])
    return folder


def _gradients(sounds: Path, work_dir: Path, *runs: tuple) -> dict[int, torch.Tensor]:
    """AdamW's running means of the gradients after two steps that were made in some runs."""
    train_tokenizers(work_dir / "tokenizers", vocab_size=500, sentences=30)
    flags = ["--sounds", str(sounds), "--work-dir", str(work_dir), "--folds", "1", "--steps", "2", "--threads", "1"]
    for more in runs:
        assert main(["tiny", "clap", *flags, "--device", "cpu", *map(str, more)]) == 0
    state = torch.load(work_dir / "clap" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    return {key: value["exp_avg"] for key, value in state["optimizer"]["state"].items()}


def test_two_processes_train_what_one_trains(sounds, tmp_path, capfd):
    """A step hears the same 64 mixtures either way; what differs is the order in which gradients are added."""
    threads = torch.get_num_threads()
    try:
        alone = _gradients(sounds, tmp_path / "one", ())
        assert capfd.readouterr().out == f"{tmp_path / 'one' / 'clap'}\n"
        together = _gradients(sounds, tmp_path / "two", ("--num-processes", 2, "--stop-after", 1), ())
        assert capfd.readouterr().out == f"{tmp_path / 'two' / 'clap'}\n" * 2
    finally:
        torch.set_num_threads(threads)
    assert alone.keys() == together.keys()
    largest = max(value.abs().max() for value in alone.values())
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=0.02, atol=1e-4 * float(largest))
    assert (tmp_path / "two" / "clap" / "model.safetensors").is_file()


_THREE_STEPS = """
import sys
import torch
from recap_hf.tiny.trainer import TrainConfig, train

torch.set_num_threads(1)
torch.manual_seed(0)
module = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("used", "once", "never")})

def loss_of(rng, step):
    features = torch.from_numpy(rng.normal(size=(8, 4))).float()
    layer = module["once" if step == 0 and features[0, 0] > 0.5 else "used"]
    return (layer(features) - 1).square().mean(), {}

config = TrainConfig(3, 0.1, warmup_steps=1, weight_decay=0.5, batches_per_step=2, one_batch_from=1)
train(module, loss_of, config, sys.argv[1], "three")
"""


def test_a_process_without_a_batch_and_a_layer_without_a_gradient(tmp_path):
    """Three steps, of which the last two are one batch, on one process and on two.

    Of the two batches of the first step, one uses a layer that the other does not; a third layer is never used, and
    must not decay.
    """
    states = []
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        checkpoint = tmp_path / f"{world}.pt"
        command = [sys.executable, "-c", _THREE_STEPS, str(checkpoint)]
        started = [
            subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""})
            for rank in range(world)
        ]
        assert [process.wait(timeout=120) for process in started] == [0] * world
        states.append(torch.load(checkpoint, weights_only=True))
    alone, together = (state["module"] for state in states)
    torch.testing.assert_close(together, alone)
    torch.manual_seed(0)
    before = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("used", "once", "never")}).state_dict()
    unchanged = {key for key, value in before.items() if torch.equal(value, together[key])}
    assert unchanged == {"never.weight", "never.bias"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-processes", "3"), "--num-processes 3: a step has 2 batches, one for each process at most"),
        (("--num-processes", "2", "--device", "cuda:1"), "torch sees no GPU"),
        (("--num-processes", "2", "--device", "meta"), "--device meta is one"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_processes_that_cannot_be_had(sounds, tmp_path, capsys, flags, message):
    flags = ["--sounds", str(sounds), "--work-dir", str(tmp_path), *flags]
    assert main(["tiny", "clap", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
