"""Checkpoints: files that are either there or not, with all that a run needs to continue as if it had not stopped."""

import pickle
from pathlib import Path
from typing import Any

import torch

from recap_hf.files import replacing

PARTS = ("weights", "optimizer", "scheduler", "scaler", "progress")


class Checkpoints:
    """The checkpoints of one run, `folder/checkpoint-<step>.pt` and `folder/best.pt`.

    Each is a file of `torch.save` that replaces the one before at once: a kill leaves the earlier one.

    Args:
        folder: of the files.
        keep: number of checkpoints to keep besides the best.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self._keep, self._best = Path(folder), max(1, keep), Path(folder) / "best.pt"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        names = [path.stem.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*.pt")]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> Path | None:
        """The last checkpoint."""
        return self._path(self.steps()[-1]) if self.steps() else None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, and delete older ones beyond `keep` and what a killed run left unfinished.

        Args:
            step: number of finished steps.
            state: has the entries `weights`, `optimizer`, `scheduler`, `scaler` and `progress`.
        """
        _write(self._path(step), state)
        for path in [*map(self._path, self.steps()[: -self._keep]), *self.folder.glob(".*.tmp")]:
            path.unlink()
        return self._path(step)

    def save_best(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Replace the best weights by those of `step`."""
        _write(self._best, {"step": step, "weights": weights})

    def load_best(self, step: int) -> dict[str, torch.Tensor] | None:
        """The best weights, if they are there and of `step`."""
        state = load_checkpoint(self._best, ("step", "weights")) if self._best.is_file() else {}
        return state["weights"] if state.get("step") == step else None

    def remove_all(self) -> None:
        """Delete every checkpoint, the best included."""
        for path in [*map(self._path, self.steps()), self._best]:
            path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str | Path, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """The state that was given to `Checkpoints.save`, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no checkpoint, or holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no checkpoint: expected a file such as checkpoints/checkpoint-100.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        hint = "delete it, and --resume continues from the one before it"
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {hint}") from error
    missing = [part for part in parts if not isinstance(state, dict) or part not in state]
    if missing:
        raise ValueError(f"{path} is no checkpoint of a training run: it holds no {missing[0]}")
    return state
