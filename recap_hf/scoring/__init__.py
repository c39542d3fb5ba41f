"""Scores of audio captions, exact to the reference implementations, with bootstrap intervals."""

from pathlib import Path

from .bootstrap import Difference, bootstrap_intervals, paired_bootstrap
from .clips import clip_list_hash, match_clips, read_clip_list, select_listed
from .metrics import METRIC_LABELS, METRICS, check_metrics
from .scorer import CaptionScores, compare_tables, score_captions, score_rows
from .tables import read_predictions, read_training_captions
from .tools import FenseModels, ScoringTools, find_java

__all__ = [
    "METRICS",
    "METRIC_LABELS",
    "CaptionScores",
    "Difference",
    "FenseModels",
    "ScoringTools",
    "bootstrap_intervals",
    "check_metrics",
    "clip_list_hash",
    "compare_tables",
    "evaluate_module",
    "find_java",
    "match_clips",
    "paired_bootstrap",
    "read_clip_list",
    "read_predictions",
    "read_training_captions",
    "score_captions",
    "score_rows",
    "select_listed",
]


def evaluate_module() -> str:
    """Path for `evaluate.load`: the caption scores as an `evaluate` module, part of the installed package."""
    return str(Path(__file__).parent / "caption_scores")
