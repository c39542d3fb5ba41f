"""Checkpoints that are either there or not, and hold all that a run needs to go on as if it had not stopped."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS, STATE, PROGRESS = "trainable.safetensors", "optimizer.pt", "progress.json"
BEST = "best"


class Checkpoints:
    """The checkpoints of one run, in `folder/checkpoint-<step>/` and `folder/best/`.

    A checkpoint is written beside its place and renamed into it, so that a kill leaves the one before. It holds the
    trained weights (safetensors), optimiser, schedule and gradient scaler (tensors, read with `weights_only`), and
    the progress (JSON).

    Args:
        folder: where they lie.
        keep: how many to keep besides the best.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = max(1, keep)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """The last checkpoint."""
        steps = self.steps()
        return self.folder / f"checkpoint-{steps[-1]}" if steps else None

    def save(
        self, step: int, weights: dict[str, torch.Tensor], state: dict[str, Any], progress: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of `step`; older ones beyond `keep` go."""
        place = self.folder / f"checkpoint-{step}"
        self._write(place, weights, state, progress)
        for old in self.steps()[: -self.keep]:
            # Out of the way first: half a checkpoint must not look like one.
            doomed = self.folder / f".old-checkpoint-{old}"
            os.replace(self.folder / f"checkpoint-{old}", doomed)
            shutil.rmtree(doomed)
        return place

    def save_best(self, weights: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        """Replace the best weights."""
        self._write(self.folder / BEST, weights, None, progress)

    def load_best(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Best weights and what is known of them, if there are any."""
        folder = self.folder / BEST
        if not (folder / WEIGHTS).is_file():
            return None
        return load_file(folder / WEIGHTS), json.loads((folder / PROGRESS).read_text(encoding="utf-8"))

    def remove_all(self) -> None:
        """Remove every checkpoint, the best included."""
        for path in [self.folder / f"checkpoint-{step}" for step in self.steps()] + [self.folder / BEST]:
            if path.exists():
                shutil.rmtree(path)

    def clean(self) -> None:
        """Remove what a killed run left beside its checkpoints, and put back what was being replaced."""
        if not self.folder.is_dir():
            return
        for previous in self.folder.glob(".previous-*"):
            place = self.folder / previous.name.removeprefix(".previous-")
            if not place.is_dir():
                os.replace(previous, place)
        for pattern in (".partial-*", ".old-*", ".previous-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def _write(
        self, place: Path, weights: dict[str, torch.Tensor], state: dict[str, Any] | None, progress: dict[str, Any]
    ) -> None:
        partial = self.folder / f".partial-{place.name}"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / WEIGHTS)
        if state is not None:
            torch.save(state, partial / STATE)
        (partial / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        previous = self.folder / f".previous-{place.name}"
        if place.exists():
            # A folder cannot be renamed over a full one.
            if previous.exists():
                shutil.rmtree(previous)
            os.replace(place, previous)
        os.replace(partial, place)
        _sync(self.folder)
        if previous.exists():
            shutil.rmtree(previous)


def load_checkpoint(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Weights, optimiser state and progress of a checkpoint.

    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: where a file is damaged, or holds anything but tensors and plain values.
    """
    folder = Path(folder)
    for name in (WEIGHTS, STATE, PROGRESS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of a training run: it has no {name}")
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return load_file(folder / WEIGHTS), state, json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}): delete it, and --resume goes on from the one before it"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
