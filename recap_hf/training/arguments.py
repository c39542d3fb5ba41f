"""What a training run can be told: one dataclass, filled from a recipe file (YAML or JSON) and from flags.

The defaults are the paper's recipe (Section 4): Adam at 5e-5, batches of 32, 100 epochs, k = 4, loss on the caption.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

DATASETS_IN_FOLDERS = ("clotho", "audiocaps", "recap", "wavcaps", "audiofolder")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingConfig:
    """Every setting of a training run. Names are flags (`--learning-rate`) and keys of a recipe file."""

    # Data
    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "clotho, audiocaps, recap, wavcaps, audiofolder or a Hub id; give several to join them",
            "group": "data",
        },
    )
    data_dir: list[str] = field(
        default_factory=list,
        metadata={"help": "folder of each dataset that is not on the Hub, in the same order", "group": "data"},
    )
    audio_dir: list[str] = field(
        default_factory=list,
        metadata={"help": "folder of the audio, where it is apart from the captions", "group": "data"},
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "OURS=THEIRS: columns of the dataset under other names", "group": "data"},
    )
    train_split: str = _option("train", "split to train on", group="data")
    validation_split: str = _option("validation", "split to validate on, or 'none'", group="data")
    validation_share: float = _option(
        0.0, "share of the training clips to validate on, where the dataset has no validation split", group="data"
    )
    allow_missing: bool = _option(
        False, "train without the clips that have no audio file; they are listed", group="data"
    )
    max_train_clips: int = _option(0, "use only so many training clips (0: all)", group="data")
    max_validation_clips: int = _option(0, "validate on only so many clips (0: all)", group="data")
    min_clip_seconds: float = _option(0.01, "shorter recordings are left out and named", group="data")
    feature_cache: str = _option("", "folder of encoded audio (default: OUTPUT_DIR/features)", group="data")
    encode_batch_size: int = _option(16, "10-second windows in one pass of the audio encoder", group="data")
    decode_threads: int = _option(2, "threads that read and resample audio ahead of the encoder", group="data")

    # Model
    model: str = _option("", "RECAP checkpoint to start from (default: the embedded bases)", group="model")
    clap: str = _option(
        "", "CLAP checkpoint; with --decoder, cross-attention starts afresh (the paper's case)", group="model"
    )
    decoder: str = _option("", "GPT-2 checkpoint, with --clap", group="model")
    cross_attention_reduce_factor: int = _option(
        4, "width of the decoder / width of the cross-attention", group="model"
    )
    keep_cross_attention: bool | None = _option(
        None,
        "go on with the checkpoint's cross-attention (default: with --model yes, from the bases no)",
        group="model",
    )
    train_decoder: bool = _option(False, "train the language model too, not only the cross-attention", group="model")
    dropout: float = _option(
        0.0, "dropout in the trained parts; keyed by seed and step, so runs repeat", group="model"
    )
    gradient_checkpointing: bool = _option(False, "less memory for more computing", group="model")
    attn_implementation: str = _option(
        "sdpa", "attention of the decoder: sdpa or eager", group="model", choices=["sdpa", "eager"]
    )

    # Retrieval
    datastore: list[str] = field(
        default_factory=lambda: ["training"],
        metadata={
            "help": "'training' (the training captions), or folder or Hub id; several take turns by epoch",
            "group": "retrieval",
        },
    )
    num_retrieved: int = _option(
        4, "k, captions in the prompt; 0 trains without retrieval", group="retrieval", alias=["k"]
    )
    draw_from: int = _option(
        0, "draw the k captions of each epoch from so many nearest (0: the k nearest)", group="retrieval"
    )
    shuffle_prompt: bool = _option(False, "put the captions of a prompt in random order", group="retrieval")
    audio_dropout: float = _option(0.0, "share of examples whose audio is hidden from the decoder", group="retrieval")

    # Optimisation
    learning_rate: float = _option(5e-5, "peak learning rate", group="optimisation")
    batch_size: int = _option(
        32, "captions in a step, over all processes", group="optimisation", alias=["train_batch_size"]
    )
    per_device_train_batch_size: int = _option(
        0, "captions in one pass of one process; sets the batch size together with the two below", group="optimisation"
    )
    gradient_accumulation_steps: int = _option(1, "passes of each process in a step", group="optimisation")
    num_train_epochs: float = _option(100.0, "passes over the data", group="optimisation")
    max_steps: int = _option(
        -1, "stop after so many steps (-1: by epochs)", group="optimisation", alias=["max_train_steps"]
    )
    lr_scheduler_type: str = _option(
        "linear", "schedule of the learning rate, any name of transformers", group="optimisation"
    )
    warmup_steps: int = _option(0, "steps of linear warm-up", group="optimisation", alias=["num_warmup_steps"])
    weight_decay: float = _option(0.0, "decoupled weight decay (0: plain Adam)", group="optimisation")
    adam_beta1: float = _option(0.9, "first decay rate of Adam", group="optimisation")
    adam_beta2: float = _option(0.999, "second decay rate of Adam", group="optimisation")
    adam_epsilon: float = _option(1e-8, "epsilon of Adam", group="optimisation")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm (0: no clipping)", group="optimisation")
    max_caption_tokens: int = _option(60, "captions are cut after so many tokens", group="optimisation")
    group_by_length: bool = _option(True, "batches of similar lengths, so that little is padded", group="optimisation")
    share_prompts: bool = _option(
        False, "the captions of a clip in one batch, behind one prompt that is computed once", group="optimisation"
    )
    seed: int = _option(42, "seed of initialisation, order and draws", group="optimisation")

    # Validation
    eval_batch_size: int = _option(
        32, "captions in a validation batch", group="validation", alias=["per_device_eval_batch_size"]
    )
    metric_for_best_model: str = _option(
        "loss",
        "figure that picks the best checkpoint and stops the run",
        group="validation",
        choices=["loss", "held_out_f1"],
    )
    early_stopping_patience: int = _option(
        0, "stop after so many validations without gain (0: never)", group="validation"
    )
    generation_clips: int = _option(0, "validation clips to caption and score each time (0: none)", group="validation")
    held_out_events: str = _option(
        "",
        "JSON {event: expression}: leave these events out of training and score them in validation",
        group="validation",
    )

    # Running
    output_dir: str = _option("", "folder for the trained captioner and its checkpoints", group="running")
    resume: bool = _option(False, "go on from the last checkpoint in OUTPUT_DIR", group="running")
    resume_from_checkpoint: str = _option("", "go on from this checkpoint folder, or 'latest'", group="running")
    overwrite_output_dir: bool = _option(False, "start afresh in a folder with checkpoints", group="running")
    save_steps: int = _option(
        0, "checkpoint every so many steps (0: every epoch)", group="running", alias=["checkpointing_steps"]
    )
    save_total_limit: int = _option(2, "checkpoints kept besides the best", group="running")
    logging_steps: int = _option(10, "steps between two log lines", group="running")
    num_processes: int = _option(
        0, "processes to start on this machine (0: this one, or as launched)", group="running"
    )
    num_threads: int = _option(0, "torch threads of each process (0: as launched)", group="running")
    mixed_precision: str | None = _option(
        None, "no, bf16 or fp16 (default: as the launcher says)", group="running", choices=["no", "bf16", "fp16"]
    )
    device: str = _option(
        "", "'cpu' keeps off the GPU (default: as Accelerate finds)", group="running", choices=["", "cpu"]
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "trackers: tensorboard, wandb, ...; 'none' for none", "group": "running"},
    )
    push_to_hub: bool = _option(False, "push the result to the Hub", group="running")
    hub_model_id: str = _option("", "repository for the model (default: the name of OUTPUT_DIR)", group="running")
    hub_datastore_id: str = _option("", "put the datastore into a dataset repository of its own", group="running")
    hub_private: bool = _option(False, "create the repositories as private", group="running")

    def validate(self) -> TrainingConfig:
        """Self, when the settings fit each other.

        Raises:
            ValueError: naming the flag, what it was given and what it takes.
        """
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_caption_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_retrieved", "draw_from", "warmup_steps", "save_steps", "generation_clips", "num_processes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("dropout", "audio_dropout", "validation_share"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and less than 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(
            self.num_train_epochs > 0 or self.max_steps > 0, "num_train_epochs", self.num_train_epochs, "more than 0"
        )
        _require(
            self.draw_from == 0 or self.draw_from >= self.num_retrieved,
            "draw_from",
            self.draw_from,
            f"0, or at least --num-retrieved ({self.num_retrieved})",
        )
        if bool(self.clap) != bool(self.decoder):
            raise ValueError("--clap and --decoder go together: a captioner needs both (or --model, which has both)")
        if self.clap and self.model:
            raise ValueError("give either --model, or --clap and --decoder")
        if not self.dataset:
            raise ValueError(f"no --dataset given: one of {', '.join(DATASETS_IN_FOLDERS)}, or a Hub id")
        if not self.output_dir:
            raise ValueError("no --output-dir given: the folder for the trained captioner")
        if self.metric_for_best_model == "held_out_f1" and not self.held_out_events:
            raise ValueError("--metric-for-best-model held_out_f1 needs --held-out-events FILE")
        return self

    def column_mapping(self) -> dict[str, str]:
        """`--columns` as our name -> the dataset's."""
        mapping = {}
        for item in self.columns:
            ours, equals, theirs = item.partition("=")
            if not equals or not ours or not theirs:
                raise ValueError(f"--columns takes OURS=THEIRS (caption=text, say), got {item!r}")
            mapping[ours] = theirs
        return mapping

    def sources(self) -> list[tuple[str, str | None, str | None]]:
        """(dataset, data_dir, audio_dir) for each dataset.

        Raises:
            ValueError: where folders and datasets do not match in number.
        """
        local = [name for name in self.dataset if name in DATASETS_IN_FOLDERS]
        for flag, folders in (("--data-dir", self.data_dir), ("--audio-dir", self.audio_dir)):
            if len(folders) > len(local) or (flag == "--data-dir" and len(folders) < len(local)):
                raise ValueError(f"{len(local)} datasets in folders ({', '.join(local)}), but {len(folders)} {flag}")
        data_dirs, audio_dirs = iter(self.data_dir), iter(self.audio_dir)
        return [
            (name, next(data_dirs), next(audio_dirs, None)) if name in DATASETS_IN_FOLDERS else (name, None, None)
            for name in self.dataset
        ]


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {value!r}")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `TrainingConfig` as a flag; a flag that is not given leaves the recipe's value alone."""
    parser.add_argument("--config", metavar="FILE", help="recipe in YAML or JSON; flags override it")
    groups = {}
    hints = get_type_hints(TrainingConfig)
    for item in fields(TrainingConfig):
        group_name = item.metadata["group"]
        if group_name not in groups:
            groups[group_name] = parser.add_argument_group(group_name)
        names = [item.name, *item.metadata.get("alias", [])]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        groups[group_name].add_argument(
            *flags, dest=item.name, default=argparse.SUPPRESS, **_argparse_kind(item, hints[item.name])
        )


