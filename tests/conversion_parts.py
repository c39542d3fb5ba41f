"""Small stock models and tokenizers, and the authors' checkpoint layout, for the tests of `recap convert`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

WORDS = [".", "!", "a", "dog", "rain", "barks", "falls", "sound", "audio", "this", "like", "sounds", ",", ":", "the"]
HEADS, FACTOR = 4, 4


def small_clap(fusion: bool = False, width: int = 64, seed: int = 0) -> ClapModel:
    """A `ClapModel` of 0.4 M parameters whose audio tower is `width` wide; nothing in it is left at 0 or 1."""
    config = ClapConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 80,
        },
        audio_config={
            "patch_embeds_hidden_size": width // 8,
            "hidden_size": width,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "enable_fusion": fusion,
            "fusion_type": "aff_2d" if fusion else None,
        },
        projection_dim=24,
    )
    return randomised(ClapModel(config), seed)


def small_gpt2(cross_attention: bool = False, seed: int = 1) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` 64 wide with two blocks of four heads."""
    config = GPT2Config(
        vocab_size=40,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=HEADS,
        bos_token_id=39,
        eos_token_id=39,
        add_cross_attention=cross_attention,
    )
    return randomised(GPT2LMHeadModel(config), seed)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not name.startswith("logit_scale"):
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                else:
                    tensor.normal_(0, 0.2, generator=generator)
    return model.eval()


def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Whole words: of a GPT-2 (`"decoder"`), or of a RoBERTa with its end marks (`"clap"`)."""
    special = ["<|endoftext|>"] if kind == "decoder" else ["<s>", "<pad>", "</s>", "<unk>"]
    # The authors' special tokens have the ids 0 and 13 in GPT-2's vocabulary; small ones stand in here.
    words = WORDS if kind == "decoder" else [*special, *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    if kind == "decoder":
        vocabulary[special[0]] = 39
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "decoder":
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], bos_token=special[0])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_stock(folder: Path, clap: ClapModel, decoder: GPT2LMHeadModel, tokenizers: bool = True) -> tuple[str, str]:
    clap.save_pretrained(folder / "clap")
    decoder.save_pretrained(folder / "gpt2")
    if tokenizers:
        small_tokenizer("clap").save_pretrained(folder / "clap")
        small_tokenizer("decoder").save_pretrained(folder / "gpt2")
        ClapFeatureExtractor(frequency_min=50, frequency_max=14_000).save_pretrained(folder / "clap")
    return str(folder / "clap"), str(folder / "gpt2")


class AuthorsCrossAttention(nn.Module):
    """The reduced cross-attention, written from its description: heads as many as GPT-2's, each a factor narrower."""

    def __init__(self, width: int, encoder_width: int, heads: int, factor: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inner = width // factor
        shapes = {"c_attn": (encoder_width, 2 * inner), "q_attn": (width, inner), "c_proj": (inner, width)}
        self.heads, self.inner = heads, inner
        self.weights = {
            f"{name}.{kind}": 0.2 * torch.randn(shape if kind == "weight" else shape[1:], generator=generator)
            for name, shape in shapes.items()
            for kind in ("weight", "bias")
        }

    def forward(self, hidden_states, encoder_hidden_states=None, **_):
        weights = self.weights
        queries = hidden_states @ weights["q_attn.weight"] + weights["q_attn.bias"]
        both = encoder_hidden_states @ weights["c_attn.weight"] + weights["c_attn.bias"]
        keys, values = both[..., : self.inner], both[..., self.inner :]
        size = self.inner // self.heads
        mixed = torch.empty_like(queries)
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = queries[..., part] @ keys[..., part].transpose(1, 2) / size**0.5
            mixed[..., part] = scores.softmax(dim=-1) @ values[..., part]
        return mixed @ weights["c_proj.weight"] + weights["c_proj.bias"], None


def authors_model(clap: ClapModel, factor: int = FACTOR) -> tuple[GPT2LMHeadModel, dict[str, torch.Tensor]]:
    """A stock GPT-2 with the authors' cross-attention put in, and its checkpoint's tensors under their names."""
    decoder = small_gpt2(cross_attention=True)
    state = {f"encoder.{name}": tensor for name, tensor in clap.audio_model.state_dict().items()}
    plain = {f"decoder.{k}": v for k, v in decoder.state_dict().items() if ".crossattention." not in k}
    state.update(plain)
    for index, block in enumerate(decoder.transformer.h):
        prefix = f"decoder.transformer.h.{index}"
        block.crossattention = AuthorsCrossAttention(64, 64, HEADS, factor, seed=index)
        state.update({f"{prefix}.crossattention.{k}": v for k, v in block.crossattention.weights.items()})
        # Buffers that the transformers of their time kept in the file.
        for part in ("attn", "crossattention"):
            state[f"{prefix}.{part}.bias"] = torch.ones(1, 1, 128, 128).tril().bool()
            state[f"{prefix}.{part}.masked_bias"] = torch.tensor(-1e4)
    return decoder, {name: tensor.clone() for name, tensor in state.items()}


def save_authors(folder: Path, state: dict[str, torch.Tensor], **extra) -> str:
    """A checkpoint folder as their `Seq2SeqTrainer` left it."""
    folder.mkdir(exist_ok=True)
    decoder = {"model_type": "this_gpt2", "cross_attention_reduce_factor": FACTOR, "add_cross_attention": True}
    decoder.update(vocab_size=40, n_positions=128, n_embd=64, n_layer=2, n_head=HEADS, is_decoder=True)
    decoder.update(bos_token_id=39, eos_token_id=39)
    config = {"model_type": "recap", "architectures": ["RECAP"], "decoder": decoder, "k": 3, "rag": True}
    config.update(encoder={"model_type": "clap"}, pad_token_id=1, eos_token_id=0, decoder_start_token_id=None)
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    torch.save(state, folder / "pytorch_model.bin")
    return str(folder)
