"""Checkpoints are whole or absent, and batches made ahead come in order."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
import torch

from recap_hf.training.checkpoints import Checkpoints, load_checkpoint
from recap_hf.training.prefetch import prefetch


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, {"w": torch.full((2,), float(step))}, {"optimizer": {"step": step}}, {"step": step})


def test_what_is_saved_comes_back(tmp_path: Path):
    weights, state, progress = load_checkpoint(save(Checkpoints(tmp_path), 7))
    assert torch.equal(weights["w"], torch.tensor([7.0, 7.0]))
    assert state == {"optimizer": {"step": 7}}
    assert progress == {"step": 7}


def test_only_the_last_ones_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save_best({"w": torch.zeros(1)}, {"step": 1})
    for step in (3, 9, 27, 100):
        save(checkpoints, step)
    assert checkpoints.steps() == [27, 100]
    assert checkpoints.latest() == tmp_path / "checkpoint-100"
    assert sorted(os.listdir(tmp_path)) == ["best", "checkpoint-100", "checkpoint-27"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    """A resumed run passes the step of its own last checkpoint once more where the epoch ends there."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    checkpoints.save(5, {"w": torch.ones(1)}, {}, {"again": True})
    assert load_checkpoint(tmp_path / "checkpoint-5")[2] == {"again": True}
    assert os.listdir(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize("left", [".partial-checkpoint-8", ".old-checkpoint-2", ".previous-checkpoint-5"])
def test_what_a_kill_leaves_is_no_checkpoint(tmp_path: Path, left: str):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    (tmp_path / left).mkdir()
    (tmp_path / left / "progress.json").write_text("{")
    assert checkpoints.steps() == [5]
    checkpoints.clean()
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_a_best_that_was_being_replaced_is_put_back(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best({"w": torch.ones(1)}, {"step": 1})
    # Killed between the two renamings.
    os.rename(tmp_path / "best", tmp_path / ".previous-best")
    assert checkpoints.load_best() is None
    checkpoints.clean()
    assert checkpoints.load_best()[1] == {"step": 1}
    save(checkpoints, 5)
    os.rename(tmp_path / "checkpoint-5", tmp_path / ".previous-checkpoint-5")
    checkpoints.clean()
    assert checkpoints.steps() == [5]


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path):
    message = f"{tmp_path} is no checkpoint of a training run: it has no trainable.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    """The optimiser's state is read as tensors and plain values alone."""

    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    folder = save(Checkpoints(tmp_path), 1)
    torch.save({"optimizer": Harmful()}, folder / "optimizer.pt")
    with pytest.raises(ValueError, match=re.escape(f"{folder} is damaged (UnpicklingError)")):
        load_checkpoint(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "progress.json"])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, name: str):
    folder = save(Checkpoints(tmp_path), 1)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{folder} is damaged")):
        load_checkpoint(folder)


def test_prefetched_items_come_in_order():
    assert list(prefetch(iter(range(50)), ahead=3)) == list(range(50))


def test_an_error_in_making_a_batch_reaches_the_consumer():
    def items():
        yield 1
        raise ValueError("broken batch")

    made = prefetch(items())
    assert next(made) == 1
    with pytest.raises(ValueError, match="broken batch"):
        next(made)


def test_a_consumer_that_leaves_early_leaves_no_thread():
    made = prefetch(iter(range(1000)))
    assert next(made) == 0
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
