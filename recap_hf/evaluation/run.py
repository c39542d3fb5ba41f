"""An evaluation from recordings to tables: caption a split, score it, compare it with its baselines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.scoring import (
    CaptionScores,
    JavaTools,
    PredictionTable,
    bootstrap_intervals,
    clip_list_hash,
    paired_bootstrap,
    read_predictions,
    score_captions,
)
from recap_hf.scoring.compare import Difference

from .captioner import NEED_DATASTORE, SYSTEMS, Captioner, describe_captioner
from .folder import NAMES_KEY, SCORES_FILE, EvaluationFolder

MAIN_SYSTEM = "recap"


@dataclass
class EvaluationClips:
    """What is captioned: names, undecoded audio and references, one entry a clip.

    `name` says which list of clips this is; it stands in every table.
    """

    name: str
    clip_ids: list[str]
    audio: list[Any]
    references: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def select(self, positions: Sequence[int], name: str | None = None) -> EvaluationClips:
        """The clips at `positions`."""
        columns = [[column[n] for n in positions] for column in (self.clip_ids, self.audio, self.references)]
        return EvaluationClips(name or self.name, *columns, list(self.notes))


def caption_clips(
    captioner: Captioner,
    clips: EvaluationClips,
    output_dir: str | Path,
    *,
    systems: Sequence[str] | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
    names: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationFolder:
    """Captions every clip by every system into `output_dir`, going on where an earlier run stopped.

    Args:
        captioner: the model.
        clips: what to caption.
        output_dir: see `EvaluationFolder`.
        systems: some of `SYSTEMS`; None: all that the captioner can be.
        batch_size: clips captioned together.
        overwrite: start afresh.
        names: what the parts are called, for `run.json`: a run may go on from a folder that was moved, so only their
            hashes are compared.
        progress: called with the clips done and their number after each batch.

    Raises:
        ValueError: if a system is unknown or needs a datastore that is absent, the folder belongs to another run, or a
            recording cannot be read.
    """
    chosen = check_systems(captioner, systems)
    described = {
        NAMES_KEY: names or {},
        "captioner": describe_captioner(captioner),
        "clip_list": clips.name,
        "num_clips": len(clips),
        "clips_sha256": clip_list_hash(clips.clip_ids),
    }
    folder = EvaluationFolder(output_dir, described, chosen, batch_size, overwrite)
    rate = captioner.processor.feature_extractor.sampling_rate
    for start, waveforms in decoded_batches(clips, folder.done, batch_size, rate):
        part = slice(start, start + len(waveforms))
        ids, references = clips.clip_ids[part], clips.references[part]
        folder.append(ids, references, captioner.caption(waveforms, ids, references, chosen))
        if progress:
            progress(folder.done, len(clips))
    return folder


def check_systems(captioner: Captioner, systems: Sequence[str] | None) -> list[str]:
    """The systems to run: those named, or all that the captioner can be.

    Raises:
        ValueError: if one is unknown, or needs a datastore and there is none.
    """
    has_store = captioner.processor.datastore is not None
    if systems is None:
        return [name for name in SYSTEMS if has_store or name not in NEED_DATASTORE]
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"unknown system {unknown[0]!r}: expected some of {', '.join(SYSTEMS)}")
    lost = [name for name in systems if name in NEED_DATASTORE and not has_store]
    if lost:
        raise ValueError(f"the system {lost[0]} needs a datastore, and the captioner has none: name one (--datastore)")
    return list(dict.fromkeys(systems))


def decoded_batches(
    clips: EvaluationClips, start: int, batch_size: int, rate: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Decoded batches from clip `start` on; the next one is decoded while the caller works on the last."""
    starts = range(start, len(clips), batch_size)
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending = [
            pool.submit(_decode, clips, first, min(first + batch_size, len(clips)), rate) for first in starts[:1]
        ]
        for number, first in enumerate(starts):
            waveforms = pending.pop().result()
            if number + 1 < len(starts):
                following = starts[number + 1]
                pending.append(pool.submit(_decode, clips, following, min(following + batch_size, len(clips)), rate))
            yield first, waveforms


def _decode(clips: EvaluationClips, start: int, stop: int, rate: int) -> list[np.ndarray]:
    from recap_hf.modeling.audio_recap import load_audio, resample, to_mono

    waveforms = []
    for number in range(start, stop):
        try:
            waveform, source_rate = load_audio(clips.audio[number])
        except (ValueError, OSError) as error:
            raise ValueError(f"the recording of clip {clips.clip_ids[number]!r} cannot be read: {error}") from error
        waveforms.append(resample(to_mono(waveform), source_rate, rate))
    return waveforms


