"""Evaluation of a captioner and its baselines: resumable, with intervals and the clip list in every result."""

from .clips import EvaluationClips, load_test_clips
from .runner import EvaluationFolder, caption_clips, predictions_file, read_predictions, score_folder
from .systems import SYSTEMS, Systems, load_captioner
from .tables import markdown_table, result_tables

__all__ = [
    "SYSTEMS",
    "EvaluationClips",
    "EvaluationFolder",
    "Systems",
    "caption_clips",
    "load_captioner",
    "load_test_clips",
    "markdown_table",
    "predictions_file",
    "read_predictions",
    "result_tables",
    "score_folder",
]
