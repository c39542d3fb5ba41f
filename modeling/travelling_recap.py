"""What a saved folder needs so that `trust_remote_code=True` can load it where the package is not installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_recap.RecapConfig",
    "AutoModel": "modeling_recap.RecapForConditionalGeneration",
    "AutoModelForSpeechSeq2Seq": "modeling_recap.RecapForConditionalGeneration",
    "AutoFeatureExtractor": "feature_extraction_recap.RecapFeatureExtractor",
    "AutoProcessor": "processing_recap.RecapProcessor",
}
PIPELINE_TASK = "audio-captioning"
CUSTOM_PIPELINES = {
    PIPELINE_TASK: {
        "impl": "pipeline_recap.AudioCaptioningPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
        "type": "multimodal",
    }
}


def travelling_files() -> list[Path]:
    """The source files that travel, sorted: those beside this one, whether installed or already travelled."""
    return sorted(Path(__file__).parent.glob("*_recap.py"))


def copy_travelling_files(folder: str | os.PathLike) -> None:
    """Copies the travelling source files into `folder`."""
    folder = Path(folder)
    for source in travelling_files():
        target = folder / source.name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def complete_tokenizer_folder(folder: str | os.PathLike) -> None:
    """Puts an empty config.json beside the CLAP tokenizer of a saved processor, if there is none.

    AutoTokenizer asks for one. In an offline cache it takes a missing file for a broken download, and transformers
    then quietly loads the decoder's tokenizer in the place of CLAP's.
    """
    path = Path(folder) / "clap_tokenizer" / "config.json"
    if path.parent.is_dir() and not path.exists():
        path.write_text("{}\n", encoding="utf-8")


__all__ = [
    "AUTO_MAP",
    "CUSTOM_PIPELINES",
    "PIPELINE_TASK",
    "complete_tokenizer_folder",
    "copy_travelling_files",
    "travelling_files",
]
