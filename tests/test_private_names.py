"""The private names of transformers and torch that this package relies on, each with what it must do.

A release that changes one of them fails here, with its name. Anything not listed is public, or not to be used.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel, Pipeline, ProcessorMixin
from transformers.utils import cached_file


def test_prepare_decoder_input_ids_for_generation():
    """generation_recap.py overrides it: the stock hook puts a start token before prompts."""
    names = list(inspect.signature(GenerationMixin._prepare_decoder_input_ids_for_generation).parameters)
    assert names[:4] == ["self", "batch_size", "model_input_name", "model_kwargs"]
    source = inspect.getsource(GenerationMixin.generate)
    assert "input_ids, model_kwargs = self._prepare_decoder_input_ids_for_generation(" in source


def test_init_weights_of_gpt2():
    """modeling_recap.py and training initialise a new cross-attention as GPT-2 does, scaled by depth."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=50))
    layer = model.transformer.h[0].attn.c_proj
    torch.manual_seed(0)
    layer.weight._is_hf_initialized = False
    model.transformer.h[0].attn.apply(model._init_weights)
    assert layer.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)


def test_attn_implementation():
    """modeling_recap.py sets CLAP's, and reports the decoder's as its own."""
    config = GPT2Config()
    config._attn_implementation = "eager"
    assert config._attn_implementation == config._attn_implementation_internal == "eager"


def test_cached_file_without_exceptions(tmp_path):
    """processing_recap.py asks whether a checkpoint on the Hub has a datastore."""
    options = {"subfolder": "datastore", "_raise_exceptions_for_missing_entries": False}
    assert cached_file(str(tmp_path), "datastore.json", **options) is None


def test_load_tokenizer_from_pretrained():
    """processing_recap.py overrides it: the stock one takes the decoder's tokenizer where CLAP's is damaged."""
    names = list(inspect.signature(ProcessorMixin._load_tokenizer_from_pretrained).parameters)
    assert names[:3] == ["sub_processor_type", "pretrained_model_name_or_path", "subfolder"]
    assert "cls._load_tokenizer_from_pretrained(" in inspect.getsource(ProcessorMixin._get_arguments_from_pretrained)


def test_parameters_of_a_pipeline():
    """pipeline_recap.py reads what it was made with."""
    names = ("_preprocess_params", "_forward_params", "_postprocess_params", "_batch_size")
    assert all(name in inspect.getsource(Pipeline.__init__) for name in names)
    for name in ("_load_processor", "_load_tokenizer", "_load_feature_extractor", "_load_image_processor"):
        assert name in vars(Pipeline)


def test_hooks_of_a_module():
    """fast_generation leaves a decoder with hooks to transformers."""
    layer = torch.nn.Linear(1, 1)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    layer.register_forward_hook(print)
    layer.register_forward_pre_hook(print)
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_packed_weights():
    """cpu_weights.py multiplies through them where the processor can."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    for module, name in (
        (torch.ops.mkldnn, "_reorder_linear_weight"),
        (torch.ops.mkldnn, "_linear_pointwise"),
        (torch.ops.onednn, "qlinear_prepack"),
        (torch.ops.onednn, "qlinear_pointwise"),
    ):
        assert callable(getattr(module, name))
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
