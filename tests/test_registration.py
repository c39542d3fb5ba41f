"""transformers knows RECAP whichever is imported first, and importing it is quiet."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
import recap_hf
assert CONFIG_MAPPING["recap"] is recap_hf.RecapConfig
for auto in (AutoModel, AutoModelForSpeechSeq2Seq):
    assert auto._model_mapping[recap_hf.RecapConfig] is recap_hf.RecapForConditionalGeneration
assert PROCESSOR_MAPPING[recap_hf.RecapConfig] is recap_hf.RecapProcessor
assert FEATURE_EXTRACTOR_MAPPING[recap_hf.RecapConfig] is recap_hf.RecapFeatureExtractor
task = PIPELINE_REGISTRY.supported_tasks["audio-captioning"]
assert task["impl"] is recap_hf.AudioCaptioningPipeline
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "first",
    [
        "import recap_hf",
        "import transformers, recap_hf; transformers.AutoModel",
        "from transformers import pipeline; import recap_hf",
        "import recap_hf; recap_hf.RecapConfig",
        "from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration",
        "import recap_hf; from transformers import AutoProcessor",
        "import recap_hf; from transformers import ClapProcessor",
        "import recap_hf; from transformers import ClapModel",
        "import recap_hf; import transformers.quantizers.auto",
    ],
)
def test_either_import_order(first):
    process = python(f"{first}\n{CHECK}")
    assert process.returncode == 0, process.stderr


def test_importing_is_quiet():
    process = python("import recap_hf")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_every_public_name_exists():
    import recap_hf

    for name in recap_hf.__all__:
        assert getattr(recap_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        recap_hf.nothing  # noqa: B018


def test_help_needs_neither_torch_nor_transformers():
    process = python(
        "import sys\nfrom recap_cli import main\n"
        "for words in (['--help'], ['caption', '--help'], ['timeline', '--help'], ['explain', '--help']):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'recap_hf'} & set(sys.modules)\n"
    )
    assert process.returncode == 0, process.stderr
    assert "--retrieval-diversity" in process.stdout
