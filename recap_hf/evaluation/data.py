"""Test clips from the datasets of `recap_hf.data`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from recap_hf.scoring import read_clip_list

from .run import EvaluationClips


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
        max_clips: only the first so many clips; 0: all.

    Raises:
        ValueError: if no clip is left.
        FileNotFoundError: if recordings are missing and `allow_missing` is not set.
    """
    from recap_hf.data import load_captions

    data = load_captions(
        dataset, data_dir, split=split, audio_dir=audio_dir, columns=columns, allow_missing=allow_missing
    )
    table = data.dataset
    name = f"{dataset} {split}"
    if data_dir is not None and dataset == "audiofolder":
        name = f"{Path(data_dir).resolve().name} {split}"
    clips = EvaluationClips(
        name, list(table["clip_id"]), list(table["audio"]), [list(refs) for refs in table["captions"]]
    )
    missing = sum(problem.kind == "missing" for problem in data.problems)
    if missing:
        clips.notes.append(f"{missing} clips of {name} have no recording here and were left out")
    if clip_list is not None:
        listed = read_clip_list(clip_list)
        positions, absent = listed.select(clips.clip_ids, youtube_ids)
        clips = clips.select(positions, f"{name}, list {listed.name}")
        if absent:
            clips.notes.append(f"{len(absent)} clips of the list {listed.name} are not in {name} (first: {absent[0]})")
    if max_clips and len(clips) > max_clips:
        clips = clips.select(range(max_clips), f"{clips.name}, first {max_clips}")
    return clips
