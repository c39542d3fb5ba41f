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
    """Every (YouTube id, start in seconds or milliseconds, or None) that an audio file's stem may mean.

    There may be two, as a first `Y` may belong to the id.
    """
    candidates = [stem, stem[1:]] if stem[:1] == "Y" else [stem]
    matches = filter(None, map(_YOUTUBE_NAME.fullmatch, candidates))
    return [(match["id"], None if match["start"] is None else float(match["start"])) for match in matches]


__all__ = ["normalize_clip_id", "normalize_text", "parse_youtube_name"]
