"""The models that runs start from: new ones, those of a checkpoint, and a captioner of both."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import RobertaProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ClapConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from recap_hf import RecapFeatureExtractor, RecapForConditionalGeneration, RecapProcessor, default_model_path
from recap_hf.modeling.configuration_recap import EMBEDDING, HIDDEN, UNTRAINED, encoder_class
from recap_hf.modeling.encoder_recap import SINUSOIDAL

from ..config import TrainingConfig, option, other_default
from ..loss import checkpoint_activations, fuse_activations

if TYPE_CHECKING:
    from .captioner import CaptionerTrainingConfig

logger = logging.getLogger(__name__)

# The logit of a new class before training: a probability of 0.007.
_RARE = -5.0
_LARGE_ENOUGH = (lambda value: value >= 300, "at least 300 (256 bytes and special tokens)")


@dataclass
class BaseTrainingConfig(TrainingConfig):
    """Settings that both bases have in common."""

    vocab_size: int = option("model", 4096, "from scratch: tokens, trained on the captions", check=_LARGE_ENOUGH)
    weight_decay: float = other_default(TrainingConfig, "weight_decay", 0.01)
    adam_beta2: float = other_default(TrainingConfig, "adam_beta2", 0.98)
    warmup_steps: int = other_default(TrainingConfig, "warmup_steps", 100)
    lr_scheduler_type: str = other_default(TrainingConfig, "lr_scheduler_type", "cosine")


def new_clap_config(size: str, path: str, tokenizer: PreTrainedTokenizerBase) -> ClapConfig:
    """The configuration of a CLAP from scratch, with the tokenizer's tokens.

    Args:
        size: `tiny`, `small` or `base`. The first two have patches of 8 x 8 and three stages, which end in the grid of
            `base`, 2 x 32 = 64 vectors for 10 s, from a quarter of the tokens.
        path: a JSON file with the fields of a `ClapConfig`, instead of a size; or empty.
        tokenizer: of the text tower.

    Raises:
        ValueError: if the file holds no such fields.
    """
    if size == "base" and not path:
        values: Any = {}
    else:
        file = Path(path or Path(__file__).parent.parent / "recipes" / f"clap-{size}.json")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--clap-config {file} does not parse as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"--clap-config {file}: expected the fields of a ClapConfig, got {type(values).__name__}")
    # LAION's epsilon; the default of transformers is 1e-12.
    text = {"layer_norm_eps": 1e-5, **values.pop("text_config", {}), "vocab_size": len(tokenizer)}
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return ClapConfig(text_config=text, audio_config=values.pop("audio_config", {}), **values)


def train_tokenizer(
    texts: Iterable[str], kind: str, vocab_size: int, max_length: int, folder: Path, accelerator: Any
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer; trained by the main process for all.

    Args:
        texts: the text to train on.
        kind: `gpt2` (an end token, for the decoder) or `clap` (RoBERTa's special tokens, for the text tower). `clap`
            reads lower case: else a word that its captions never begin with would be unknown as the first one.
        vocab_size: tokens, the special ones included.
        max_length: longest text in tokens.
        folder: the tokenizer is written to it.
        accelerator: Accelerate's.
    """
    if kind == "gpt2":
        tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    else:
        tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokens |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    if accelerator.is_main_process:
        trained = ByteLevelBPETokenizer(add_prefix_space=kind == "clap", lowercase=kind == "clap")
        special = list(dict.fromkeys(tokens.values()))
        trained.train_from_iterator(texts, vocab_size, special_tokens=special, show_progress=False)
        tokenizer = Tokenizer.from_str(trained.to_str())
        if kind == "clap":
            ends = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
            tokenizer.post_processor = RobertaProcessing(*ends, trim_offsets=False)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **tokens
        ).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return AutoTokenizer.from_pretrained(folder)


def set_dropout(model: nn.Module, share: float) -> None:
    """Set the dropout of all of a model's layers; whole layers are not dropped."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        if isinstance(getattr(module, "attention_dropout", None), float):
            # CLAP's text tower hands this number to its attention, beside a layer that is never called.
            module.attention_dropout = share
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0


def load_clap(name: str, with_texts: bool = False) -> tuple[Any, PreTrainedTokenizerBase | None, Any]:
    """An existing CLAP (an encoder class) with its tokenizer, if it has one, and its `RecapFeatureExtractor`.

    Args:
        name: Hub id or folder of a CLAP, or of a RECAP checkpoint; `embedded` for the embedded default.
        with_texts: refuse a CLAP without a tokenizer.

    Raises:
        OSError, ValueError: if there is no such model.
    """
    captioner = _load_captioner(name)
    if captioner is not None:
        model, processor = captioner
        return model.clap, processor.clap_tokenizer, processor.feature_extractor
    settings = AutoConfig.from_pretrained(name)
    kind = encoder_class(settings)
    # A converted audio tower has no tokenizer.
    has_tokenizer = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    tokenizer = AutoTokenizer.from_pretrained(name) if has_tokenizer else None
    if with_texts and tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer, so that it cannot embed captions: train its text tower first (recap pretrain "
            f"clap --clap {name})"
        )
    try:
        extractor = RecapFeatureExtractor.from_clap_pretrained(name)
    except OSError:
        logger.warning("No mel settings with %s: those of its class are used, 0 to 14 kHz for a ClapModel", name)
        extractor = RecapFeatureExtractor(**kind.feature_settings(settings))
    return kind.from_pretrained(name, dtype="float32"), tokenizer, extractor


def with_new_text_tower(clap: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The CLAP with an untrained text tower for another tokenizer; its text projection is new, too."""
    config = copy.deepcopy(clap.config)
    config.text_config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    new = type(clap)(config)
    kept = {name: tensor for name, tensor in clap.state_dict().items() if not name.startswith("text_")}
    new.load_state_dict(kept, strict=False)
    return new