def _argparse_kind(item: Any, hint: Any) -> dict[str, Any]:
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    shown = "" if default in (None, "", []) else f" (default: {default})"
    help_text = (item.metadata["help"] + shown).replace("%", "%%")
    if hint is bool or hint == (bool | None):
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    if item.default_factory is not MISSING:
        action = {"nargs": "+", "action": "extend"} if item.name == "columns" else {"action": "append"}
        return {**action, "metavar": "VALUE", "help": help_text}
    kind = next((part for part in get_args(hint) if part is not type(None)), hint)
    choices = item.metadata.get("choices")
    return {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper(), "help": help_text}


def load_config(args: argparse.Namespace | Mapping[str, Any]) -> TrainingConfig:
    """The settings from parsed flags, over those of `--config`, over the paper's.

    Raises:
        ValueError: for unknown keys, values of the wrong kind, or settings that do not fit each other.
    """
    given = dict(args if isinstance(args, Mapping) else vars(args))
    recipe = given.pop("config", None)
    known = {item.name for item in fields(TrainingConfig)}
    values = read_recipe(recipe) if recipe else {}
    values.update({name: value for name, value in given.items() if name in known})
    return TrainingConfig(**values).validate()


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Fields of `TrainingConfig` from a YAML or JSON file; aliases and kebab-case spellings are accepted."""
    import yaml

    text = Path(path).read_text(encoding="utf-8")
    try:
        raw = json.loads(text) if Path(path).suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not parse: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected names and values ('learning_rate: 5e-5'), found {type(raw).__name__}")
    hints = get_type_hints(TrainingConfig)
    names = {}
    for item in fields(TrainingConfig):
        names.update(dict.fromkeys([item.name, *item.metadata.get("alias", [])], item))
    values = {}
    for key, value in raw.items():
        item = names.get(str(key).replace("-", "_"))
        if item is None:
            raise ValueError(f"{path}: unknown setting {key!r}; known: {', '.join(sorted(names))}")
        values[item.name] = _converted(value, hints[item.name], f"{path}: {key}", item.metadata.get("choices"))
    return values


def _converted(value: Any, hint: Any, where: str, choices: list | None) -> Any:
    options = get_args(hint)
    if type(None) in options:
        if value is None:
            return None
        hint = next(part for part in options if part is not type(None))
    if hint == list[str]:
        items = value if isinstance(value, list) else [value]
        return [str(item) for item in items]
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, got {value!r}")
        return value
    if hint in (int, float):
        # YAML reads 5e-5 as a string: it wants 5.0e-5.
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None or (hint is int and number != int(number)):
            raise ValueError(f"{where}: expected {'a whole number' if hint is int else 'a number'}, got {value!r}")
        return hint(number)
    if choices and value not in choices:
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value) if value is not None else ""
