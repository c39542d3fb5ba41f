"""`load_captions`: any of the known datasets by name, and several joined into one."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from recap_hf.modeling.retrieval_recap import MANIFEST_NAME

from .general import load_audiofolder, load_caption_list, load_hub_dataset
from .published import load_audiocaps, load_clotho, load_recap, load_wavcaps
from .schema import CaptionData, LoadOptions, canonical_split

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
        name: `clotho`, `audiocaps`, `recap`, `wavcaps`, `audiofolder`, or a Hub dataset (`user/name[:config]`); for
            captions alone also a file of captions or the folder of a datastore.
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
    if name in NAMED_DATASETS:
        data = _LOADERS[name](options)
    elif (path := Path(name)).is_file() or (path / MANIFEST_NAME).is_file():
        data = load_caption_list(path, options)
    elif path.exists() or "/" in name:
        data = load_hub_dataset(name, options)
    else:
        hint = f"expected {', '.join(NAMED_DATASETS)}, USER/NAME of the Hub, or a file or folder that is there"
        raise ValueError(f"dataset {name!r} is unknown: {hint}")
    missing = [problem.detail for problem in data.problems if problem.kind == "missing"]
    for detail in missing:
        logger.info("%s: %s", name, detail)
    shown = "; ".join(missing[:5]) + ("; ..." if len(missing) > 5 else "")
    if missing and not allow_missing:
        counts = f"{len(missing)} clips have no audio file, {len(data.dataset)} have ({shown})"
        raise FileNotFoundError(f"dataset {name!r}: {counts}. To go on without them, give --allow-missing")
    if missing:
        logger.warning("dataset %r: going on without %d clips that have no audio file (%s)", name, len(missing), shown)
    if not len(data.dataset):
        counts = Counter(problem.kind for problem in data.problems)
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no rows"
        raise ValueError(f"dataset {name!r} has no usable clip in its {options.split} split ({reasons})")
    return data


def join(parts: Iterable[CaptionData]) -> CaptionData:
    """Several datasets as one, in the order given (the paper's third setting joins Clotho and AudioCaps)."""
    from datasets import concatenate_datasets

    parts = list(parts)
    problems = [problem for part in parts for problem in part.problems]
    return CaptionData(concatenate_datasets([part.dataset for part in parts]), problems)
