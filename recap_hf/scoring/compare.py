"""Is the difference real? Two systems on the clips that both captioned, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .clips import clip_list_hash, match_clips
from .metrics import MetricScores
from .tables import PredictionTable

_CHUNK = 500  # resamples drawn at a time: 500 x 5,000 clips of counts are 20 MB


@dataclass(frozen=True)
class Difference:
    """One metric of two systems: both scores, second minus first, and the interval of that difference."""

    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval says that the systems differ."""
        return self.low > 0 or self.high < 0


@dataclass
class Comparison:
    """Differences by metric, and how they were obtained."""

    metrics: dict[str, Difference]
    num_clips: int
    clip_list_sha256: str
    only_in_first: int
    only_in_second: int
    resamples: int
    confidence: float
    seed: int
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    implementation: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain Python, ready for JSON."""
        content = asdict(self)
        for key, difference in self.metrics.items():
            content["metrics"][key]["excludes_zero"] = difference.excludes_zero
        return content


def _resampled_counts(num_clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each clip is drawn, (up to 500, num_clips) at a time, for all resamples."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        drawn = generator.integers(num_clips, size=(min(_CHUNK, resamples - start), num_clips))
        offsets = np.arange(len(drawn))[:, None] * num_clips
        yield np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _check_bootstrap(scores: Mapping[str, MetricScores], resamples: int, confidence: float) -> int:
    sizes = {len(score.clips) for score in scores.values()}
    if len(sizes) != 1:
        raise ValueError(f"expected scores of one list of clips, but they have {sorted(sizes) or 'no'} clips")
    if resamples < 100:
        raise ValueError(f"{resamples} resamples give no interval; expected at least 100")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95")
    return sizes.pop()


def bootstrap_intervals(
    scores: Mapping[str, MetricScores], resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of each corpus score of one system, over its clips."""
    num_clips = _check_bootstrap(scores, resamples, confidence)
    samples = {key: [] for key in scores}
    for counts in _resampled_counts(num_clips, resamples, seed):
        for key, score in scores.items():
            samples[key].append(score.aggregate(counts @ score.statistics, num_clips))
    return {key: _interval(np.concatenate(values), confidence) for key, values in samples.items()}


def paired_bootstrap(
    first: Mapping[str, MetricScores],
    second: Mapping[str, MetricScores],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Percentile intervals of `second` minus `first` when the clips are drawn with replacement, both from one draw.

    Corpus scores are recomputed for every draw: BLEU and METEOR from their summed statistics, the others as means.
    CIDEr-D keeps the document frequencies of the whole list.

    Args:
        first, second: scores of both systems by metric, clips in the same order; metrics of one alone are left out.
        resamples: number of draws.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        ValueError: if the numbers of clips differ or an argument is out of range.
    """
    shared = [key for key in first if key in second]
    both = {f"{name} {key}": scores[key] for name, scores in (("1", first), ("2", second)) for key in shared}
    num_clips = _check_bootstrap(both, resamples, confidence)
    samples = {key: [] for key in shared}
    for counts in _resampled_counts(num_clips, resamples, seed):
        for key in shared:
            one = first[key].aggregate(counts @ first[key].statistics, num_clips)
            two = second[key].aggregate(counts @ second[key].statistics, num_clips)
            samples[key].append(two - one)
    return {
        key: Difference(
            first[key].corpus,
            second[key].corpus,
            second[key].corpus - first[key].corpus,
            *_interval(np.concatenate(samples[key]), confidence),
        )
        for key in shared
    }


def _interval(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def intersect(
    first: PredictionTable, second: PredictionTable, youtube: bool = False
) -> tuple[PredictionTable, PredictionTable, list[str]]:
    """Both tables on the clips that both have, in the order of the first, with the first one's references.

    Returns:
        The two tables, and notes on what was left out or differed.

    Raises:
        ValueError: if no clip is in both, a table names one twice, or one has no names and the references differ.
    """
    if first.clip_ids is None or second.clip_ids is None:
        if first.references != second.references:
            raise ValueError(
                "a file without clip names can only be compared with one of the same references in the same order; "
                "name the column of clip names (--id-column)"
            )
        return first, second, []
    pairs = match_clips(first.clip_ids, second.clip_ids, youtube)
    if not pairs:
        raise ValueError(
            f"the two files share no clip (the first has names like {first.clip_ids[0]!r}, the second like "
            f"{second.clip_ids[0]!r})" + ("" if youtube else "; for AudioSet clips, try --youtube-ids")
        )
    one = first.select([pair[0] for pair in pairs])
    two = second.select([pair[1] for pair in pairs])
    differing = sum(sorted(a) != sorted(b) for a, b in zip(one.references, two.references, strict=True))
    notes = []
    if differing:
        notes.append(
            f"the references of {differing} of {len(one)} clips differ between the files; the first file's serve both"
        )
        two.references = one.references
    return one, two, notes


def compare_tables(
    first: PredictionTable,
    second: PredictionTable,
    *,
    youtube: bool = False,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    numbers: Mapping[str, str] | None = None,
    **options: Any,
) -> Comparison:
    """Scores two systems on the clips that both have and bootstraps the differences.

    Args:
        first, second: predictions with references.
        youtube: compare YouTube ids alone.
        resamples, confidence, seed: of `paired_bootstrap`.
        numbers: argument of `score_captions` -> column of numbers in both tables (`{"spice_scores": "spice"}`).
        **options: of `score_captions`, for both.

    Raises:
        ValueError: if the systems share no clip.
    """
    from .scorer import score_captions

    one, two, notes = intersect(first, second, youtube)
    results = []
    for table in (one, two):
        given = {argument: table.numbers[column] for argument, column in (numbers or {}).items()}
        results.append(score_captions(table.predictions, table.references, clip_ids=one.clip_ids, **given, **options))
    differences = paired_bootstrap(results[0].metrics, results[1].metrics, resamples, confidence, seed)
    return Comparison(
        metrics=differences,
        num_clips=len(one),
        clip_list_sha256=clip_list_hash(one.clip_ids) if one.clip_ids else results[0].clip_list["sha256"],
        only_in_first=len(first) - len(one),
        only_in_second=len(second) - len(two),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        skipped={**results[0].skipped, **results[1].skipped},
        notes=notes + results[0].notes + results[1].notes,
        implementation=results[0].implementation,
    )
