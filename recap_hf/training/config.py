"""Settings of a training run: one dataclass whose fields are flags of the command and keys of a recipe file.

`TrainingConfig` holds what every task has in common; each task adds its own fields in `recap_hf.training.tasks`.
"""

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml

from recap_hf.data import NAMED_DATASETS

if TYPE_CHECKING:
    from .task import Task

# Other spellings of settings: those of the examples of transformers and Accelerate, and the paper's k.
ALIASES = {
    "batch_size": ["train_batch_size"],
    "eval_batch_size": ["per_device_eval_batch_size"],
    "max_steps": ["max_train_steps"],
    "num_retrieved": ["k"],
    "num_workers": ["dataloader_num_workers"],
    "save_steps": ["checkpointing_steps"],
    "warmup_steps": ["num_warmup_steps"],
}
# The order of the groups in the help.
_GROUPS = ("data", "targets", "model", "retrieval", "prompts", "optimisation", "validation", "running")

# Checks of a value: what must hold, and how the error message says it.
AT_LEAST_1 = (lambda value: value >= 1, "at least 1")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
POSITIVE = (lambda value: value > 0, "more than 0")
SHARE = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def option(group: str, default: Any, help: str, **metadata: Any) -> Any:
    """A field of a configuration.

    Args:
        group: heading in the command's help.
        default: the value where neither flag nor recipe gives one; a list is copied.
        help: text of the flag's help.
        metadata: `choices` (list), `check` (predicate, text of the error) and `free` (True where a resumed run may
            change the value: it does not change what is computed).
    """
    metadata |= {"group": group, "help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def other_default(kind: type["TrainingConfig"], name: str, default: Any, **metadata: Any) -> Any:
    """The field `name` of a base class with another default, and other metadata where given."""
    known = dict(next(item for item in fields(kind) if item.name == name).metadata)
    return field(default=default, metadata={**known, **metadata})


Config = TypeVar("Config", bound="TrainingConfig")


@dataclass
class TrainingConfig:
    """Data, optimisation, validation and running: the settings of every kind of training."""

    dataset: list[str] = option("data", [], f"{', '.join(NAMED_DATASETS)} or a Hub id; several are joined")
    data_dir: list[str] = option("data", [], "folder of each dataset that is not on the Hub, in the same order")
    columns: list[str] = option("data", [], "OURS=THEIRS: columns of the dataset under other names")
    train_split: str = option("data", "train", "split to train on")
    validation_split: str = option("data", "validation", "split to validate on, or 'none'")
    validation_share: float = option("data", 0.0, "share of the training clips to validate on instead", check=SHARE)
    max_train_clips: int = option("data", 0, "training clips to use (0: all)", check=NOT_NEGATIVE)
    max_validation_clips: int = option("data", 0, "validation clips to use (0: all)", check=NOT_NEGATIVE)

    learning_rate: float = option("optimisation", 5e-5, "peak learning rate", check=POSITIVE)
    batch_size: int = option("optimisation", 32, "captions in a step of all processes", check=AT_LEAST_1)
    per_device_train_batch_size: int = option(
        "optimisation", 0, "captions in a pass of one process, instead of --batch-size (0)", check=NOT_NEGATIVE
    )
    gradient_accumulation_steps: int = option("optimisation", 1, "passes of each process in a step", check=AT_LEAST_1)
    num_train_epochs: float = option("optimisation", 100.0, "passes over the data")
    max_steps: int = option("optimisation", -1, "number of steps (-1: by epochs)")
    lr_scheduler_type: str = option("optimisation", "linear", "schedule of the learning rate, a name of transformers")
    warmup_steps: int = option("optimisation", 0, "steps of linear warm-up", check=NOT_NEGATIVE)
    weight_decay: float = option("optimisation", 0.0, "decoupled weight decay (0: Adam)")
    adam_beta1: float = option("optimisation", 0.9, "first decay rate of Adam")
    adam_beta2: float = option("optimisation", 0.999, "second decay rate of Adam")
    adam_epsilon: float = option("optimisation", 1e-8, "epsilon of Adam")
    max_grad_norm: float = option("optimisation", 1.0, "clip the norm of the gradient (0: no clipping)")
    dropout: float = option("optimisation", 0.0, "dropout in the trained parts; keyed by seed and step", check=SHARE)
    seed: int = option("optimisation", 42, "seed of initialisation, order and draws")

    eval_batch_size: int = option("validation", 32, "captions in a validation batch", check=AT_LEAST_1)
    metric_for_best_model: str = option("validation", "loss", "selects the best checkpoint", choices=["loss"])
    early_stopping_patience: int = option("validation", 0, "validations without gain before the run stops (0: never)")

    output_dir: str = option("running", "", "folder for the trained model and its checkpoints", free=True)
    resume: bool = option("running", False, "continue from the last checkpoint in OUTPUT_DIR", free=True)
    resume_from_checkpoint: str = option("running", "", "continue from this checkpoint, or 'latest'", free=True)
    overwrite_output_dir: bool = option("running", False, "start again in a folder with checkpoints", free=True)
    save_steps: int = option(
        "running", 0, "steps between checkpoints, beside those after an epoch (0: none)", check=NOT_NEGATIVE, free=True
    )
    save_total_limit: int = option("running", 2, "checkpoints to keep besides the best", free=True)
    logging_steps: int = option("running", 10, "steps between two log lines", check=AT_LEAST_1, free=True)
    num_processes: int = option("running", 0, "processes to start (0: as launched)", check=NOT_NEGATIVE, free=True)
    num_threads: int = option("running", 0, "torch threads of each process (0: as launched)", free=True)
    num_workers: int = option("running", -1, "worker processes for data (-1: 2 with a GPU, else none)", free=True)
    mixed_precision: str | None = option("running", None, "default: as launched", choices=["no", "bf16", "fp16"])
    device: str = option("running", "", "'cpu' does not use a GPU (default: as Accelerate finds)", choices=["", "cpu"])
    report_to: list[str] = option("running", [], "trackers: tensorboard, wandb, ..., 'all' or 'none'", free=True)

    def validate(self: Config) -> Config:
        """Self, if the settings fit each other.

        Raises:
            ValueError: naming the flag, its value and the values it accepts.
        """
        for item in fields(self):
            holds, expected = item.metadata.get("check", (bool, ""))
            require(not expected or holds(getattr(self, item.name)), item.name, getattr(self, item.name), expected)
        require(self.max_steps > 0 or self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "positive")
        self.check()
        if not self.output_dir:
            raise ValueError("no --output-dir given: the folder for the trained model")
        if not self.dataset and not getattr(self, "text_only", ()):
            raise ValueError(f"no --dataset given: one of {', '.join(NAMED_DATASETS)}, or a Hub id")
        return self

    def check(self) -> None:
        """Raises a `ValueError` if the settings of the task do not fit each other."""

    def workers(self, device: Any) -> int:
        """Worker processes of a run on `device`."""
        return self.num_workers if self.num_workers >= 0 else 2 * (device.type != "cpu")

    def build_task(self, accelerator: Any) -> "Task":
        """The task that these settings describe, with its data loaded and its model on the accelerator's device."""
        raise NotImplementedError

    def sources(self) -> list[tuple[str, str | None, str | None]]:
        """(dataset, data_dir, audio_dir) for each dataset.

        Raises:
            ValueError: if the number of folders does not match the number of datasets.
        """
        local = [name for name in self.dataset if name in NAMED_DATASETS]
        audio_dirs = getattr(self, "audio_dir", [])
        for flag, folders, least in (("--data-dir", self.data_dir, len(local)), ("--audio-dir", audio_dirs, 0)):
            if not least <= len(folders) <= len(local):
                raise ValueError(f"{len(local)} datasets in folders ({', '.join(local)}), but {len(folders)} {flag}")
        folders = iter(itertools.zip_longest(self.data_dir, audio_dirs))
        return [(name, *(next(folders) if name in NAMED_DATASETS else (None, None))) for name in self.dataset]

    def global_batch_size(self, processes: int) -> int:
        """Captions (or clips) in a step of all processes."""
        own = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return own * processes or self.batch_size


@dataclass
class AudioTrainingConfig(TrainingConfig):
    """Settings of reading and encoding recordings, for the tasks that need audio."""

    audio_dir: list[str] = option("data", [], "folder of the audio, if it is not with the captions")
    allow_missing: bool = option("data", False, "train without the clips that have no audio file; they are listed")
    feature_cache: str = option("data", "", "folder of encoded audio (default: OUTPUT_DIR/features)", free=True)
    encode_batch_size: int = option("data", 8, "recordings in one pass of the encoder", check=AT_LEAST_1, free=True)

    def cache_folder(self) -> Path:
        """Folder of the encoded audio."""
        return Path(self.feature_cache or Path(self.output_dir) / "features")


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises a `ValueError` that names the flag, unless `holds`."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {value!r}")


