"""Evaluation of a captioner beside its baselines, resumable, with intervals and the clip list in every result."""

from __future__ import annotations

from .captioner import SYSTEMS, Captioner, Prediction, describe_captioner, load_captioner
from .data import load_test_clips
from .folder import EvaluationFolder
from .run import EvaluationClips, EvaluationResult, caption_clips, score_folder
from .text_tables import markdown_table, result_tables

__all__ = [
    "SYSTEMS",
    "Captioner",
    "EvaluationClips",
    "EvaluationFolder",
    "EvaluationResult",
    "Prediction",
    "caption_clips",
    "describe_captioner",
    "load_captioner",
    "load_test_clips",
    "markdown_table",
    "result_tables",
    "score_folder",
]
