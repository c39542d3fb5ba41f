"""How many events a clip has: from a file, or counted from the words of its references."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# What joins two events in a caption: "a dog barks and a car passes, then rain falls".
_JOINTS = re.compile(r",|;|\b(?:and|while|as|then|followed by|with|before|after|over|amid)\b", re.IGNORECASE)


def estimate_events(references: Sequence[str]) -> int:
    """The number of events that a clip's references speak of: the median of parts that connectives divide them into.

    No more than an estimate ("a man and a woman talk" has two parts), for datasets that come without such counts.

    >>> estimate_events(["a dog barks while rain falls", "rain, and a dog", "a dog"])
    2
    """
    counts = [max(1, sum(any(map(str.isalnum, part)) for part in _JOINTS.split(text))) for text in references]
    return int(np.median(counts))


def read_events(path: str | Path, clip_ids: Sequence[str]) -> np.ndarray:
    """Numbers of events of the clips from a CSV file with the columns `clip_id` and `events`.

    Raises:
        ValueError: if the file lacks a column or a clip.
    """
    from recap_hf.scoring import match_clips

    with open(path, encoding="utf-8-sig", newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or not {"clip_id", "events"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns clip_id and events")
    counts = np.zeros(len(clip_ids), dtype=int)
    for position, row in match_clips(clip_ids, [row["clip_id"] for row in rows]):
        counts[position] = int(rows[row]["events"])
    if not counts.all():
        raise ValueError(f"{path} has no number of events for the clip {clip_ids[int(np.argmin(counts))]!r}")
    return counts
