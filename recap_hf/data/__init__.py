"""Captioned audio from published and other datasets, in one table."""

from .loading import NAMED_DATASETS, join, load_captions
from .schema import CaptionData, LoadOptions, Problem, canonical_split

__all__ = ["NAMED_DATASETS", "CaptionData", "LoadOptions", "Problem", "canonical_split", "join", "load_captions"]
