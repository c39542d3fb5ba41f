"""The captioner that a run starts from, and which of its parts are trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import TrainingConfig
from .step import checkpoint_activations, fuse_activations

logger = logging.getLogger(__name__)

CONDITIONING_NAMES = {"cross_attention": "the cross-attention", "prefix": "the mapping network of the prefix"}


def assemble(config: TrainingConfig) -> tuple[Any, Any]:
    """Model and processor: from two bases, from a RECAP checkpoint, or from the embedded default's bases.

    New cross-attention, or the mapper of a new prefix, is drawn from `config.seed`.

    Raises:
        OSError, ValueError: where a part cannot be loaded or does not fit.
    """
    from recap_hf import RecapFeatureExtractor, RecapForConditionalGeneration, RecapProcessor, default_model_path

    torch.manual_seed(config.seed)
    if config.clap:
        from transformers import AutoTokenizer

        model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
            config.clap,
            config.decoder,
            cross_attention_reduce_factor=config.cross_attention_reduce_factor,
            **_conditioning(config, config.conditioning or "cross_attention"),
        )
        tokenizer, clap_tokenizer = (AutoTokenizer.from_pretrained(name) for name in (config.decoder, config.clap))
        try:
            feature_extractor = RecapFeatureExtractor.from_clap_pretrained(config.clap)
        except OSError:
            logger.warning("No mel settings beside %s: ClapFeatureExtractor's defaults, 0 to 14 kHz", config.clap)
            feature_extractor = None
        processor = RecapProcessor.from_config(
            model.config, tokenizer, clap_tokenizer, feature_extractor=feature_extractor
        )
    else:
        name = config.model or default_model_path()
        if not config.model and not Path(name).is_dir():
            raise FileNotFoundError(
                "this installation has no embedded model: name one with --model, or --clap and --decoder"
            )
        model = RecapForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
        processor = RecapProcessor.from_pretrained(name)
        if config.conditioning not in ("", model.config.conditioning):
            model = _with_other_conditioning(model, processor, config)
        elif not (bool(config.model) if config.keep_cross_attention is None else config.keep_cross_attention):
            reset_conditioning(model, config.seed)
    if config.audio_position_embedding:
        wanted = config.audio_position_embedding
        model.config.audio_position_embedding = None if wanted == "none" else wanted
    processor.num_retrieved_captions = config.num_retrieved
    model.set_attn_implementation(config.attn_implementation)
    return model.eval(), processor


# What a captioner takes along into another conditioning.
_KEPT_SETTINGS = (
    "window_length_s",
    "audio_position_embedding",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _conditioning(config: TrainingConfig, name: str) -> dict[str, Any]:
    lengths = {"prefix_length": config.prefix_length, "prefix_num_layers": config.prefix_num_layers}
    return {"conditioning": name, **(lengths if name == "prefix" else {})}


def _with_other_conditioning(model: Any, processor: Any, config: TrainingConfig) -> Any:
    """The same CLAP and language model, conditioned in another way; the processor leaves room for a prefix."""
    from recap_hf import RecapForConditionalGeneration

    if config.keep_cross_attention:
        raise ValueError(
            f"--keep-cross-attention goes on with what the checkpoint has, which is {model.config.conditioning}: "
            f"not together with --conditioning {config.conditioning}"
        )
    kept = {name: getattr(model.config, name) for name in _KEPT_SETTINGS}
    torch.manual_seed(config.seed)
    changed = RecapForConditionalGeneration.from_clap_gpt2_pretrained(
        model.clap,
        model.decoder,
        cross_attention_reduce_factor=config.cross_attention_reduce_factor,
        **_conditioning(config, config.conditioning),
        **kept,
    )
    changed.generation_config = model.generation_config
    processor.max_prompt_tokens += model.config.prefix_places - changed.config.prefix_places
    return changed


def reset_conditioning(model: Any, seed: int) -> None:
    """Draws the cross-attention, or the mapper of the prefix, anew, as in an untrained captioner."""
    torch.manual_seed(seed)
    for module in model.conditioning_modules():
        for parameter in module.parameters():
            # Loaded weights bear a mark that keeps transformers from initialising them.
            parameter._is_hf_initialized = False
        module.apply(model._init_weights if model.prefix_mapper is not None else model.decoder._init_weights)


def prepare_for_training(model: Any, config: TrainingConfig) -> dict[str, nn.Parameter]:
    """Freezes what is not trained and sets the dropout; returns the trained parameters by name."""
    count = model.freeze_base()
    if config.train_decoder:
        for parameter in model.decoder.parameters():
            parameter.requires_grad_(True)
    fuse_activations(model.decoder)
    if config.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Dropout):
            # A frozen language model is not regularised by noise in it.
            trained = config.train_decoder or ".crossattention." in name
            module.p = config.dropout if trained else 0.0
    part = CONDITIONING_NAMES[model.config.conditioning]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum(parameter.numel() for parameter in model.decoder.parameters())
    logger.info(
        "Training %s parameters (%.1f %% of the decoder's %s)%s",
        f"{sum(p.numel() for p in trained.values()):,}",
        100 * sum(p.numel() for p in trained.values()) / total,
        f"{total:,}",
        f": {part} ({count:,}) and the language model" if config.train_decoder else f": {part}",
    )
    return trained


def load_trained(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Puts saved trained weights back.

    Raises:
        ValueError: where they are not those of this model.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(weights) - set(parameters))
    if unknown:
        raise ValueError(f"the checkpoint holds weights that this model does not have: {', '.join(unknown[:5])}")
    with torch.no_grad():
        for name, tensor in weights.items():
            if tensor.shape != parameters[name].shape:
                raise ValueError(
                    f"the checkpoint's {name} has the shape {tuple(tensor.shape)}, "
                    f"the model's {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(tensor)
