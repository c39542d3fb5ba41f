"""One spelling for every clip id, so that a clip is recognised across datasets, datastores and folders.

The same Clotho clip is `train/Distorted AM Radio noise.npy` in one published list and
`Distorted_AM_Radio_noise.wav` in another; AudioSet clips carry a `Y` before the YouTube id in some releases.
"""

from __future__ import annotations

import re

from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text

# AudioSet-style names: optional Y, the 11 characters of a YouTube id, then perhaps start and end (seconds or ms).
_YOUTUBE_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9_-]{11})(?:[_-](?P<start>\d+(?:\.\d+)?)(?:[_-](?P<end>\d+(?:\.\d+)?))?)?"
)


def parse_youtube_name(stem: str) -> list[tuple[str, float | None]]:
    """Readings of an audio file's stem as (YouTube id, start in seconds or milliseconds, None when absent).

    A stem can be read in two ways (`Y` may belong to the id), so every reading is returned and the caller keeps
    the one that its captions name.
    """
    readings = []
    candidates = [stem] + ([stem[1:]] if stem[:1] == "Y" else [])
    for candidate in candidates:
        match = _YOUTUBE_NAME.fullmatch(candidate)
        if match:
            start = match["start"]
            readings.append((match["id"], float(start) if start is not None else None))
    return readings


__all__ = ["normalize_clip_id", "normalize_text", "parse_youtube_name"]