@dataclass
class EvaluationResult:
    """Scores of every system of a run on the same clips.

    Attributes:
        scores: by system.
        intervals: percentile bootstrap interval of each corpus score, by system and metric.
        differences: `recap` against each other system, by system and metric: `recap` minus that system.
        clips_name: name of the list of clips.
        notes: what a reader should know.
    """

    scores: dict[str, CaptionScores]
    intervals: dict[str, dict[str, tuple[float, float]]]
    differences: dict[str, dict[str, Difference]]
    clips_name: str
    confidence: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain Python, ready for JSON; per-clip scores are in the systems' own files."""
        first = next(iter(self.scores.values()))
        return {
            "clip_list": {**first.clip_list, "name": self.clips_name},
            "implementation": first.implementation,
            "skipped": first.skipped,
            "confidence": self.confidence,
            "notes": self.notes,
            "systems": {
                name: {
                    "description": SYSTEMS.get(name, ""),
                    "corpus": scores.corpus,
                    "intervals": {key: list(interval) for key, interval in self.intervals[name].items()},
                    "statistics": scores.statistics,
                }
                for name, scores in self.scores.items()
            },
            "recap_minus": {
                name: {
                    key: {
                        "difference": row.difference,
                        "low": row.low,
                        "high": row.high,
                        "excludes_zero": row.excludes_zero,
                    }
                    for key, row in rows.items()
                }
                for name, rows in self.differences.items()
            },
        }


def score_folder(
    folder: EvaluationFolder,
    clips_name: str,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    notes: Sequence[str] = (),
    tools: JavaTools | None = None,
    extra_scores: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    **options: Any,
) -> EvaluationResult:
    """Scores every system of a finished run, with intervals, and writes `scores.json` and `<system>.scores.json`.

    Args:
        folder: what `caption_clips` returned.
        clips_name: name of the list of clips.
        resamples, confidence, seed: of the bootstraps.
        notes: what a reader should know, beside what the scores say.
        tools: running tools of Java, where several folders are scored.
        extra_scores: scores of each clip computed elsewhere: system -> name of the score -> values.
        **options: of `score_captions`.
    """
    scores = {}
    with contextlib.ExitStack() as stack:
        tools = tools or stack.enter_context(JavaTools(options.pop("java", None)))
        tables = {name: read_predictions(folder.predictions_file(name)) for name in folder.systems}
        if not options.get("pretokenized"):
            # All at once: the tokenizer starts anew for every call with new texts.
            tools.tokenize([text for table in tables.values() for text in _texts(table)])
        for name, table in tables.items():
            scores[name] = score_captions(
                table.predictions,
                table.references,
                clip_ids=table.clip_ids,
                clip_list_name=clips_name,
                retrieved=table.retrieved,
                tools=tools,
                extra_scores=(extra_scores or {}).get(name),
                **options,
            )
            if name == MAIN_SYSTEM:
                notes = [*notes, *_reference_leaks(table.references, table.retrieved)]
            folder.write_json(folder.scores_path(folder.path, name).name, scores[name].to_dict())
    intervals = {
        name: bootstrap_intervals(result.metrics, resamples, confidence, seed) for name, result in scores.items()
    }
    differences = {}
    if MAIN_SYSTEM in scores:
        for name, result in scores.items():
            if name != MAIN_SYSTEM:
                differences[name] = paired_bootstrap(
                    result.metrics, scores[MAIN_SYSTEM].metrics, resamples, confidence, seed
                )
    result = EvaluationResult(scores, intervals, differences, clips_name, confidence, list(notes))
    folder.write_json(SCORES_FILE, result.to_dict())
    return result


def _texts(table: PredictionTable) -> list[str]:
    return [*table.predictions, *(text for refs in table.references for text in refs)]


def _reference_leaks(references: list[list[str]], retrieved: list[list[str]]) -> list[str]:
    from recap_hf.modeling.retrieval_recap import normalize_text

    leaked = sum(
        bool({normalize_text(text) for text in refs} & {normalize_text(text) for text in hits})
        for refs, hits in zip(references, retrieved, strict=True)
    )
    if not leaked:
        return []
    return [
        f"{leaked} of {len(references)} clips retrieved a caption with the words of one of their own references, from "
        "another clip (--exclude-references leaves such captions out)"
    ]


def report_progress(done: int, total: int) -> None:
    """One line on stderr, rewritten on a terminal."""
    end = "\n" if done == total or not sys.stderr.isatty() else "\r"
    print(f"captioned {done} of {total} clips", end=end, file=sys.stderr, flush=True)
