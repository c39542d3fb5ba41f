"""Explanations of captions: the regions of the recording and the retrieved captions that each word depends on."""

from .explanation import CaptionExplanation, WordExplanation, explain_caption
from .picture import draw_explanation

__all__ = ["CaptionExplanation", "WordExplanation", "draw_explanation", "explain_caption"]
