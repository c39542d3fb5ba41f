"""An evaluation in a folder: caption a split line by line, score it, compare it with its baselines.

A run that was killed can be resumed: it starts at the last batch that is complete in the file of every system. So its
batches, and every digit of its scores, are those of a run without interruption.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from recap_hf.files import write_json, write_text
from recap_hf.modeling.retrieval_recap import normalize_text
from recap_hf.scoring import ScoringTools, bootstrap_intervals, clip_list_hash, paired_bootstrap, score_captions

from .clips import EvaluationClips
from .systems import MAIN_SYSTEM, SYSTEMS, Systems

RUN_FILE, SCORES_FILE = "run.json", "scores.json"
NAMES_KEY = "names"
# What hashes in the settings stand for, in messages.
_HASHED = {
    "captioner.weights_sha256": "weights of the model",
    "captioner.datastore.sha256": "captions of the datastore",
    "clips_sha256": "clips",
}


def read_json(path: Path) -> Any:
    """The content of a JSON file that an evaluation wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def predictions_file(folder: str | os.PathLike, system: str) -> Path:
    """The file of a system's predictions in an evaluation's folder, in the order of the clips."""
    return Path(folder) / f"{system}.jsonl"


def scores_file(folder: str | os.PathLike, system: str) -> Path:
    """The file of a system's scores per clip in an evaluation's folder."""
    return Path(folder) / f"{system}.scores.json"


def read_predictions(folder: str | os.PathLike, system: str) -> list[dict[str, Any]]:
    """The predictions of a run: `clip_id`, `prediction`, `score`, `retrieved`, `references`.

    A line that a killed process left incomplete does not count. Raises `ValueError` for a damaged file.
    """
    path = predictions_file(folder, system)
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    try:
        return [json.loads(line) for line in text.split("\n")[:-1] if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); start afresh with --overwrite") from error


