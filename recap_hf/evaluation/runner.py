"""An evaluation from recordings to tables: caption a split, score it, compare it with its baselines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recap_hf.files import write_json
from recap_hf.modeling.retrieval_recap import normalize_text
from recap_hf.scoring import (
    ScoringTools,
    bootstrap_intervals,
    clip_list_hash,
    paired_bootstrap,
    read_predictions,
    score_captions,
)

from .clips import EvaluationClips
from .folder import NAMES_KEY, SCORES_FILE, EvaluationFolder
from .systems import MAIN_SYSTEM, SYSTEMS, Systems


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
    tables = {name: read_predictions(folder.predictions_file(name)) for name in folder.systems}
    scores = {}
    with contextlib.ExitStack() as stack:
        tools = tools or stack.enter_context(ScoringTools())
        if not options.get("pretokenized"):
            # All at once: the tokenizer starts anew for every call with new texts.
            texts = [text for table in tables.values() for refs in table.references for text in refs]
            tools.tokenize([*texts, *(text for table in tables.values() for text in table.predictions)])
        for name, table in tables.items():
            scores[name] = score_captions(
                table.predictions,
                table.references,
                clip_ids=table.clip_ids,
                clip_list_name=clips_name,
                retrieved=table.retrieved,
                tools=tools,
                given=(given or {}).get(name),
                **options,
            )
            scores[name].save(folder.scores_path(folder.path, name))
    if MAIN_SYSTEM in tables:
        notes = [*notes, *_leaked_references(tables[MAIN_SYSTEM].references, tables[MAIN_SYSTEM].retrieved)]
    draws = (resamples, confidence, seed)
    metrics = {name: result.metrics for name, result in scores.items()}
    systems = {
        name: {
            "description": SYSTEMS.get(name, ""),
            "corpus": result.corpus,
            "intervals": {key: list(pair) for key, pair in bootstrap_intervals(result.metrics, *draws).items()},
            "statistics": result.statistics,
        }
        for name, result in scores.items()
    }
    differences = {
        name: {
            key: row.to_dict() for key, row in paired_bootstrap(metrics[name], metrics[MAIN_SYSTEM], *draws).items()
        }
        for name in scores
        if name != MAIN_SYSTEM and MAIN_SYSTEM in scores
    }
    first = next(iter(scores.values()))
    content = {
        "clip_list": first.clip_list,
        "implementation": first.implementation,
        "skipped": first.skipped,
        "confidence": confidence,
        "notes": list(notes),
        "systems": systems,
        "recap_minus": differences,
    }
    write_json(folder.path / SCORES_FILE, content)
    return content


def _leaked_references(references: list[list[str]], retrieved: list[list[str]]) -> list[str]:
    pairs = [
        map(set, (map(normalize_text, refs), map(normalize_text, hits)))
        for refs, hits in zip(references, retrieved, strict=True)
    ]
    leaked = sum(bool(refs & hits) for refs, hits in pairs)
    note = (
        f"{leaked} of {len(references)} clips retrieved a caption with the words of one of their own references, from "
        "another clip (--exclude-references leaves such captions out)"
    )
    return [note] if leaked else []


def report_progress(done: int, total: int) -> None:
    """One line on stderr, rewritten on a terminal."""
    end = "\n" if done == total or not sys.stderr.isatty() else "\r"
    print(f"captioned {done} of {total} clips", end=end, file=sys.stderr, flush=True)
