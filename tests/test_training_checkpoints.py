"""Checkpoints are whole or absent."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from recap_hf.training.checkpoints import Checkpoints, load_checkpoint


def state(step: int) -> dict:
    weights = {"w": torch.full((2,), float(step))}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    return {"weights": weights, "optimizer": optimizer, "scheduler": {}, "scaler": {}, "progress": {"step": step}}


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, state(step))


def test_what_is_saved_comes_back(tmp_path: Path):
    loaded = load_checkpoint(save(Checkpoints(tmp_path), 7))
    assert torch.equal(loaded["weights"]["w"], torch.tensor([7.0, 7.0]))
    assert loaded["optimizer"] == state(7)["optimizer"]
    assert loaded["progress"] == {"step": 7}


def test_only_the_last_ones_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save_best(1, {"w": torch.zeros(1)})
    for step in (3, 9, 27, 100):
        save(checkpoints, step)
    assert checkpoints.steps() == [27, 100]
    assert checkpoints.latest() == tmp_path / "checkpoint-100.pt"
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "checkpoint-100.pt", "checkpoint-27.pt"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    checkpoints.save(5, state(5) | {"progress": {"again": True}})
    assert load_checkpoint(tmp_path / "checkpoint-5.pt")["progress"] == {"again": True}
    assert os.listdir(tmp_path) == ["checkpoint-5.pt"]


def test_what_a_kill_leaves_is_no_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    checkpoints.save_best(4, {"w": torch.ones(1)})
    for name in (".checkpoint-8.pt.1.tmp", ".best.pt.1.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert checkpoints.steps() == [5]
    assert torch.equal(checkpoints.load_best(4)["w"], torch.ones(1))
    assert checkpoints.load_best(3) is None
    # The next checkpoint clears them away.
    save(checkpoints, 6)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "checkpoint-5.pt", "checkpoint-6.pt"]


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} is no checkpoint: expected a file")):
        load_checkpoint(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(4, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="no checkpoint of a training run: it holds no optimizer"):
        load_checkpoint(tmp_path / "best.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    """It is read as tensors and plain values alone."""

    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    path = save(Checkpoints(tmp_path), 1)
    torch.save(state(1) | {"optimizer": Harmful()}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged (UnpicklingError)")):
        load_checkpoint(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, share: float):
    path = save(Checkpoints(tmp_path), 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        load_checkpoint(path)