class EvaluationFolder:
    """Predictions of each system in `<system>.jsonl`, and the settings in `run.json`.

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
        self, path: str | Path, settings: dict, systems: Sequence[str], batch_size: int, overwrite: bool = False
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
        rows = {name: read_predictions(self.path, name) for name in self.systems}
        self.done = min(map(len, rows.values()))
        if self.done < settings["num_clips"]:
            self.done -= self.done % batch_size
        for name in self.systems:
            write_text(predictions_file(self.path, name), "".join(map(_line, rows[name][: self.done])))

    def append(self, clip_ids: Sequence[str], references: Sequence, predictions: dict[str, list]) -> None:
        """Writes one batch; it is on the disk when this returns."""
        for name in self.systems:
            with open(predictions_file(self.path, name), "a", encoding="utf-8") as file:
                for clip_id, refs, result in zip(clip_ids, references, predictions[name], strict=True):
                    row = {"clip_id": clip_id, "prediction": result.caption, "score": result.score}
                    file.write(_line({**row, "retrieved": result.retrieved, "references": list(refs)}))
                file.flush()
                os.fsync(file.fileno())
        self.done += len(clip_ids)

    def _require_same(self, settings: dict[str, Any]) -> None:
        try:
            earlier = read_json(self.path / RUN_FILE)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path / RUN_FILE} is damaged ({error}); start afresh with --overwrite") from error
        if not any(predictions_file(self.path, name).is_file() for name in earlier.get("systems", [])):
            return
        before, now = _flat(earlier), _flat(settings)
        changes = [
            _HASHED.get(key) or f"{key}: {json.dumps(before.get(key))}, now {json.dumps(now.get(key))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if changes:
            hint = "choose another --output-dir, or start afresh with --overwrite"
            raise ValueError(f"{self.path} holds predictions made with other settings ({'; '.join(changes)}); {hint}")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, without the names of the parts: a folder that was moved may be resumed."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key != NAMES_KEY:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def caption_clips(
    systems: Systems,
    clips: EvaluationClips,
    output_dir: str | Path,
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationFolder:
    """Captions every clip by every system into `output_dir`, resuming an earlier run.

    Args:
        systems: the captioner and its baselines.
        clips: what to caption.
        output_dir: see `EvaluationFolder`.
        names: some of `SYSTEMS`; None: all that are possible with the captioner.
        batch_size: clips captioned together.
        overwrite: delete earlier predictions.
        sources: names of model and datastore for `run.json`; not compared, since folders may be moved.
        progress: called with the clips done and their number after each batch.

    Raises:
        ValueError: if a system is unknown or needs a datastore that is missing, the folder belongs to another run, or
            a recording cannot be read.
    """
    chosen = systems.check(names)
    settings = {
        NAMES_KEY: dict(sources or {}),
        "captioner": systems.describe(),
        "clip_list": clips.name,
        "num_clips": len(clips),
        "clips_sha256": clip_list_hash(clips.clip_ids),
    }
    folder = EvaluationFolder(output_dir, settings, chosen, batch_size, overwrite)
    for start, waveforms in clips.batches(folder.done, batch_size, systems.captioner.read):
        part = slice(start, start + len(waveforms))
        ids, references = clips.clip_ids[part], clips.references[part]
        folder.append(ids, references, systems.caption(waveforms, ids, references, chosen))
        if progress:
            progress(folder.done, len(clips))
    return folder


def score_folder(
    folder: EvaluationFolder,
    clips_name: str,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    notes: Sequence[str] = (),
    tools: ScoringTools | None = None,
    given: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores every system of a finished run and writes `scores.json` and `<system>.scores.json`.

    Args:
        folder: what `caption_clips` returned.
        clips_name: name of the list of clips.
        resamples, confidence, seed: of the bootstraps.
        notes: remarks for readers of the figures.
        tools: of `score_captions`; shared where several folders are scored.
        given: `given` of `score_captions` by system.
        **options: of `score_captions`.

    Returns:
        The content of `scores.json`: `clip_list`, `implementation`, `skipped`, `confidence`, `notes`, `systems` (by
        name `description`, `corpus`, `intervals` by metric, `statistics`) and `recap_minus` (by name and metric).
    """
    rows = {name: read_predictions(folder.path, name) for name in folder.systems}
    scores = {}
    with nullcontext(tools) if tools else ScoringTools() as used:
        if not options.get("pretokenized"):
            # All at once: the tokenizer starts anew for every call with new texts.
            clips = [row for each in rows.values() for row in each]
            used.tokenize([text for row in clips for text in (row["prediction"], *row["references"])])
        for name, clips in rows.items():
            scores[name] = score_captions(
                [row["prediction"] for row in clips],
                [row["references"] for row in clips],
                clip_ids=[row["clip_id"] for row in clips],
                clip_list_name=clips_name,
                retrieved=[[hit["caption"] for hit in row["retrieved"]] for row in clips],
                tools=used,
                given=(given or {}).get(name),
                **options,
            )
            scores[name].save(scores_file(folder.path, name))
    draws = (resamples, confidence, seed)
    main, first = scores.get(MAIN_SYSTEM), next(iter(scores.values()))
    others = {name: result for name, result in scores.items() if main and name != MAIN_SYSTEM}
    content = {
        "clip_list": first.clip_list,
        "implementation": first.implementation,
        "skipped": first.skipped,
        "confidence": confidence,
        "notes": [*notes, *_leaked_references(rows.get(MAIN_SYSTEM, []))],
        "systems": {
            name: {
                "description": SYSTEMS.get(name, ""),
                "corpus": result.corpus,
                "intervals": bootstrap_intervals(result.metrics, *draws),
                "statistics": result.statistics,
            }
            for name, result in scores.items()
        },
        "recap_minus": {
            name: {
                key: difference.to_dict()
                for key, difference in paired_bootstrap(result.metrics, main.metrics, *draws).items()
            }
            for name, result in others.items()
        },
    }
    write_json(folder.path / SCORES_FILE, content)
    return content


def _leaked_references(rows: Sequence[dict[str, Any]]) -> list[str]:
    pairs = [(row["references"], [hit["caption"] for hit in row["retrieved"]]) for row in rows]
    leaked = sum(bool(set(map(normalize_text, refs)) & set(map(normalize_text, hits))) for refs, hits in pairs)
    note = (
        f"{leaked} of {len(rows)} clips retrieved a caption with the words of one of their own references, from "
        "another clip (--exclude-references leaves such captions out)"
    )
    return [note] if leaked else []
