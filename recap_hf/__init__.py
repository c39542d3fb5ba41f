"""RECAP, retrieval-augmented audio captioning, for Hugging Face transformers.

Importing it registers the Auto classes and `pipeline("audio-captioning")` in transformers.
"""

from recap_hf.version import __version__

try:
    import torch  # noqa: F401
except ImportError:
    # An exported captioner (`recap onnx`) runs where torch is not installed. Everything else needs it.
    __all__ = ["__version__"]
else:
    from recap_hf.assets import default_model_path, examples_path
    from recap_hf.audio.stream import AudioStream
    from recap_hf.audio.timeline import TimelineSettings, TimelineSummary, caption_timeline
    from recap_hf.data.caption_tables import read_captions
    from recap_hf.modeling.audio_recap import load_audio
    from recap_hf.modeling.captioning_recap import Captioner, CaptionResult
    from recap_hf.modeling.configuration_recap import RecapConfig
    from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
    from recap_hf.modeling.generation_recap import RecapEncoderOutput
    from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
    from recap_hf.modeling.options_recap import CaptionOptions, PromptTemplate
    from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline
    from recap_hf.modeling.processing_recap import RecapProcessor
    from recap_hf.modeling.retrieval_recap import CaptionDatastore, open_datastore
    from recap_hf.prompts import PROMPT_PRESETS
    from recap_hf.registration import register

    register()

    __all__ = [
        "PROMPT_PRESETS",
        "AudioCaptioningPipeline",
        "AudioStream",
        "CaptionDatastore",
        "CaptionOptions",
        "CaptionResult",
        "Captioner",
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
