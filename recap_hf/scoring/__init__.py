"""Scores of audio captions, exact to the reference implementations, with intervals and the clip list beside them."""

from __future__ import annotations

from pathlib import Path

from .clips import ClipList, clip_list_hash, clip_stem, match_clips, read_clip_list
from .compare import Comparison, Difference, bootstrap_intervals, compare_tables, intersect, paired_bootstrap
from .fense import FenseModels
from .java import JavaRuntime, find_java
from .scorer import METRICS, CaptionScores, score_captions
from .tables import PredictionTable, read_captions, read_predictions
from .tools import JavaTools

__all__ = [
    "METRICS",
    "CaptionScores",
    "ClipList",
    "Comparison",
    "Difference",
    "FenseModels",
    "JavaRuntime",
    "JavaTools",
    "PredictionTable",
    "bootstrap_intervals",
    "clip_list_hash",
    "clip_stem",
    "compare_tables",
    "evaluate_module",
    "find_java",
    "intersect",
    "match_clips",
    "paired_bootstrap",
    "read_captions",
    "read_clip_list",
    "read_predictions",
    "score_captions",
]


def evaluate_module() -> str:
    """Path for `evaluate.load`: the caption scores as an `evaluate` module, read from the installed package."""
    return str(Path(__file__).parent / "caption_scores")