def changed_settings(old: Mapping[str, Any], new: Config) -> list[str]:
    """Settings of a checkpoint's run that are others now and change what is computed, as text."""
    names = [item.name for item in fields(new) if not item.metadata.get("free")]
    pairs = {name: (old.get(name), getattr(new, name)) for name in names}
    return [f"{name} {before!r} -> {now!r}" for name, (before, now) in pairs.items() if before != now]


def add_config_arguments(parser: argparse.ArgumentParser, kind: type[TrainingConfig]) -> None:
    """Add every field of `kind` as a flag; a flag that is not given does not change the recipe's value."""
    recipe = {"metavar": "FILE", "default": argparse.SUPPRESS, "help": "recipe in YAML or JSON; flags override it"}
    parser.add_argument("--config", **recipe)
    present, hints = {item.metadata["group"] for item in fields(kind)}, get_type_hints(kind)
    groups = {name: parser.add_argument_group(name) for name in _GROUPS if name in present}
    for item in fields(kind):
        # The type of an optional field without its None.
        plain = next((part for part in get_args(hints[item.name]) if part is not type(None)), hints[item.name])
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        shown = "" if default in (None, "", []) else f" (default: {default})"
        options: dict[str, Any] = {"help": (item.metadata["help"] + shown).replace("%", "%%")}
        if hints[item.name] == list[str]:
            options |= {"nargs": "+", "action": "extend", "metavar": "VALUE"}
        elif plain is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            choices = item.metadata.get("choices")
            options |= {"type": plain, "choices": choices, "metavar": None if choices else plain.__name__.upper()}
        flags = [f"--{name.replace('_', '-')}" for name in (item.name, *ALIASES.get(item.name, []))]
        groups[item.metadata["group"]].add_argument(*flags, dest=item.name, default=argparse.SUPPRESS, **options)


