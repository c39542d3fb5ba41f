"""Small random parts for the tests of training: a captioner, recordings and captions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ClapConfig, ClapModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.processing_recap import RecapProcessor

# `accelerate launch` with one process on the CPU; the script and its flags follow.
ACCELERATE_LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--cpu"),
    *("--num_processes", "1", "--num_machines", "1"),
]
# Settings of a captioner's run of some steps, with checkpoints.
SHORT_RUN = {
    "batch_size": 8,
    "num_train_epochs": 2,
    # Not a divisor of the checkpoints' steps: a log line may begin before a kill and end after it.
    "logging_steps": 2,
    "save_steps": 3,
    "save_total_limit": 99,
    "device": "cpu",
}
SOUNDS = ["dog", "rain", "violin", "engine", "child", "clock", "river", "bell"]
WORDS = ["barks", "falls", "plays", "idles", "laughs", "ticks", "flows", "rings"]


def captions_of(number: int, count: int = 5) -> list[str]:
    """`count` captions of clip `number`, of different lengths."""
    sound, word = SOUNDS[number % 8], WORDS[(number + number // 8) % 8]
    forms = [
        f"a {sound} {word}",
        f"the {sound} {word} twice in take {number}",
        f"somewhere far away a {sound} {word} again and again",
        f"{sound}, then silence",
        f"a loud {sound} {word} near the microphone, and then another {sound} answers {number}",
    ]
    return [forms[index % 5] for index in range(count)]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few hundred tokens, with GPT-2's special token or RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"] if kind == "gpt2" else ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for number in range(16) for text in captions_of(number)], trainer)
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
    )


def make_captioner(seed: int = 0) -> tuple[RecapForConditionalGeneration, RecapProcessor]:
    """A random captioner of some hundred thousand parameters and its processor, without a datastore."""
    torch.manual_seed(seed)
    tokenizer, clap_tokenizer = make_tokenizer("gpt2"), make_tokenizer("clap")
    clap = ClapModel(
        ClapConfig(
            audio_config={
                "patch_embeds_hidden_size": 8,
                "hidden_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [1, 2],
                "projection_dim": 16,
                "enable_fusion": False,
            },
            text_config={
                "vocab_size": len(clap_tokenizer),
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "max_position_embeddings": 80,
                "projection_dim": 16,
            },
            projection_dim=16,
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(clap, gpt2)
    return model, RecapProcessor.from_config(model.config, tokenizer, clap_tokenizer)


def write_clip(path: Path, number: int, seconds: float = 0.5) -> Path:
    """A chord that belongs to clip `number`, at 8 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(8000 * seconds)) / 8000
    wave = 0.3 * np.sin(2 * np.pi * (200 + 90 * number) * time) + 0.1 * np.sin(2 * np.pi * (311 + 37 * number) * time)
    soundfile.write(path, wave.astype(np.float32), 8000)
    return path


def write_clotho(folder: Path, train: int = 8, validation: int = 3, captions: int = 5) -> Path:
    """A folder in Clotho's layout, with real files."""
    number = 0
    for split, count in (("development", train), ("validation", validation)):
        lines = ["file_name," + ",".join(f"caption_{index}" for index in range(1, captions + 1))]
        for _ in range(count):
            write_clip(folder / split / f"clip {number}.wav", number)
            lines.append(",".join([f"clip {number}.wav", *(f'"{text}"' for text in captions_of(number, captions))]))
            number += 1
        (folder / f"clotho_captions_{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
