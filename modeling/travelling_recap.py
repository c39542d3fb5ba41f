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


__all__ = ["AUTO_MAP", "CUSTOM_PIPELINES", "PIPELINE_TASK", "copy_travelling_files", "travelling_files"]
