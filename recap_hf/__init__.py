"""RECAP, retrieval-augmented audio captioning, for Hugging Face transformers.

Importing this package is quick and quiet: its names are loaded when they are first used, and transformers learns of
its Auto classes and of `pipeline("audio-captioning")` when it is imported, before or after.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recap_hf.registration import install as _install
from recap_hf.version import __version__

if TYPE_CHECKING:
    from recap_hf.assets import default_model_path, examples_path
    from recap_hf.modeling.audio_recap import load_audio
    from recap_hf.modeling.audio_stream_recap import AudioStream
    from recap_hf.modeling.captions_recap import open_datastore, read_captions
    from recap_hf.modeling.configuration_recap import RecapConfig
    from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
    from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
    from recap_hf.modeling.outputs_recap import RecapEncoderOutput
    from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline
    from recap_hf.modeling.processing_recap import RecapProcessor
    from recap_hf.modeling.prompt_recap import PROMPT_PRESETS, PromptTemplate
    from recap_hf.modeling.retrieval_recap import CaptionDatastore
    from recap_hf.modeling.timeline_recap import TimelineSettings, TimelineSummary, caption_timeline

_MODULES = {
    "AudioCaptioningPipeline": "recap_hf.modeling.pipeline_recap",
    "AudioStream": "recap_hf.modeling.audio_stream_recap",
    "CaptionDatastore": "recap_hf.modeling.retrieval_recap",
    "PROMPT_PRESETS": "recap_hf.modeling.prompt_recap",
    "PromptTemplate": "recap_hf.modeling.prompt_recap",
    "RecapConfig": "recap_hf.modeling.configuration_recap",
    "RecapEncoderOutput": "recap_hf.modeling.outputs_recap",
    "RecapFeatureExtractor": "recap_hf.modeling.feature_extraction_recap",
    "RecapForConditionalGeneration": "recap_hf.modeling.modeling_recap",
    "RecapProcessor": "recap_hf.modeling.processing_recap",
    "TimelineSettings": "recap_hf.modeling.timeline_recap",
    "TimelineSummary": "recap_hf.modeling.timeline_recap",
    "caption_timeline": "recap_hf.modeling.timeline_recap",
    "default_model_path": "recap_hf.assets",
    "examples_path": "recap_hf.assets",
    "load_audio": "recap_hf.modeling.audio_recap",
    "open_datastore": "recap_hf.modeling.captions_recap",
    "read_captions": "recap_hf.modeling.captions_recap",
}

__all__ = [
    "PROMPT_PRESETS",
    "AudioCaptioningPipeline",
    "AudioStream",
    "CaptionDatastore",
    "PromptTemplate",
    "RecapConfig",
    "RecapEncoderOutput",
    "RecapFeatureExtractor",
    "RecapForConditionalGeneration",
    "RecapProcessor",
    "TimelineSettings",
    "TimelineSummary",
    "__version__",
    "caption_timeline",
    "default_model_path",
    "examples_path",
    "load_audio",
    "open_datastore",
    "read_captions",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
