"""Test clips: from the datasets of `recap_hf.data`, read in batches, with their numbers of events."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.data import load_captions
from recap_hf.data.caption_tables import read_rows
from recap_hf.scoring import match_clips, select_listed
from recap_hf.streaming import read_ahead

# Words that join two events in a caption: "a dog barks and a car passes, then rain falls".
_JOINTS = re.compile(r",|;|\b(?:and|while|as|then|followed by|with|before|after|over|amid)\b", re.IGNORECASE)


@dataclass
class EvaluationClips:
    """The clips to caption: names, recordings (not decoded) and references, one entry per clip.

    `name` identifies the list of clips in every table.
    """

    name: str
    clip_ids: list[str]
    audio: list[Any]
    references: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def select(self, positions: Sequence[int], name: str | None = None) -> "EvaluationClips":
        """The clips at `positions`."""
        columns = [[column[n] for n in positions] for column in (self.clip_ids, self.audio, self.references)]
        return EvaluationClips(name or self.name, *columns, list(self.notes))

    def batches(self, start: int, batch_size: int, read: Callable) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Positions and waveforms of batches from clip `start` on; the next batch is read ahead.

        Args:
            start: first clip.
            batch_size: clips per batch.
            read: from a recording to a waveform, such as `Captioner.read`.

        Raises:
            ValueError: if a recording cannot be read; the message names its clip.
        """

        def read_clip(number: int) -> np.ndarray:
            try:
                return read(self.audio[number])
            except (ValueError, OSError) as error:
                raise ValueError(f"the recording of clip {self.clip_ids[number]!r} cannot be read: {error}") from error

        waveforms = (waveform for _, waveform in read_ahead(read_clip, range(start, len(self)), batch_size))
        for first in range(start, len(self), batch_size):
            yield first, list(islice(waveforms, batch_size))


def load_test_clips(
    dataset: str,
    data_dir: str | os.PathLike | None = None,
    *,
    split: str = "test",
    audio_dir: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    clip_list: str | os.PathLike | None = None,
    youtube_ids: bool = False,
    max_clips: int = 0,
) -> EvaluationClips:
    """The clips of one split with their references, in the order of the dataset.

    Args:
        dataset, data_dir, split, audio_dir, columns, allow_missing: see `recap_hf.data.load_captions`.
        clip_list: file with the names of the clips to keep, see `recap_hf.scoring.read_clip_list`.
        youtube_ids: compare the names by YouTube id alone.
        max_clips: keep only the first clips, this many; 0: all.

    Raises:
        ValueError: if no clip is left.
        FileNotFoundError: if recordings are missing and `allow_missing` is not set.
    """
    options = {"audio_dir": audio_dir, "columns": columns, "allow_missing": allow_missing}
    data = load_captions(dataset, data_dir, split=split, **options)
    table = data.dataset
    source = Path(data_dir).resolve().name if data_dir is not None and dataset == "audiofolder" else dataset
    name = f"{source} {split}"
    references = [list(refs) for refs in table["captions"]]
    clips = EvaluationClips(name, list(table["clip_id"]), list(table["audio"]), references)
    missing = sum(problem.kind == "missing" for problem in data.problems)
    if missing:
        clips.notes.append(f"{missing} clips of {name} have no recording here and were left out")
    if clip_list is not None:
        positions, notes = select_listed(clips.clip_ids, clip_list, name, youtube_ids)
        clips = clips.select(positions, f"{name}, list {Path(clip_list).stem}")
        clips.notes += notes
    if max_clips and len(clips) > max_clips:
        clips = clips.select(range(max_clips), f"{clips.name}, first {max_clips}")
    return clips


def estimate_events(references: Sequence[str]) -> int:
    """Number of events that a clip's references name: the median number of parts between connectives.

    An estimate ("a man and a woman talk" has two parts), for datasets without such counts.

    >>> estimate_events(["a dog barks while rain falls", "rain, and a dog", "a dog"])
    2
    """
    counts = [max(1, sum(any(map(str.isalnum, part)) for part in _JOINTS.split(text))) for text in references]
    return int(np.median(counts))


def read_events(path: str | os.PathLike, clip_ids: Sequence[str]) -> np.ndarray:
    """(num_clips,) numbers of events of the clips, from a table with the columns `clip_id` and `events`.

    Raises:
        ValueError: if the table lacks a column or a clip.
    """
    rows = list(read_rows(path))
    if not rows or not {"clip_id", "events"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns clip_id and events")
    counts = np.zeros(len(clip_ids), dtype=int)
    for position, row in match_clips(clip_ids, [row["clip_id"] for row in rows]):
        counts[position] = int(rows[row]["events"])
    if not counts.all():
        raise ValueError(f"{path} has no number of events for the clip {clip_ids[int(np.argmin(counts))]!r}")
    return counts
