"""Comparison of two systems on the clips that both captioned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .bootstrap import Difference, paired_bootstrap
from .clips import match_clips
from .scorer import score_captions
from .tables import PredictionTable


@dataclass
class Comparison:
    """Differences by metric, second minus first, and how they were obtained."""

    metrics: dict[str, Difference]
    num_clips: int
    clip_list_sha256: str
    only_in_first: int
    only_in_second: int
    resamples: int
    confidence: float
    seed: int
    skipped: dict[str, str]
    notes: list[str]
    implementation: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain Python, ready for JSON."""
        return {**asdict(self), "metrics": {key: row.to_dict() for key, row in self.metrics.items()}}


def intersect(
    first: PredictionTable, second: PredictionTable, youtube: bool = False
) -> tuple[PredictionTable, PredictionTable, list[str]]:
    """Both tables on the clips that both have, in the order of the first, with the first one's references.

    Returns:
        The two tables, and a note if references differed.

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
            f"{second.clip_ids[0]!r}); for AudioSet clips, try --youtube-ids"
        )
    one, two = (table.select([pair[n] for pair in pairs]) for n, table in enumerate((first, second)))
    differing = sum(sorted(a) != sorted(b) for a, b in zip(one.references, two.references, strict=True))
    two.references = one.references
    note = f"the references of {differing} of {len(one)} clips differ between the files; the first file's serve both"
    return one, two, [note] if differing else []


def compare_tables(
    first: PredictionTable,
    second: PredictionTable,
    *,
    youtube: bool = False,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    given: Mapping[str, str] | None = None,
    **options: Any,
) -> Comparison:
    """Scores two systems on the clips that both have and bootstraps the differences.

    Args:
        first, second: predictions with references.
        youtube: compare YouTube ids alone.
        resamples, confidence, seed: of `paired_bootstrap`.
        given: name of a value that [`score_captions`] takes -> column of numbers in both tables.
        **options: of `score_captions`, for both.

    Raises:
        ValueError: if the systems share no clip.
    """
    one, two, notes = intersect(first, second, youtube)
    scores = []
    for table in (one, two):
        values = {name: table.numbers[column] for name, column in (given or {}).items()}
        scores.append(
            score_captions(table.predictions, table.references, clip_ids=one.clip_ids, given=values, **options)
        )
    draws = {"resamples": resamples, "confidence": confidence, "seed": seed}
    return Comparison(
        metrics=paired_bootstrap(scores[0].metrics, scores[1].metrics, **draws),
        num_clips=len(one),
        clip_list_sha256=scores[0].clip_list["sha256"],
        only_in_first=len(first) - len(one),
        only_in_second=len(second) - len(two),
        skipped=scores[0].skipped | scores[1].skipped,
        notes=notes + scores[0].notes + scores[1].notes,
        implementation=scores[0].implementation,
        **draws,
    )