def add_classes(clap: Any, names: Sequence[str]) -> None:
    """Add classes to a CLAP's classification head: rows of zeros, and a bias that makes them rare."""
    old, config = clap.classifier, clap.config
    clap.classifier = nn.Linear(old.in_features, old.out_features + len(names)).to(old.weight)
    with torch.no_grad():
        for new, kept, start in ((clap.classifier.weight, old.weight, 0.0), (clap.classifier.bias, old.bias, _RARE)):
            new[: len(kept)], new[len(kept) :] = kept, start
    labels = config.id2label | dict(enumerate(names, start=old.out_features))
    config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}


def load_gpt2(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """An existing GPT-2 with its tokenizer; of a RECAP checkpoint, its language model without the cross-attention."""
    captioner = _load_captioner(name)
    if captioner is None:
        return GPT2LMHeadModel.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    return plain_gpt2(captioner[0]), captioner[1].tokenizer


def plain_gpt2(captioner: Any) -> GPT2LMHeadModel:
    """The language model of a captioner without its cross-attention."""
    plain = GPT2LMHeadModel(GPT2Config(**{**captioner.config.decoder.to_dict(), "add_cross_attention": False}))
    plain.load_state_dict(captioner.decoder.state_dict(), strict=False)
    return plain


def _load_captioner(name: str) -> tuple[Any, Any] | None:
    """Model and processor if `name` is a RECAP checkpoint."""
    if name == "embedded":
        name = str(default_model_path())
        if not Path(name).is_dir():
            raise FileNotFoundError("this installation has no embedded model: name a checkpoint")
    if AutoConfig.from_pretrained(name).model_type != "recap":
        return None
    model = RecapForConditionalGeneration.from_pretrained(name, dtype="float32")
    return model, RecapProcessor.from_pretrained(name)


def new_captioner(config: CaptionerTrainingConfig) -> tuple[Any, Any]:
    """Model and processor: of two bases, of a RECAP checkpoint, or of the embedded model's bases.

    New cross-attention, or the mapper of a new prefix, is drawn from `config.seed`.

    Raises:
        OSError, ValueError: if a part cannot be loaded or does not fit.
    """
    if config.clap:
        clap, clap_tokenizer, extractor = load_clap(config.clap, with_texts=True)
        gpt2, tokenizer = load_gpt2(config.decoder)
        model = _combine(clap, gpt2, config, encoder_states=_encoder_states(config) or HIDDEN)
        processor = RecapProcessor.from_config(model.config, tokenizer, clap_tokenizer, feature_extractor=extractor)
    else:
        captioner = _load_captioner(config.model or "embedded")
        if captioner is None:
            raise ValueError(f"--model {config.model} is no RECAP checkpoint: give its parts by --clap and --decoder")
        model, processor = captioner
        keep, found = config.keep_cross_attention, model.config
        other = config.conditioning not in ("", found.conditioning) or found.conditioning == UNTRAINED
        other = other or _encoder_states(config) not in ("", found.encoder_states)
        if other or not (bool(config.model) if keep is None else keep):
            if keep:
                kept = f"what the checkpoint has, which is {found.conditioning} on {found.encoder_states} states"
                flags = "not together with another --conditioning, --encoder-states or --text-only"
                raise ValueError(f"--keep-cross-attention continues with {kept}: {flags}")
            model = _with_new_conditioning(model, processor, config)
    if config.audio_position_embedding == SINUSOIDAL and model.config.encoder_states == EMBEDDING:
        raise ValueError("--audio-position-embedding goes with hidden states: an embedding of a window has no places")
    if config.audio_position_embedding:
        wanted = config.audio_position_embedding
        model.config.audio_position_embedding = None if wanted == "none" else wanted
    processor.num_retrieved_captions = config.num_retrieved
    processor.retrieval_diversity = config.retrieval_diversity
    processor.projection_temperature = config.projection_temperature
    return model.eval(), processor


def _encoder_states(config: CaptionerTrainingConfig) -> str:
    return EMBEDDING if config.text_only else config.encoder_states


def _combine(clap: Any, decoder: Any, config: CaptionerTrainingConfig, **settings: Any) -> Any:
    names = ["cross_attention_reduce_factor", *(["conditioning"] if config.conditioning else [])]
    names += ["prefix_length", "prefix_num_layers"] if config.conditioning == "prefix" else []
    settings = {name: getattr(config, name) for name in names} | settings
    torch.manual_seed(config.seed)
    return RecapForConditionalGeneration.from_clap_gpt2_pretrained(clap, decoder, **settings)


def _with_new_conditioning(model: Any, processor: Any, config: CaptionerTrainingConfig) -> Any:
    """The same CLAP and language model with untrained conditioning; the processor leaves room for a prefix."""
    names = ["window_length_s", "pad_token_id", "bos_token_id", "eos_token_id"]
    states = _encoder_states(config) or model.config.encoder_states
    names += ["audio_position_embedding"] if states == HIDDEN else []
    if config.conditioning in ("", model.config.conditioning) and model.config.conditioning != UNTRAINED:
        names += ["conditioning", "cross_attention_reduce_factor", "prefix_length", "prefix_num_layers"]
    kept = {name: getattr(model.config, name) for name in names}
    changed = _combine(model.clap, plain_gpt2(model), config, encoder_states=states, **kept)
    changed.generation_config = model.generation_config
    processor.max_prompt_tokens += model.config.prefix_places - changed.config.prefix_places
    return changed


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
            module.p = config.dropout if config.train_decoder or ".crossattention." in name else 0.0
