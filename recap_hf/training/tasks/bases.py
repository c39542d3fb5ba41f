"""The bases of a captioner: new ones with their own tokenizer, or those of a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import TrainingConfig, option, other_default

if TYPE_CHECKING:
    from transformers import ClapConfig, GPT2LMHeadModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"


@dataclass
class BaseTrainingConfig(TrainingConfig):
    """Settings that both bases have in common."""

    vocab_size: int = option(
        "model",
        4096,
        "from scratch: tokens of the tokenizer, trained on the captions",
        check=(lambda value: value >= 300, "at least 300 (256 bytes and special tokens)"),
    )
    weight_decay: float = other_default(TrainingConfig, "weight_decay", 0.01)
    adam_beta2: float = other_default(TrainingConfig, "adam_beta2", 0.98)
    warmup_steps: int = other_default(TrainingConfig, "warmup_steps", 100)
    lr_scheduler_type: str = other_default(TrainingConfig, "lr_scheduler_type", "cosine")


_SPECIAL = {"gpt2": ["<|endoftext|>"], "clap": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]}


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
    from transformers import ClapConfig

    values: Any = {}
    if path or size != "base":
        file = Path(path or Path(__file__).parent.parent / "recipes" / f"clap-{size}.json")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--clap-config {file} does not parse as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"--clap-config {file}: expected the fields of a ClapConfig, found {type(values).__name__}"
            )
    # LAION's epsilon; the default of transformers is 1e-12.
    text = {"layer_norm_eps": 1e-5, **values.pop("text_config", {}), "vocab_size": len(tokenizer)}
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return ClapConfig(text_config=text, audio_config=values.pop("audio_config", {}), **values)


def train_tokenizer(
    texts: Iterable[str], kind: str, vocab_size: int, max_length: int, folder: Path, accelerator: Any
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, which can write any text; trained by the main process for all.

    Args:
        texts: the text to train on.
        kind: `gpt2` (an end token, for the decoder) or `clap` (RoBERTa's special tokens, for the text tower).
        vocab_size: tokens, the special ones included.
        max_length: longest text in tokens.
        folder: the tokenizer is written to it.
        accelerator: Accelerate's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if accelerator.is_main_process:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "clap")
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=_SPECIAL[kind],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        if kind == "clap":
            tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
            tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
            tokens |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
        else:
            tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _SPECIAL["gpt2"][0])
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


def load_clap(name: str) -> tuple[Any, PreTrainedTokenizerBase | None, Any]:
    """An existing CLAP (an encoder class) with its tokenizer, if it has one, and its `RecapFeatureExtractor`.

    Args:
        name: Hub id or folder of a CLAP, or of a RECAP checkpoint; `embedded` for the embedded default.

    Raises:
        OSError, ValueError: if there is no such model.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import cached_file

    from recap_hf import RecapFeatureExtractor
    from recap_hf.modeling.configuration_recap import encoder_class

    captioner = _load_captioner(name)
    if captioner is not None:
        model, processor = captioner
        return model.clap, processor.clap_tokenizer, processor.feature_extractor
    clap = encoder_class(AutoConfig.from_pretrained(name)).from_pretrained(name, dtype="float32")
    # A converted audio tower has no tokenizer.
    has_tokenizer = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    tokenizer = AutoTokenizer.from_pretrained(name) if has_tokenizer else None
    return clap, tokenizer, RecapFeatureExtractor.from_clap_pretrained(name)


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


def load_gpt2(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """An existing GPT-2 with its tokenizer; of a RECAP checkpoint, its language model without the cross-attention."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    captioner = _load_captioner(name)
    if captioner is None:
        return GPT2LMHeadModel.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    model, processor = captioner
    plain = GPT2LMHeadModel(GPT2Config(**{**model.config.decoder.to_dict(), "add_cross_attention": False}))
    known = plain.state_dict()
    plain.load_state_dict({key: value for key, value in model.decoder.state_dict().items() if key in known})
    return plain, processor.tokenizer


def _load_captioner(name: str) -> tuple[Any, Any] | None:
    """Model and processor if `name` is a RECAP checkpoint."""
    from transformers import AutoConfig

    from recap_hf import RecapForConditionalGeneration, RecapProcessor, default_model_path

    name = str(default_model_path()) if name == EMBEDDED else name
    if AutoConfig.from_pretrained(name).model_type != "recap":
        return None
    model = RecapForConditionalGeneration.from_pretrained(name, dtype="float32")
    return model, RecapProcessor.from_pretrained(name)
