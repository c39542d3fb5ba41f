"""The models to pretrain: built from scratch with a tokenizer of their own, or taken from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import ClapConfig, ClapModel, GPT2LMHeadModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
_SPECIAL = {"gpt2": ["<|endoftext|>"], "clap": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]}


@dataclass(frozen=True)
class ClapSize:
    """Sizes of a CLAP; the audio tower's width doubles from stage to stage."""

    patch_embeds_hidden_size: int
    depths: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    text_hidden_size: int
    text_layers: int
    projection_dim: int
    patch_size: int = 8


SIZES = {
    "tiny": ClapSize(64, (1, 2, 2), (2, 4, 8), 192, 2, 128),
    "small": ClapSize(96, (2, 2, 4), (3, 6, 12), 256, 4, 256),
}


def clap_config(size: ClapSize, tokenizer: PreTrainedTokenizerBase) -> ClapConfig:
    """The configuration of a small CLAP.

    Patches of 8 x 8 and three stages end in the grid of the full-size encoder, 2 x 32 = 64 vectors for 10 s, at a
    quarter of the tokens; a window of 8 x 8 patches spans all 64 mel bins and 0.64 s.
    """
    from transformers import ClapAudioConfig, ClapConfig, ClapTextConfig

    audio = ClapAudioConfig(
        patch_size=size.patch_size,
        patch_stride=[size.patch_size] * 2,
        patch_embeds_hidden_size=size.patch_embeds_hidden_size,
        hidden_size=size.patch_embeds_hidden_size * 2 ** (len(size.depths) - 1),
        depths=list(size.depths),
        num_hidden_layers=len(size.depths),
        num_attention_heads=list(size.num_attention_heads),
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        enable_fusion=False,
        projection_dim=size.projection_dim,
    )
    text = ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_hidden_size,
        intermediate_size=size.text_hidden_size * 3,
        num_hidden_layers=size.text_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length + 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        layer_norm_eps=1e-5,
        projection_dim=size.projection_dim,
    )
    return ClapConfig(text_config=text, audio_config=audio, projection_dim=size.projection_dim)


def new_clap_config(size: str, path: str, tokenizer: PreTrainedTokenizerBase) -> ClapConfig:
    """The configuration of a CLAP from scratch: of a named size, or from a JSON file, with the tokenizer's tokens.

    Raises:
        ValueError: where the file holds no such configuration.
    """
    from transformers import ClapConfig

    if not path and size != "base":
        return clap_config(SIZES[size], tokenizer)
    values = {}
    if path:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--clap-config {path} does not parse as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"--clap-config {path}: expected the fields of a ClapConfig, found {type(values).__name__}"
            )
    # LAION's epsilon; the default of transformers is another (1e-12).
    text = {"layer_norm_eps": 1e-5, **values.pop("text_config", {}), "vocab_size": len(tokenizer)}
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return ClapConfig(text_config=text, audio_config=values.pop("audio_config", {}), **values)


def train_tokenizer(
    texts: Iterable[str], kind: str, vocab_size: int, max_length: int, min_frequency: int = 2
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, which can write any text.

    Args:
        texts: what it is trained on.
        kind: `gpt2` (an end token, for the decoder) or `clap` (RoBERTa's special tokens, for the text tower).
        vocab_size: tokens, the special ones included.
        max_length: longest text in tokens.
        min_frequency: how often a pair must occur to become a token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "clap")
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=min_frequency,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "clap":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokens |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    else:
        tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _SPECIAL["gpt2"][0])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **tokens
    )


def new_gpt2(tokenizer: PreTrainedTokenizerBase, layers: int, width: int, heads: int, positions: int) -> Any:
    """A `GPT2LMHeadModel` with random weights, without cross-attention; its dropout is set by the training."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def set_dropout(model: nn.Module, share: float) -> None:
    """Dropout of all of a model's layers; whole layers are not dropped."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        if isinstance(getattr(module, "attention_dropout", None), float):
            # CLAP's text tower hands this number to its attention, beside a layer that nobody calls.
            module.attention_dropout = share
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0


def load_clap(name: str) -> tuple[ClapModel, PreTrainedTokenizerBase, Any]:
    """An existing CLAP with its tokenizer and its mel settings (a `RecapFeatureExtractor`).

    Args:
        name: Hub id or folder of a CLAP, or of a RECAP checkpoint; `embedded` for the embedded default.

    Raises:
        OSError, ValueError: where there is no such model.
    """
    from transformers import AutoTokenizer, ClapModel

    from recap_hf import RecapFeatureExtractor

    captioner = _captioner(name)
    if captioner is not None:
        model, processor = captioner
        return model.clap, processor.clap_tokenizer, processor.feature_extractor
    clap = ClapModel.from_pretrained(name, dtype="float32")
    return clap, AutoTokenizer.from_pretrained(name), RecapFeatureExtractor.from_clap_pretrained(name)


def load_gpt2(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """An existing GPT-2 with its tokenizer; of a RECAP checkpoint, its language model without the cross-attention."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    captioner = _captioner(name)
    if captioner is None:
        return GPT2LMHeadModel.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    model, processor = captioner
    plain = GPT2LMHeadModel(GPT2Config(**{**model.config.decoder.to_dict(), "add_cross_attention": False}))
    known = plain.state_dict()
    plain.load_state_dict({key: value for key, value in model.decoder.state_dict().items() if key in known})
    return plain, processor.tokenizer


def _captioner(name: str) -> tuple[Any, Any] | None:
    """Model and processor where `name` is a RECAP checkpoint."""
    import torch
    from transformers import AutoConfig

    from recap_hf import RecapForConditionalGeneration, RecapProcessor, default_model_path

    name = str(default_model_path()) if name == EMBEDDED else name
    if AutoConfig.from_pretrained(name).model_type != "recap":
        return None
    model = RecapForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    return model, RecapProcessor.from_pretrained(name)
