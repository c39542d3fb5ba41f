"""The folders behind `recap convert`: built, saved, and loaded again before they appear."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, ClapModel, GPT2LMHeadModel

from recap_hf.modeling.configuration_recap import RecapConfig
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.processing_recap import RecapProcessor

from .output import finished_folder
from .recap_original import (
    convert_recap_original_state_dict,
    processor_settings_from_original,
    read_recap_original_config,
    recap_config_from_original,
)
from .state_dicts import (
    ConversionError,
    check_complete,
    check_saved,
    fill,
    floating_dtype,
    read_checkpoint_folder,
    require_cross_attention,
)
from .stock import stock_decoder, stock_parts

CROSS_ATTENTION_FILE = "cross_attention.safetensors"


def convert_recap_original(
    source: str | Path,
    out: str | Path,
    clap: str | Path,
    tokenizer: str | Path | None = None,
    clap_tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, object]:
    """Convert a checkpoint folder of the authors' code into a RECAP folder.

    Args:
        source: their checkpoint, with ``config.json`` and ``pytorch_model.bin`` or ``model.safetensors``.
        out: folder to make.
        clap: folder or Hub id of the CLAP that the training started from: its text tower and projections are in no
            checkpoint of theirs.
        tokenizer: folder or Hub id of the decoder's tokenizer (``gpt2``); without it no processor is saved.
        clap_tokenizer: the same for CLAP's; default: `clap`.
        overwrite: replace an existing folder.

    Returns:
        What was done: sizes, prompt settings, and whether a processor was saved.

    Raises:
        ConversionError: the checkpoint does not fit; nothing is written.
    """
    original = read_recap_original_config(source)
    state = read_checkpoint_folder(source)
    clap_model = ClapModel.from_pretrained(clap)
    config = recap_config_from_original(state, original, clap_model)
    settings = processor_settings_from_original(original)
    converted = convert_recap_original_state_dict(state, clap_model, config)
    with torch.device("meta"):
        model = RecapForConditionalGeneration(config)
    model = fill(model, converted, floating_dtype(converted))
    model.tie_weights()
    processor = None
    if tokenizer is not None:
        ids = {"pad_token": config.pad_token_id, "eos_token": config.eos_token_id}
        processor = _processor(config, tokenizer, clap, clap_tokenizer or clap, ids, settings)
    _save(model, processor, out, overwrite)
    return {
        **_sizes(model),
        "num_retrieved_captions": settings["num_retrieved_captions"],
        "prompt_template": settings["prompt_template"],
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "processor": processor is not None,
    }


def convert_stock(
    clap: str | Path,
    decoder: str | Path,
    out: str | Path,
    cross_attention: str | Path | None = None,
    factor: int = 4,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    clap_tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, object]:
    """Put a stock CLAP and a stock GPT-2 together into a RECAP folder.

    Args:
        clap, decoder: folders or Hub ids of a `ClapModel` and a `GPT2LMHeadModel`.
        out: folder to make.
        cross_attention: the file that `convert_to_stock` wrote; without it the cross-attention is new and untrained.
        factor: `cross_attention_reduce_factor` of a new cross-attention.
        seed: of its random weights.
        tokenizer, clap_tokenizer: default: those beside `decoder` and `clap`, where there are any.
        overwrite: replace an existing folder.

    Raises:
        ConversionError: the parts do not fit; nothing is written.
    """
    settings = {"cross_attention_reduce_factor": factor}
    prompt: dict[str, object] = {}
    cross = None
    if cross_attention is not None:
        cross, saved = read_cross_attention(cross_attention)
        prompt = {key: value for key, value in saved.items() if key in _PROCESSOR_SETTINGS}
        settings = {key: value for key, value in saved.items() if key in _CONFIG_SETTINGS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(clap, decoder, **settings)
    if cross is not None:
        wanted = {key: value for key, value in model.decoder.state_dict().items() if "cross" in key}
        check_complete(cross, wanted, subject=f"{cross_attention}")
        model.decoder.load_state_dict(cross, strict=False)
    tokenizer = tokenizer or _beside(decoder)
    clap_tokenizer = clap_tokenizer or _beside(clap)
    processor = None
    if tokenizer and clap_tokenizer:
        ids = {"pad_token": settings.get("pad_token_id"), "eos_token": settings.get("eos_token_id")}
        processor = _processor(model.config, tokenizer, clap, clap_tokenizer, ids, prompt)
    _save(model, processor, out, overwrite)
    return {**_sizes(model), "trained_cross_attention": cross is not None, "processor": processor is not None}


def convert_to_stock(source: str | Path, out: str | Path, inside: bool = False, overwrite: bool = False) -> dict:
    """Take a RECAP folder apart into ``clap/``, ``decoder/`` and ``cross_attention.safetensors``.

    `ClapModel` and `GPT2LMHeadModel` load the two folders without this package; `convert_stock` puts the three
    together again, bit by bit the same.

    Args:
        source: folder or Hub id of a RECAP model.
        out: folder to make.
        inside: write the cross-attention into ``decoder/`` as well, as wide as stock GPT-2 has it: that folder then
            gives the logits of the RECAP model. Needs an encoder as wide as the decoder.
        overwrite: replace an existing folder.

    Raises:
        ConversionError: the model is conditioned by a prefix, or its widths differ; nothing is written.
    """
    model = RecapForConditionalGeneration.from_pretrained(source)
    require_cross_attention(model.config, "taking a captioner apart into stock layouts")
    clap, decoder, cross = stock_parts(model)
    if inside:
        decoder = stock_decoder(model)
    processor = RecapProcessor.from_pretrained(source) if _has_processor(source) else None
    values = {key: getattr(model.config, key) for key in _CONFIG_SETTINGS}
    values |= {key: getattr(processor, key) for key in _PROCESSOR_SETTINGS} if processor else {}
    settings = {key: str(value) for key, value in values.items() if value is not None}
    cross = {key: value.contiguous() for key, value in cross.items()}
    with finished_folder(out, overwrite) as folder:
        clap.save_pretrained(folder / "clap")
        decoder.save_pretrained(folder / "decoder")
        save_file(cross, folder / CROSS_ATTENTION_FILE, metadata=settings)
        if processor:
            # Tokenizers and mel settings beside the parts that they belong to.
            processor.tokenizer.save_pretrained(folder / "decoder")
            processor.clap_tokenizer.save_pretrained(folder / "clap")
            processor.feature_extractor.save_pretrained(folder / "clap")
        check_saved(clap, type(clap).from_pretrained(folder / "clap"))
        check_saved(decoder, GPT2LMHeadModel.from_pretrained(folder / "decoder"))
    return {**_sizes(model), "cross_attention_inside_decoder": inside}


def read_cross_attention(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors and the settings of model and processor in a file that `convert_to_stock` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    if "cross_attention_reduce_factor" not in metadata:
        raise ConversionError(f"{path} has no cross_attention_reduce_factor: it was not written by `to-stock`")
    kinds = _CONFIG_SETTINGS | _PROCESSOR_SETTINGS
    return tensors, {key: kinds[key](value) for key, value in metadata.items() if key in kinds}


# What belongs to a cross-attention: settings of the model and of the processor that it was trained with.
_INTEGERS = ("cross_attention_reduce_factor", "pad_token_id", "bos_token_id", "eos_token_id")
_CONFIG_SETTINGS: dict[str, type] = {
    "audio_position_embedding": str,
    "encoder_states": str,
    **dict.fromkeys(_INTEGERS, int),
}
_TEXTS = ("prompt_template", "caption_separator", "prompt_without_captions", "target_prefix")
_PROCESSOR_SETTINGS: dict[str, type] = {"num_retrieved_captions": int, **dict.fromkeys(_TEXTS, str)}
_FLOATS = ("retrieval_diversity", "retrieval_score_threshold", "projection_temperature")
_PROCESSOR_SETTINGS |= dict.fromkeys(_FLOATS, float)


def _has_processor(source: str | Path) -> bool:
    """Whether a folder has the settings of a feature extractor; a Hub id is assumed to."""
    files = ("preprocessor_config.json", "processor_config.json")
    return not Path(source).is_dir() or any((Path(source) / name).is_file() for name in files)


def _beside(name: str | Path) -> str | Path | None:
    """`name` if a tokenizer is kept there; a Hub id is assumed to have one."""
    folder = Path(name)
    return name if not folder.is_dir() or (folder / "tokenizer_config.json").is_file() else None


def _processor(
    config: RecapConfig,
    tokenizer: str | Path,
    clap: str | Path,
    clap_tokenizer: str | Path,
    special_ids: dict[str, int | None],
    settings: dict[str, object],
) -> RecapProcessor:
    """The processor of `config`, with the mel settings of the CLAP folder and the special tokens of the model."""
    decoder_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    for name, index in special_ids.items():
        if index is not None and getattr(decoder_tokenizer, f"{name}_id") != index:
            setattr(decoder_tokenizer, name, decoder_tokenizer.convert_ids_to_tokens(index))
    extractor = RecapFeatureExtractor.from_clap_pretrained(clap) if _has_processor(clap) else None
    texts = AutoTokenizer.from_pretrained(clap_tokenizer)
    return RecapProcessor.from_config(config, decoder_tokenizer, texts, feature_extractor=extractor, **settings)


def _save(model: torch.nn.Module, processor: RecapProcessor | None, out: str | Path, overwrite: bool) -> None:
    with finished_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.check_model(model)
            processor.save_pretrained(folder)
        check_saved(model, RecapForConditionalGeneration.from_pretrained(folder))


def _sizes(model: RecapForConditionalGeneration) -> dict[str, object]:
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cross_attention_parameters": sum(parameter.numel() for parameter in model.cross_attention_parameters()),
        "cross_attention_reduce_factor": model.config.cross_attention_reduce_factor,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
