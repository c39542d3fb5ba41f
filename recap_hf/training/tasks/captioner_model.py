"""The captioner that a run starts from, and the parts of it that are trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..loss import checkpoint_activations, fuse_activations

if TYPE_CHECKING:
    from .captioner import CaptionerTrainingConfig

logger = logging.getLogger(__name__)

CONDITIONING_NAMES = {"cross_attention": "cross-attention", "prefix": "mapping network of the prefix"}


def new_captioner(config: CaptionerTrainingConfig) -> tuple[Any, Any]:
    """Model and processor: of two bases, of a RECAP checkpoint, or of the embedded model's bases.

    New cross-attention, or the mapper of a new prefix, is drawn from `config.seed`.

    Raises:
        OSError, ValueError: if a part cannot be loaded or does not fit.
    """
    from recap_hf import RecapForConditionalGeneration, RecapProcessor, default_model_path

    if config.clap:
        model, processor = _from_bases(config)
    else:
        name = config.model or default_model_path()
        if not config.model and not Path(name).is_dir():
            raise FileNotFoundError(
                "this installation has no embedded model: name one with --model, or --clap and --decoder"
            )
        model = RecapForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
        processor = RecapProcessor.from_pretrained(name)
        keep = bool(config.model) if config.keep_cross_attention is None else config.keep_cross_attention
        if config.conditioning not in ("", model.config.conditioning):
            model = _with_other_conditioning(model, processor, config)
        elif not keep:
            reset_conditioning(model, config.seed)
    if config.audio_position_embedding:
        wanted = config.audio_position_embedding
        model.config.audio_position_embedding = None if wanted == "none" else wanted
    processor.num_retrieved_captions = config.num_retrieved
    model.set_attn_implementation(config.attn_implementation)
    return model.eval(), processor


def _from_bases(config: CaptionerTrainingConfig) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from recap_hf import RecapFeatureExtractor, RecapProcessor

    model = _combine(config.clap, config.decoder, config)
    tokenizer, clap_tokenizer = (AutoTokenizer.from_pretrained(name) for name in (config.decoder, config.clap))
    try:
        extractor = RecapFeatureExtractor.from_clap_pretrained(config.clap)
    except OSError:
        logger.warning("No mel settings with %s: those of ClapFeatureExtractor, 0 to 14 kHz, are used", config.clap)
        extractor = None
    return model, RecapProcessor.from_config(model.config, tokenizer, clap_tokenizer, feature_extractor=extractor)


def _combine(clap: Any, decoder: Any, config: CaptionerTrainingConfig, **settings: Any) -> Any:
    from recap_hf import RecapForConditionalGeneration

    conditioning = {"conditioning": config.conditioning or "cross_attention"}
    if config.conditioning == "prefix":
        conditioning |= {"prefix_length": config.prefix_length, "prefix_num_layers": config.prefix_num_layers}
    torch.manual_seed(config.seed)
    factor = config.cross_attention_reduce_factor
    return RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        clap, decoder, cross_attention_reduce_factor=factor, **conditioning, **settings
    )


# What the configuration of a captioner keeps with another conditioning.
_KEPT_SETTINGS = ("window_length_s", "audio_position_embedding", "pad_token_id", "bos_token_id", "eos_token_id")


def _with_other_conditioning(model: Any, processor: Any, config: CaptionerTrainingConfig) -> Any:
    """The same CLAP and language model with another conditioning; the processor leaves room for a prefix."""
    if config.keep_cross_attention:
        raise ValueError(
            f"--keep-cross-attention continues with what the checkpoint has, which is {model.config.conditioning}: "
            f"not together with --conditioning {config.conditioning}"
        )
    kept = {name: getattr(model.config, name) for name in _KEPT_SETTINGS}
    changed = _combine(model.clap, model.decoder, config, **kept)
    changed.generation_config = model.generation_config
    processor.max_prompt_tokens += model.config.prefix_places - changed.config.prefix_places
    return changed


def reset_conditioning(model: Any, seed: int) -> None:
    """Draw the cross-attention, or the mapper of the prefix, again, as in an untrained captioner."""
    torch.manual_seed(seed)
    for module in model.conditioning_modules():
        for parameter in module.parameters():
            # A mark of loaded weights, with which transformers does not initialise them.
            parameter._is_hf_initialized = False
        module.apply(model._init_weights if model.prefix_mapper is not None else model.decoder._init_weights)


def prepare_for_training(model: Any, config: CaptionerTrainingConfig) -> None:
    """Freeze what is not trained, and set dropout and checkpointing."""
    model.freeze_base()
    if config.train_decoder:
        model.decoder.requires_grad_(True)
    fuse_activations(model.decoder)
    if config.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Dropout):
            # A frozen language model is not regularised by noise in it.
            trained = config.train_decoder or ".crossattention." in name
            module.p = config.dropout if trained else 0.0
