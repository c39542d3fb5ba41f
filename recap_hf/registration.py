"""What `import recap_hf` registers in transformers: the Auto classes and `pipeline("audio-captioning")`."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from recap_hf.assets import default_model_path
from recap_hf.modeling.configuration_recap import PIPELINE_TASK, RecapConfig
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapConfig, MobileNetClapModel
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline
from recap_hf.modeling.processing_recap import RecapProcessor


def register() -> None:
    """Registers the classes of this package. Calling it again changes nothing."""
    # The pipeline of this package is used, not the one in a checkpoint's folder.
    RecapConfig.is_remote_code = False
    AutoConfig.register(RecapConfig.model_type, RecapConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSpeechSeq2Seq):
        auto_class.register(RecapConfig, RecapForConditionalGeneration, exist_ok=True)
    AutoConfig.register(MobileNetClapConfig.model_type, MobileNetClapConfig, exist_ok=True)
    AutoModel.register(MobileNetClapConfig, MobileNetClapModel, exist_ok=True)
    AutoFeatureExtractor.register(MobileNetClapConfig, RecapFeatureExtractor, exist_ok=True)
    AutoFeatureExtractor.register(RecapConfig, RecapFeatureExtractor, exist_ok=True)
    AutoProcessor.register(RecapConfig, RecapProcessor, exist_ok=True)
    if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            PIPELINE_TASK,
            pipeline_class=AudioCaptioningPipeline,
            pt_model=AutoModelForSpeechSeq2Seq,
            default={"model": (str(default_model_path()), "main")},
            type="multimodal",
        )
