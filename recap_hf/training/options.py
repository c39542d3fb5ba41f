"""Settings of a run as a dataclass: its fields are the flags of a command and the keys of a recipe in YAML or JSON.

`RunConfig` holds what training a captioner and pretraining its bases have in common.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

if TYPE_CHECKING:
    from .encoding import EncodingOptions

DATASETS_IN_FOLDERS = ("clotho", "audiocaps", "recap", "wavcaps", "audiofolder")
# The order of the groups in the help.
_GROUPS = ("data", "model", "retrieval", "prompts", "optimisation", "validation", "running")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a configuration.

    Args:
        default: its value where neither flag nor recipe gives one.
        help: what the flag's help says.
        metadata: `group` (heading in the help), `alias` (other spellings), `choices`.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class RunConfig:
    """Data, optimisation, validation and running: what every kind of training is told."""

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
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "OURS=THEIRS: columns of the dataset under other names", "group": "data"},
    )
    train_split: str = option("train", "split to train on", group="data")
    validation_split: str = option("validation", "split to validate on, or 'none'", group="data")
    validation_share: float = option(
        0.0, "share of the training clips to validate on, where the dataset has no validation split", group="data"
    )
    max_train_clips: int = option(0, "use only so many training clips (0: all)", group="data")
    max_validation_clips: int = option(0, "validate on only so many clips (0: all)", group="data")

    # Optimisation
    learning_rate: float = option(5e-5, "peak learning rate", group="optimisation")
    batch_size: int = option(
        32, "captions in a step, over all processes", group="optimisation", alias=["train_batch_size"]
    )
    per_device_train_batch_size: int = option(
        0, "captions in one pass of one process; sets the batch size together with the two below", group="optimisation"
    )
    gradient_accumulation_steps: int = option(1, "passes of each process in a step", group="optimisation")
    num_train_epochs: float = option(100.0, "passes over the data", group="optimisation")
    max_steps: int = option(
        -1, "stop after so many steps (-1: by epochs)", group="optimisation", alias=["max_train_steps"]
    )
    lr_scheduler_type: str = option(
        "linear", "schedule of the learning rate, any name of transformers", group="optimisation"
    )
    warmup_steps: int = option(0, "steps of linear warm-up", group="optimisation", alias=["num_warmup_steps"])
    weight_decay: float = option(0.0, "decoupled weight decay (0: plain Adam)", group="optimisation")
    adam_beta1: float = option(0.9, "first decay rate of Adam", group="optimisation")
    adam_beta2: float = option(0.999, "second decay rate of Adam", group="optimisation")
    adam_epsilon: float = option(1e-8, "epsilon of Adam", group="optimisation")
    max_grad_norm: float = option(1.0, "clip the gradient's norm (0: no clipping)", group="optimisation")
    dropout: float = option(
        0.0, "dropout in the trained parts; keyed by seed and step, so runs repeat", group="optimisation"
    )
    seed: int = option(42, "seed of initialisation, order and draws", group="optimisation")

    # Validation
    eval_batch_size: int = option(
        32, "captions in a validation batch", group="validation", alias=["per_device_eval_batch_size"]
    )
    metric_for_best_model: str = option(
        "loss", "figure that picks the best checkpoint and stops the run", group="validation", choices=["loss"]
    )
    early_stopping_patience: int = option(
        0, "stop after so many validations without gain (0: never)", group="validation"
    )

    # Running
    output_dir: str = option("", "folder for the trained model and its checkpoints", group="running")
    resume: bool = option(False, "go on from the last checkpoint in OUTPUT_DIR", group="running")
    resume_from_checkpoint: str = option("", "go on from this checkpoint folder, or 'latest'", group="running")
    overwrite_output_dir: bool = option(False, "start afresh in a folder with checkpoints", group="running")
    save_steps: int = option(
        0, "checkpoint every so many steps (0: every epoch)", group="running", alias=["checkpointing_steps"]
    )
    save_total_limit: int = option(2, "checkpoints kept besides the best", group="running")
    logging_steps: int = option(10, "steps between two log lines", group="running")
    num_processes: int = option(0, "processes to start on this machine (0: this one, or as launched)", group="running")
    num_threads: int = option(0, "torch threads of each process (0: as launched)", group="running")
    mixed_precision: str | None = option(
        None, "no, bf16 or fp16 (default: as the launcher says)", group="running", choices=["no", "bf16", "fp16"]
    )
    device: str = option(
        "", "'cpu' keeps off the GPU (default: as Accelerate finds)", group="running", choices=["", "cpu"]
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "trackers: tensorboard, wandb, ...; 'none' for none", "group": "running"},
    )

    def validate(self) -> RunConfig:
        """Self, when the settings fit each other.

        Raises:
            ValueError: naming the flag, what it was given and what it takes.
        """
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "logging_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "save_steps", "num_processes", "max_train_clips", "max_validation_clips"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("dropout", "validation_share"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and less than 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        require(
            self.num_train_epochs > 0 or self.max_steps > 0, "num_train_epochs", self.num_train_epochs, "more than 0"
        )
        if not self.output_dir:
            raise ValueError("no --output-dir given: the folder for the trained model")
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
        audio_dirs = self._audio_dirs()
        for flag, folders in (("--data-dir", self.data_dir), ("--audio-dir", audio_dirs)):
            if len(folders) > len(local) or (flag == "--data-dir" and len(folders) < len(local)):
                raise ValueError(f"{len(local)} datasets in folders ({', '.join(local)}), but {len(folders)} {flag}")
        data_dirs, audio_dirs = iter(self.data_dir), iter(audio_dirs)
        return [
            (name, next(data_dirs), next(audio_dirs, None)) if name in DATASETS_IN_FOLDERS else (name, None, None)
            for name in self.dataset
        ]

    def _audio_dirs(self) -> list[str]:
        """Folders of audio apart from the captions; none for runs that hear nothing."""
        return []

    def require_dataset(self) -> None:
        """Raises a `ValueError` where no dataset is named."""
        if not self.dataset:
            raise ValueError(f"no --dataset given: one of {', '.join(DATASETS_IN_FOLDERS)}, or a Hub id")


@dataclass
class AudioConfig(RunConfig):
    """Settings of reading and encoding recordings, for the runs that hear any."""

    audio_dir: list[str] = field(
        default_factory=list,
        metadata={"help": "folder of the audio, where it is apart from the captions", "group": "data"},
    )
    allow_missing: bool = option(
        False, "train without the clips that have no audio file; they are listed", group="data"
    )
    min_clip_seconds: float = option(0.01, "shorter recordings are left out and named", group="data")
    feature_cache: str = option("", "folder of encoded audio (default: OUTPUT_DIR/features)", group="data")
    encode_batch_size: int = option(16, "10-second windows in one pass of the audio encoder", group="data")
    decode_threads: int = option(2, "threads that read and resample audio ahead of the encoder", group="data")

    def _audio_dirs(self) -> list[str]:
        return self.audio_dir

    def cache_folder(self) -> Path:
        """Where encoded audio is kept."""
        return Path(self.feature_cache or Path(self.output_dir) / "features")

    def encoding_options(self) -> EncodingOptions:
        """How recordings are read and encoded."""
        from .encoding import EncodingOptions

        return EncodingOptions(
            str(self.cache_folder()), self.encode_batch_size, self.decode_threads, self.min_clip_seconds
        )


Config = TypeVar("Config", bound=RunConfig)


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises a `ValueError` that names the flag, unless `holds`."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {value!r}")


def add_config_arguments(parser: argparse.ArgumentParser, kind: type[RunConfig]) -> None:
    """Every field of `kind` as a flag; a flag that is not given leaves the recipe's value alone."""
    parser.add_argument("--config", metavar="FILE", help="recipe in YAML or JSON; flags override it")
    hints = get_type_hints(kind)
    present = {item.metadata["group"] for item in fields(kind)}
    groups = {name: parser.add_argument_group(name) for name in _GROUPS if name in present}
    for item in fields(kind):
        names = [item.name, *item.metadata.get("alias", [])]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        groups[item.metadata["group"]].add_argument(
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


def load_settings(args: argparse.Namespace | Mapping[str, Any], kind: type[Config]) -> Config:
    """The settings from parsed flags, over those of `--config`, over the defaults.

    Raises:
        ValueError: for unknown keys, values of the wrong kind, or settings that do not fit each other.
    """
    given = dict(args if isinstance(args, Mapping) else vars(args))
    recipe = given.pop("config", None)
    known = {item.name for item in fields(kind)}
    values = read_settings(recipe, kind) if recipe else {}
    values.update({name: value for name, value in given.items() if name in known})
    return kind(**values).validate()


def read_settings(path: str | Path, kind: type[RunConfig]) -> dict[str, Any]:
    """Fields of `kind` from a YAML or JSON file; aliases and kebab-case spellings are accepted."""
    import yaml

    text = Path(path).read_text(encoding="utf-8")
    try:
        raw = json.loads(text) if Path(path).suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not parse: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected names and values ('learning_rate: 5e-5'), found {type(raw).__name__}")
    hints = get_type_hints(kind)
    names = {}
    for item in fields(kind):
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
