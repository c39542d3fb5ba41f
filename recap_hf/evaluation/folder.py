"""The folder of an evaluation: predictions line by line, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .captioner import SYSTEMS, Prediction

RUN_FILE = "run.json"
NAMES_KEY = "names"
SCORES_FILE = "scores.json"


class EvaluationFolder:
    """Predictions of each system in `<system>.jsonl`, in the order of the clips, and the settings in `run.json`.

    A run that goes on starts at the last batch that every file has whole, so that the batches, and with them every
    last digit of the scores, are those of a run that was never interrupted.

    Args:
        path: the folder; made where absent.
        settings: all that decides the predictions, as plain JSON values.
        systems: names of the files.
        batch_size: clips that are written together.
        overwrite: start afresh whatever the folder holds.

    Raises:
        ValueError: if the folder holds predictions made with other settings.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: dict[str, Any],
        systems: Sequence[str],
        batch_size: int,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.systems = list(systems)
        self.path.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps({**settings, "systems": self.systems, "batch_size": batch_size}))
        if overwrite:
            self._remove()
        elif (self.path / RUN_FILE).is_file():
            self._require_same(settings)
        self._write_atomically(self.path / RUN_FILE, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        whole = min(len(self._whole_lines(name)) for name in self.systems) // batch_size * batch_size
        total = settings["num_clips"]
        if all(len(self._whole_lines(name)) >= total for name in self.systems):
            whole = total
        self.done = whole
        for name in self.systems:
            lines = self._whole_lines(name)[:whole]
            self._write_atomically(self.predictions_file(name), "".join(line + "\n" for line in lines))

    def predictions_file(self, system: str) -> Path:
        """Where a system's predictions stand."""
        return self.path / f"{system}.jsonl"

    @staticmethod
    def scores_path(folder: str | os.PathLike, system: str) -> Path:
        """Where the per-clip scores of a system stand in an evaluation's folder."""
        return Path(folder) / f"{system}.scores.json"

    def append(
        self,
        clip_ids: Sequence[str],
        references: Sequence[Sequence[str]],
        predictions: dict[str, list[Prediction]],
    ) -> None:
        """Writes one batch; it is on the disk when this returns."""
        for name in self.systems:
            lines = []
            for clip_id, refs, prediction in zip(clip_ids, references, predictions[name], strict=True):
                values = asdict(prediction)
                row = {"clip_id": clip_id, "prediction": values.pop("caption"), **values, "references": list(refs)}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            with open(self.predictions_file(name), "a", encoding="utf-8") as handle:
                handle.write("".join(lines))
                handle.flush()
                os.fsync(handle.fileno())
        self.done += len(clip_ids)

    def _require_same(self, settings: dict[str, Any]) -> None:
        try:
            earlier = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path / RUN_FILE} is damaged ({error}); --overwrite starts afresh") from error
        if not any(self.predictions_file(name).is_file() for name in earlier.get("systems", [])):
            return
        keys = [key for key in {**earlier, **settings} if key != NAMES_KEY]
        differing = [key for key in keys if earlier.get(key) != settings.get(key)]
        if differing:
            changes = "; ".join(
                f"{key}: {_short(earlier.get(key))}, now {_short(settings.get(key))}" for key in differing
            )
            raise ValueError(
                f"{self.path} holds predictions made with other settings ({changes}); choose another --output-dir, or "
                "--overwrite to start afresh"
            )

    def _whole_lines(self, system: str) -> list[str]:
        """Complete lines of a system's file: what a killed process left half-written does not count."""
        path = self.predictions_file(system)
        if not path.is_file():
            return []
        text = path.read_bytes().decode("utf-8", errors="replace")
        lines = text.split("\n")[:-1]
        return [line for line in lines if line]

    def _remove(self) -> None:
        # Nothing but what an evaluation writes: the folder may hold other things.
        for name in (*(f"{system}.jsonl" for system in SYSTEMS), RUN_FILE, SCORES_FILE):
            (self.path / name).unlink(missing_ok=True)

    def _write_atomically(self, path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def write_json(self, name: str, content: Any) -> Path:
        """Writes a result file of the run at once."""
        path = self.path / name
        self._write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
