"""The folder of an evaluation: predictions line by line, so that a run that was killed can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recap_hf.files import write_json, write_text
from recap_hf.modeling.captioning_recap import CaptionResult

from .systems import SYSTEMS

RUN_FILE, SCORES_FILE = "run.json", "scores.json"
NAMES_KEY = "names"
# What hashes in the settings stand for, in messages.
_HASHED = {
    "captioner.weights_sha256": "weights of the model",
    "captioner.datastore.sha256": "captions of the datastore",
    "clips_sha256": "clips",
}


class EvaluationFolder:
    """Predictions of each system in `<system>.jsonl`, in the order of the clips, and the settings in `run.json`.

    A resumed run starts at the last batch that is complete in every file. So its batches, and every digit of its
    scores, are those of a run without interruption.

    Args:
        path: the folder; created if it does not exist.
        settings: all that decides the predictions, as plain JSON values.
        systems: names of the files.
        batch_size: clips that are written together.
        overwrite: delete earlier predictions.

    Raises:
        ValueError: if the folder holds predictions made with other settings; the message names them.
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
            # Only what an evaluation writes: the folder may hold other files.
            for name in (*(f"{system}.jsonl" for system in SYSTEMS), RUN_FILE, SCORES_FILE):
                (self.path / name).unlink(missing_ok=True)
        elif (self.path / RUN_FILE).is_file():
            self._require_same(settings)
        write_json(self.path / RUN_FILE, settings)
        lines = {name: self._whole_lines(name) for name in self.systems}
        self.done = min(map(len, lines.values()))
        if self.done < settings["num_clips"]:
            self.done -= self.done % batch_size
        for name in self.systems:
            write_text(self.predictions_file(name), "".join(line + "\n" for line in lines[name][: self.done]))

    def predictions_file(self, system: str) -> Path:
        """The file of a system's predictions."""
        return self.path / f"{system}.jsonl"

    @staticmethod
    def scores_path(folder: str | os.PathLike, system: str) -> Path:
        """The file of a system's scores per clip, in an evaluation's folder."""
        return Path(folder) / f"{system}.scores.json"

    @staticmethod
    def read_predictions(folder: str | os.PathLike, system: str) -> list[dict[str, Any]]:
        """The rows of a finished run: `clip_id`, `prediction`, `score`, `retrieved`, `references`."""
        text = Path(folder, f"{system}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    def append(
        self,
        clip_ids: Sequence[str],
        references: Sequence[Sequence[str]],
        predictions: dict[str, list[CaptionResult]],
    ) -> None:
        """Writes one batch; it is on the disk when this returns."""
        for name in self.systems:
            with open(self.predictions_file(name), "a", encoding="utf-8") as handle:
                for clip_id, refs, result in zip(clip_ids, references, predictions[name], strict=True):
                    row = {"clip_id": clip_id, "prediction": result.caption, "score": result.score}
                    row |= {"retrieved": result.retrieved, "references": list(refs)}
                    handle.write(json.dumps(row, ensure_ascii=False) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        self.done += len(clip_ids)

    def _require_same(self, settings: dict[str, Any]) -> None:
        try:
            earlier = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path / RUN_FILE} is damaged ({error}); start afresh with --overwrite") from error
        if not any(self.predictions_file(name).is_file() for name in earlier.get("systems", [])):
            return
        before, now = _flat(earlier), _flat(settings)
        changes = [
            _HASHED.get(key) or f"{key}: {json.dumps(before.get(key))}, now {json.dumps(now.get(key))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if changes:
            raise ValueError(
                f"{self.path} holds predictions made with other settings ({'; '.join(changes)}); choose another "
                "--output-dir, or start afresh with --overwrite"
            )

    def _whole_lines(self, system: str) -> list[str]:
        """Complete lines of a system's file; a line that a killed process left incomplete does not count."""
        path = self.predictions_file(system)
        text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
        return [line for line in text.split("\n")[:-1] if line]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, without the names of the parts: a folder that was moved may be resumed."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and key != NAMES_KEY:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != NAMES_KEY:
            flat[prefix + key] = value
    return flat
