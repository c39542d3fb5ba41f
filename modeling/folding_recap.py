"""Captions and clip ids folded for comparison."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# Audio, and the features that published lists name in its place.
_AUDIO_SUFFIX = re.compile(r"\.(wav|flac|mp3|ogg|opus|m4a|webm|mp4|mkv|aiff?|au|caf|wma|aac|npy)$", re.IGNORECASE)
# AudioSet releases put a Y before the 11 characters of a YouTube id.
_YOUTUBE_PREFIX = re.compile(r"^Y(?=[A-Za-z0-9_-]{11}$)")


def normalize_text(text: str) -> str:
    """A caption folded for comparison: case, punctuation and white space do not count.

    >>> normalize_text("A dog barks, twice.") == normalize_text("a  dog barks twice")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if char.isalnum() else " " for char in folded).split())


def normalize_clip_id(clip_id: Any) -> str:
    """A clip id folded for comparison: no folder, audio suffix or AudioSet's Y; case and punctuation do not count.

    >>> normalize_clip_id("development/Santa Motor.wav") == normalize_clip_id("Santa_Motor")
    True
    >>> normalize_clip_id("Y7fmOlUlwoNg.wav") == normalize_clip_id("7fmOlUlwoNg")
    True
    """
    name = str(clip_id).replace("\\", "/").rpartition("/")[2]
    return normalize_text(_YOUTUBE_PREFIX.sub("", _AUDIO_SUFFIX.sub("", name))) or name


__all__ = ["normalize_clip_id", "normalize_text"]
