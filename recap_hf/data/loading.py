"""`load_captions`: any of the known datasets by name, and several joined into one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from .general import load_audiofolder, load_hub_dataset
from .published import load_audiocaps, load_clotho, load_recap, load_wavcaps
from .schema import CaptionData, LoadOptions, Problem, canonical_split

logger = logging.getLogger(__name__)

_LOADERS = {
    "clotho": load_clotho,
    "audiocaps": load_audiocaps,
    "recap": load_recap,
    "wavcaps": load_wavcaps,
    "audiofolder": load_audiofolder,
}
NAMED_DATASETS = tuple(_LOADERS)


def load_captions(
    name: str,
    data_dir: str | Path | None = None,
    *,
    split: str = "train",
    audio_dir: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    needs_audio: bool = True,
) -> CaptionData:
    """A captioned dataset in the common table (see `recap_hf.data.schema`).

    Args:
        name: `clotho`, `audiocaps`, `recap`, `wavcaps`, `audiofolder`, or a Hub dataset (`user/name[:config]`).
        data_dir: folder of the dataset; needed for the five named ones.
        split: `train`, `validation` or `test`, or the dataset's own name for it.
        audio_dir: folder with the audio, if it is not with the captions.
        columns: our column name -> the dataset's.
        allow_missing: continue without the clips that have no audio file; they are listed in `problems`.
        needs_audio: False reads the captions alone.

    Raises:
        ValueError: for an unknown split, wrong columns, or no usable clip.
        FileNotFoundError: for files that are not there, or missing clips without `allow_missing`.
    """
    options = LoadOptions(data_dir, canonical_split(split), audio_dir, columns, needs_audio)
    if name in NAMED_DATASETS and data_dir is None:
        raise ValueError(f"dataset {name!r} is read from a folder: give it with --data-dir")
    data = _LOADERS[name](options) if name in NAMED_DATASETS else load_hub_dataset(name, options)
    refuse_missing(data.problems, len(data.dataset), name, allow_missing)
    if not len(data.dataset):
        raise ValueError(
            f"dataset {name!r} has no usable clip in its {options.split} split ({_summary(data.problems)})"
        )
    return data


def join(parts: Iterable[CaptionData]) -> CaptionData:
    """Several datasets as one, in the order given (the paper's third setting joins Clotho and AudioCaps)."""
    from datasets import concatenate_datasets

    parts = list(parts)
    problems = [problem for part in parts for problem in part.problems]
    return CaptionData(concatenate_datasets([part.dataset for part in parts]), problems)


def refuse_missing(problems: list[Problem], clips: int, name: str, allow_missing: bool) -> None:
    """Stop at missing audio unless that is allowed; a list of all of them goes to the log either way."""
    missing = [problem for problem in problems if problem.kind == "missing"]
    if not missing:
        return
    for problem in missing:
        logger.info("%s: %s", name, problem.detail)
    shown = "; ".join(problem.detail for problem in missing[:5]) + ("; ..." if len(missing) > 5 else "")
    if not allow_missing:
        raise FileNotFoundError(
            f"dataset {name!r}: {len(missing)} clips have no audio file, {clips} have ({shown}). "
            "To go on without them, give --allow-missing"
        )
    logger.warning("dataset %r: going on without %d clips that have no audio file (%s)", name, len(missing), shown)


def _summary(problems: list[Problem]) -> str:
    kinds = [problem.kind for problem in problems]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "no rows"
