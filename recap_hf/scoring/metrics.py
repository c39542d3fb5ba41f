"""The metrics: `METRICS` is the one place where they are registered.

BLEU, ROUGE-L and CIDEr-D are computed by `pycocoevalcap`. A corpus score is a mean over the clips or a function
of sums over clips (BLEU, METEOR), so each metric returns additive statistics of the clips and the function from their
sums to the corpus score: a bootstrap can then score any resample.

A new metric is one function and one entry in `METRICS`: commands, tables and cards take name and label from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .tools import ScoringTools, SpiceUnavailable, spice

# A caption is taken for a faulty one above this probability of a fluency error.
ERROR_THRESHOLD = 0.9


@dataclass(frozen=True)
class MetricScores:
    """Scores of one metric.

    Attributes:
        corpus: the corpus score.
        clips: (num_clips,) one score per clip.
        statistics: (num_clips, size) additive statistics.
        aggregate: maps sums of statistics (..., size) and the number of clips to corpus scores (...).
    """

    corpus: float
    clips: np.ndarray
    statistics: np.ndarray
    aggregate: Callable[[np.ndarray, int], np.ndarray]


def mean_scores(clips: Sequence[float]) -> MetricScores:
    """`MetricScores` of a metric whose corpus score is the mean of its clips' scores."""
    values = np.asarray(clips, dtype=np.float64)
    return MetricScores(float(values.mean()), values, values[:, None], lambda sums, count: sums[..., 0] / count)


@dataclass
class ScoringInput:
    """What a metric may use.

    Attributes:
        captions, references: tokenized; one caption and any number of references per clip.
        texts, reference_texts: the same, not tokenized.
        tools: external tools and models.
        given: scores that the caller computed, (num_clips,) each, by key.
        scores: of the metrics before this one in `METRICS`; None for those that were skipped.
        sources: may be filled: what computed a score, by key.
    """

    captions: list[str]
    references: list[list[str]]
    texts: list[str]
    reference_texts: list[list[str]]
    tools: ScoringTools
    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, MetricScores | None] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, MetricScores]:
    """BLEU-1 to BLEU-4 with the closest reference length (Papineni et al., 2002), as `pycocoevalcap` computes it."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, refs in zip(captions, references, strict=True):
        scorer += (caption, list(refs))
    corpus, clips = scorer.compute_score(option="closest", verbose=0)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
        rows.append([length, closest, *counts["guess"], *counts["correct"]])
    statistics = np.asarray(rows, dtype=np.float64)
    scores = {}
    for n in range(4):
        aggregate = partial(_bleu_from_statistics, order=n + 1)
        scores[f"bleu_{n + 1}"] = MetricScores(float(corpus[n]), np.asarray(clips[n]), statistics, aggregate)
    return scores


def _bleu_from_statistics(sums: np.ndarray, num_clips: int, order: int) -> np.ndarray:
    length, closest, guessed, correct = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    # The two constants are pycocoevalcap's: no division by zero, and 0 stays (almost) 0.
    precisions = (correct[..., :order] + 1e-15) / (guessed[..., :order] + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, 1e-3)), 1.0)
    return np.prod(precisions, axis=-1) ** (1 / order) * penalty


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
    """ROUGE-L (beta 1.2), as `pycocoevalcap` computes it."""
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return mean_scores([rouge.calc_score([c], list(refs)) for c, refs in zip(captions, references, strict=True)])


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
    """CIDEr-D, as `pycocoevalcap` computes it (clipped, Gaussian length penalty with sigma 6, times 10).

    Document frequencies come from the given references, so the score of a clip depends on the other clips. Of one clip
    alone every document frequency is 1, and the score 0.
    """
    from pycocoevalcap.cider.cider import Cider

    _, clips = Cider().compute_score(
        {number: list(refs) for number, refs in enumerate(references)},
        {number: [caption] for number, caption in enumerate(captions)},
    )
    return mean_scores(clips)


def meteor_from_statistics(sums: np.ndarray, num_clips: int) -> np.ndarray:
    """METEOR (...) of summed statistics of the jar (..., 23), after Denkowski and Lavie, 2014.

    The 23 are: words and function words of caption and reference (4); for each of the four matchers (exact, stem,
    synonym, paraphrase) the matched content and function words of both (16); chunks; matched words of both (2).
    The parameters are those of the language en, task "rank".
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    words, function_words = sums[..., 0:2], sums[..., 2:4]
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # matcher, content or function, caption or reference
    matched = np.einsum("...mkc,m,k->...c", matches, [1.0, 0.6, 0.8, 0.6], [delta, 1 - delta])
    length = delta * (words - function_words) + (1 - delta) * function_words
    precision, recall = np.moveaxis(_divide(matched, length), -1, 0)
    f_mean = _divide(precision * recall, alpha * precision + (1 - alpha) * recall)
    fragmentation = _divide(sums[..., 20], sums[..., 21:23].mean(-1))
    return f_mean * (1 - gamma * fragmentation**beta)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator != 0)


