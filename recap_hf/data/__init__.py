"""Captioned audio from wherever it lies, in one table."""

from __future__ import annotations

from .loading import NAMED_DATASETS, join, load_captions
from .options import LoadOptions
from .schema import CaptionData, Problem, canonical_split

__all__ = ["NAMED_DATASETS", "CaptionData", "LoadOptions", "Problem", "canonical_split", "join", "load_captions"]
