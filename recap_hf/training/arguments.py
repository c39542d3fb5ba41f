"""What a training run can be told: one dataclass, filled from a recipe file (YAML or JSON) and from flags.

The defaults are the paper's recipe (Section 4): Adam at 5e-5, batches of 32, 100 epochs, k = 4, loss on the caption.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import AudioConfig, add_config_arguments, load_settings, option, read_settings, require


@dataclass
class TrainingConfig(AudioConfig):
    """Every setting of a training run. Names are flags (`--learning-rate`) and keys of a recipe file."""

    # Model
    model: str = option("", "RECAP checkpoint to start from (default: the embedded bases)", group="model")
    clap: str = option(
        "", "CLAP checkpoint; with --decoder, cross-attention starts afresh (the paper's case)", group="model"
    )
    decoder: str = option("", "GPT-2 checkpoint, with --clap", group="model")
    cross_attention_reduce_factor: int = option(
        4, "width of the decoder / width of the cross-attention", group="model"
    )
    conditioning: str = option(
        "",
        "how the decoder hears: cross_attention (RECAP) or prefix (after Kim et al.; default: the checkpoint's, or "
        "cross_attention)",
        group="model",
        choices=["", "cross_attention", "prefix"],
    )
    prefix_length: int = option(10, "embeddings of a new prefix", group="model")
    prefix_num_layers: int = option(2, "layers of the network that makes a new prefix", group="model")
    audio_position_embedding: str = option(
        "",
        "sinusoidal tells the decoder when each encoder state sounds, for captions that tell the order; none is the "
        "paper's (default: the checkpoint's, or none)",
        group="model",
        choices=["", "none", "sinusoidal"],
    )
    keep_cross_attention: bool | None = option(
        None,
        "go on with the checkpoint's cross-attention or prefix (default: with --model yes, from the bases no)",
        group="model",
    )
    train_decoder: bool = option(False, "train the language model too, not only the cross-attention", group="model")
    gradient_checkpointing: bool = option(False, "less memory for more computing", group="model")
    attn_implementation: str = option(
        "sdpa", "attention of the decoder: sdpa or eager", group="model", choices=["sdpa", "eager"]
    )

    # Retrieval
    datastore: list[str] = field(
        default_factory=lambda: ["training"],
        metadata={
            "help": "'training' (the training captions), 'training-audio' (the same, found by the audio of their "
            "clips), or folder or Hub id; several take turns by epoch",
            "group": "retrieval",
        },
    )
    num_retrieved: int = option(
        4, "k, captions in the prompt; 0 trains without retrieval", group="retrieval", alias=["k"]
    )
    draw_from: int = option(
        0, "draw the k captions of each epoch from so many nearest (0: the k nearest)", group="retrieval"
    )
    shuffle_prompt: bool = option(False, "put the captions of a prompt in random order", group="retrieval")
    audio_dropout: float = option(0.0, "share of examples whose audio is hidden from the decoder", group="retrieval")

    # Optimisation
    max_caption_tokens: int = option(60, "captions are cut after so many tokens", group="optimisation")
    group_by_length: bool = option(True, "batches of similar lengths, so that little is padded", group="optimisation")
    share_prompts: bool = option(
        False, "the captions of a clip in one batch, behind one prompt that is computed once", group="optimisation"
    )

    # Validation
    metric_for_best_model: str = option(
        "loss",
        "figure that picks the best checkpoint and stops the run",
        group="validation",
        choices=["loss", "held_out_f1"],
    )
    generation_clips: int = option(0, "validation clips to caption and score each time (0: none)", group="validation")
    held_out_events: str = option(
        "",
        "JSON {event: expression}: leave these events out of training and score them in validation",
        group="validation",
    )

    # Running
    push_to_hub: bool = option(False, "push the result to the Hub", group="running")
    hub_model_id: str = option("", "repository for the model (default: the name of OUTPUT_DIR)", group="running")
    hub_datastore_id: str = option("", "put the datastore into a dataset repository of its own", group="running")
    hub_private: bool = option(False, "create the repositories as private", group="running")

    def validate(self) -> TrainingConfig:
        """Self, when the settings fit each other.

        Raises:
            ValueError: naming the flag, what it was given and what it takes.
        """
        super().validate()
        for name in ("max_caption_tokens", "prefix_length", "prefix_num_layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_retrieved", "draw_from", "generation_clips"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.audio_dropout < 1, "audio_dropout", self.audio_dropout, "at least 0 and less than 1")
        require(
            self.draw_from == 0 or self.draw_from >= self.num_retrieved,
            "draw_from",
            self.draw_from,
            f"0, or at least --num-retrieved ({self.num_retrieved})",
        )
        if bool(self.clap) != bool(self.decoder):
            raise ValueError("--clap and --decoder go together: a captioner needs both (or --model, which has both)")
        if self.clap and self.model:
            raise ValueError("give either --model, or --clap and --decoder")
        if {"training", "training-audio"} <= set(self.datastore):
            raise ValueError("--datastore takes the training captions once: either 'training' or 'training-audio'")
        if self.metric_for_best_model == "held_out_f1" and not self.held_out_events:
            raise ValueError("--metric-for-best-model held_out_f1 needs --held-out-events FILE")
        self.require_dataset()
        return self


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `TrainingConfig` as a flag; a flag that is not given leaves the recipe's value alone."""
    add_config_arguments(parser, TrainingConfig)


def load_config(args: argparse.Namespace | Mapping[str, Any]) -> TrainingConfig:
    """The settings from parsed flags, over those of `--config`, over the paper's.

    Raises:
        ValueError: for unknown keys, values of the wrong kind, or settings that do not fit each other.
    """
    return load_settings(args, TrainingConfig)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Fields of `TrainingConfig` from a YAML or JSON file; aliases and kebab-case spellings are accepted."""
    return read_settings(path, TrainingConfig)