def _meteor(run: ScoringInput) -> dict[str, MetricScores | str]:
    return {"meteor": MetricScores(*run.tools.meteor.score(run.captions, run.references), meteor_from_statistics)}


def _cider_d(run: ScoringInput) -> dict[str, MetricScores | str]:
    if len(run.captions) < 2:
        return {"cider_d": "CIDEr-D weighs words by how few clips have them, and needs at least two clips"}
    return {"cider_d": cider_d(run.captions, run.references)}


def _spice(run: ScoringInput) -> dict[str, MetricScores | str]:
    """SPICE, and SPIDEr where CIDEr-D is computed too."""
    found: dict[str, MetricScores | str] = {}
    if "spice" in run.given:
        found["spice"], run.sources["spice"] = mean_scores(run.given["spice"]), "given by the caller"
    else:
        try:
            values = spice(run.captions, run.references, run.tools.runtime, run.tools.spice_models)
            found["spice"], run.sources["spice"] = mean_scores(values), "SPICE 1.0 with Stanford CoreNLP 3.6.0"
        except SpiceUnavailable as error:
            found["spice"] = str(error)
    if "cider_d" in run.scores:
        parts = {"cider_d": run.scores["cider_d"], "spice": found["spice"]}
        found["spider"] = _combined(parts, lambda cider, spice: (cider + spice) / 2)
    return found


def penalize(scores: np.ndarray, error_probabilities: np.ndarray) -> np.ndarray:
    """`scores` (num_clips,), divided by ten where the probability of a fluency error exceeds 0.9."""
    return scores * (1 - 0.9 * (np.asarray(error_probabilities) > ERROR_THRESHOLD))


def _fense(run: ScoringInput) -> dict[str, MetricScores | str]:
    """FENSE with its two parts, and SPIDEr-FL where SPIDEr is computed too."""
    models = run.tools.fense
    similarities, probabilities = run.given.get("sbert_sim"), run.given.get("error_probability")
    if models is None:
        run.sources["fense"] = "not computed" if probabilities is None else "parts given by the caller"
    else:
        run.sources["fense"] = ", ".join(f"{part} {name}" for part, name in models.names.items())
        if similarities is None:
            similarities = models.sentence_similarities(run.texts, run.reference_texts)
        if probabilities is None:
            probabilities = models.error_probabilities(run.texts)
    need = "needs the {} of each caption, or the model that gives it"
    found: dict[str, MetricScores | str] = {
        "sbert_sim": need.format("sentence similarity"),
        "fer": need.format("probability of a fluency error"),
    }
    if similarities is not None:
        found["sbert_sim"] = mean_scores(similarities)
    if probabilities is not None:
        found["fer"] = mean_scores(probabilities > ERROR_THRESHOLD)
    found["fense"] = _combined(found.copy(), lambda similarity, _: penalize(similarity, probabilities))
    if "spider" in run.scores:
        parts = {"spider": run.scores["spider"], "fer": found["fer"]}
        found["spider_fl"] = _combined(parts, lambda spider, _: penalize(spider, probabilities))
    return found


def _combined(parts: Mapping[str, MetricScores | str | None], function: Callable) -> MetricScores | str:
    missing = [key for key, score in parts.items() if not isinstance(score, MetricScores)]
    if missing:
        return f"needs {' and '.join(missing)}, skipped above"
    return mean_scores(function(*(score.clips for score in parts.values())))


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        compute: from the input to scores by key; a text instead of scores is the reason why they cannot be computed.
        labels: of its scores in tables, by key.
    """

    compute: Callable[[ScoringInput], dict[str, MetricScores | str]]
    labels: dict[str, str]


METRICS: dict[str, Metric] = {
    "bleu": Metric(lambda run: bleu(run.captions, run.references), {f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}),
    "meteor": Metric(_meteor, {"meteor": "METEOR"}),
    "rouge_l": Metric(lambda run: {"rouge_l": rouge_l(run.captions, run.references)}, {"rouge_l": "ROUGE-L"}),
    "cider_d": Metric(_cider_d, {"cider_d": "CIDEr-D"}),
    "spice": Metric(_spice, {"spice": "SPICE", "spider": "SPIDEr"}),
    "fense": Metric(_fense, {"fense": "FENSE", "spider_fl": "SPIDEr-FL"}),
}
# In the order of the columns of tables. CLAPScore is computed from recordings: see `recap_hf.evaluation.clap_score`.
METRIC_LABELS = {key: label for metric in METRICS.values() for key, label in metric.labels.items()}
METRIC_LABELS["clap_score"] = "CLAPScore"
# Values that metrics take from a caller, and that are no scores of their own.
PARTS = ("spice", "sbert_sim", "error_probability")


def check_metrics(names: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is not in `METRICS`."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}: expected some of {', '.join(METRICS)}")
