"""Makes transformers know RECAP: Auto classes and `pipeline("audio-captioning")`, whichever is imported first.

`import recap_hf` must cost nothing, and importing transformers' auto and pipeline modules takes seconds. So nothing is
imported here: a part is registered when the module of transformers that keeps it has been imported, at once if that
has happened already, else right after it does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from recap_hf.assets import default_model_path

TASK = "audio-captioning"
# All of transformers and not the auto modules alone: these are imported while others, which our classes need whole,
# are half complete (5.17: `from transformers import ClapModel` begins in modeling_layers, which imports auto modules).
_WATCHED = ("transformers.", "recap_hf.modeling.")


def _register_config(module: ModuleType) -> None:
    from recap_hf.modeling.configuration_recap import RecapConfig

    module.AutoConfig.register(RecapConfig.model_type, RecapConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from recap_hf.modeling.configuration_recap import RecapConfig
    from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration

    for auto_class in (module.AutoModel, module.AutoModelForSpeechSeq2Seq):
        auto_class.register(RecapConfig, RecapForConditionalGeneration, exist_ok=True)


def _register_feature_extractor(module: ModuleType) -> None:
    from recap_hf.modeling.configuration_recap import RecapConfig
    from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor

    module.AutoFeatureExtractor.register(RecapConfig, RecapFeatureExtractor, exist_ok=True)


def _register_processor(module: ModuleType) -> None:
    # A processor is put together from a feature extractor: that one has to be known first.
    importlib.import_module("transformers.models.auto.feature_extraction_auto")
    from recap_hf.modeling.configuration_recap import RecapConfig
    from recap_hf.modeling.processing_recap import RecapProcessor

    module.AutoProcessor.register(RecapConfig, RecapProcessor, exist_ok=True)


def _register_pipeline(module: ModuleType) -> None:
    from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline

    if TASK in module.PIPELINE_REGISTRY.get_supported_tasks():
        return
    from transformers import AutoModelForSpeechSeq2Seq

    module.PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=AudioCaptioningPipeline,
        pt_model=AutoModelForSpeechSeq2Seq,
        default={"model": (str(default_model_path()), "main")},
        type="multimodal",
    )


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.feature_extraction_auto": _register_feature_extractor,
    "transformers.models.auto.processing_auto": _register_processor,
    "transformers.pipelines": _register_pipeline,
}


class _RegisteringLoader(Loader):
    """Loads a module of transformers as its own loader does, then registers what belongs there."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever inspects the module later finds its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _executing.append(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            _executing.remove(module.__name__)
        if module.__name__ in _REGISTRATIONS:
            _imported.append(module)
        _register_imported()


class _RegisteringFinder(MetaPathFinder):
    """Stands before the other finders for the modules of transformers and our own, and lets them find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_WATCHED):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


_executing: list[str] = []
_imported: list[ModuleType] = []


def _register_imported() -> None:
    # transformers' modules import each other, and ours import them: all wait for the outermost to be complete.
    while _imported and not _executing:
        module = _imported.pop(0)
        _REGISTRATIONS[module.__name__](module)


def install() -> None:
    """Registers what transformers has imported already and waits for the rest. Calling it again changes nothing."""
    _imported.extend(sys.modules[name] for name in _REGISTRATIONS if name in sys.modules)
    if not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())
    _register_imported()
