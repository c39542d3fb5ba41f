"""Checkpoints: files that are either there or not, with all that a run needs to continue as if it had not stopped."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"checkpoint-(\d+)\.pt")
PARTS = ("weights", "optimizer", "scheduler", "scaler", "progress")


class Checkpoints:
    """The checkpoints of one run, `folder/checkpoint-<step>.pt` and `folder/best.pt`.

    Each is a file of `torch.save` with the trained weights, the states of optimizer, schedule and gradient scaler, and
    the progress; it is read with `weights_only`. A file is written beside its place and renamed, so that a kill leaves
    the one before.

    Args:
        folder: of the files.
        keep: number of checkpoints to keep besides the best.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = max(1, keep)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def latest(self) -> Path | None:
        """The last checkpoint."""
        steps = self.steps()
        return self._place(steps[-1]) if steps else None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, and delete older ones beyond `keep`.

        Args:
            step: number of finished steps.
            state: has the entries `weights`, `optimizer`, `scheduler`, `scaler` and `progress`.
        """
        _write(self._place(step), state)
        for old in self.steps()[: -self.keep]:
            self._place(old).unlink()
        return self._place(step)

    def save_best(self, weights: dict[str, torch.Tensor], figures: dict[str, Any]) -> None:
        """Replace the best weights."""
        _write(self.folder / "best.pt", {"weights": weights, "figures": figures})

    def load_best(self) -> dict[str, torch.Tensor] | None:
        """The best weights, if there are any."""
        path = self.folder / "best.pt"
        return _read(path, ("weights",))["weights"] if path.is_file() else None

    def remove_all(self) -> None:
        """Delete every checkpoint, the best included."""
        for path in [self._place(step) for step in self.steps()] + [self.folder / "best.pt"]:
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete the unfinished files of a killed run."""
        for path in self.folder.glob("*.partial"):
            path.unlink()

    def _place(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}.pt"


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that was given to `Checkpoints.save`, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no checkpoint, or holds anything but tensors and plain values.
    """
    return _read(Path(path), PARTS)


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(path: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no checkpoint: expected a file such as checkpoints/checkpoint-100.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): delete it, and --resume continues from the one before it"
        ) from error
    missing = [part for part in parts if not isinstance(state, dict) or part not in state]
    if missing:
        raise ValueError(f"{path} is no checkpoint of a training run: it holds no {missing[0]}")
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of a checkpoint into the parameters of a model.

    Raises:
        ValueError: if they are not those of this model.
    """
    try:
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit the model: {error}") from error
    if unknown:
        raise ValueError(f"the checkpoint holds weights that this model does not have: {', '.join(unknown[:5])}")
