"""What every loader is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadOptions:
    """Options shared by the loaders.

    Args:
        data_dir: folder with the caption files as published, or one caption file.
        split: `train`, `validation` or `test`.
        audio_dir: folder with the audio where it does not lie beside the captions.
        columns: our column name -> the dataset's.
        needs_audio: False reads captions alone (for datastores and text-only checks).
    """

    data_dir: str | Path | None = None
    split: str = "train"
    audio_dir: str | Path | None = None
    columns: Mapping[str, str] | None = None
    needs_audio: bool = True