def load_config(given: argparse.Namespace | Mapping[str, Any], kind: type[Config]) -> Config:
    """The settings from parsed flags, over those of `--config`, over the defaults.

    Raises:
        ValueError: for unknown keys, values of the wrong kind, or settings that do not fit each other.
    """
    given = dict(given if isinstance(given, Mapping) else vars(given))
    recipe = given.pop("config", None)
    values = read_recipe(recipe, kind) if recipe else {}
    known = {item.name for item in fields(kind)}
    return kind(**values | {name: value for name, value in given.items() if name in known}).validate()


class _RecipeParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def read_recipe(path: str | Path, kind: type[TrainingConfig]) -> dict[str, Any]:
    """Fields of `kind` from a YAML or JSON file, whose keys are the flags; see `add_config_arguments`.

    Raises:
        ValueError: for a file that does not parse, unknown keys, or values of the wrong kind.
    """
    try:
        # JSON is YAML. Of the base loader every value is text, as on the command line.
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} does not parse: {error}") from error
    if not isinstance(raw, dict) or "config" in raw:
        raise ValueError(f"{path}: expected names and values ('learning_rate: 5e-5'), got {type(raw).__name__}")
    flags: list[str] = []
    for key, value in raw.items():
        name = key.replace("_", "-")
        if value in ("true", "false"):
            flags.append(f"--{name}" if value == "true" else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *value] if value else []
        elif value != "null":
            flags.append(f"--{name}={value}")
    parser = _RecipeParser(prog=str(path), allow_abbrev=False)
    add_config_arguments(parser, kind)
    return vars(parser.parse_args(flags))
