"""What a grid runs: training sets x test sets x datastores x seeds x k, from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .published import TEST_SETS, TRAINING_SETS

LARGE = "large"


@dataclass(frozen=True)
class Domain:
    """A dataset with a training and a test split.

    Args:
        name: as in the tables; `clotho` and `audiocaps` bring the published rows with them.
        dataset, data_dir, audio_dir, columns, allow_missing: see `recap_hf.data.load_captions`.
        split: the split that is captioned.
        clip_list: file with the names of the clips to keep.
        youtube_ids: compare names by YouTube id alone.
        max_clips: only the first so many test clips; 0: all.
        events: CSV file with `clip_id` and `events`, the number of events in each test clip.
    """

    name: str
    dataset: str
    data_dir: str | None = None
    audio_dir: str | None = None
    columns: dict[str, str] | None = None
    allow_missing: bool = False
    split: str = "test"
    clip_list: str | None = None
    youtube_ids: bool = False
    max_clips: int = 0
    events: str | None = None

    @property
    def title(self) -> str:
        """Name for people."""
        return TEST_SETS.get(self.name, self.name)


@dataclass(frozen=True)
class GridConfig:
    """All settings of a grid; the fields are the keys of its YAML file.

    Args:
        domains: by name.
        training_sets: lists of names of domains; default: each alone, and all together.
        models: "a" or "a+b" (a training set) -> checkpoint folders, one a seed, instead of training.
        large: `files` of captions for the large datastore, besides all training captions; None: no large datastore.
        seeds: of the trainings.
        k: captions in the prompt, at evaluation; the first is the table's.
        training: settings of `recap train`.
        evaluation: `batch_size`, `num_beams`, `max_new_tokens`, `device`, `dtype`.
        scoring: options of `score_captions`.
        clap_note: what the CLAP was trained on.
        resamples: draws of the bootstraps.
    """

    domains: dict[str, Domain]
    training_sets: tuple[tuple[str, ...], ...]
    models: dict[str, list[str]] = field(default_factory=dict)
    large: dict[str, Any] | None = None
    seeds: tuple[int, ...] = (42,)
    k: tuple[int, ...] = (4,)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    clap_note: str = ""
    resamples: int = 2000

    def datastores(self, training_set: Sequence[str]) -> list[tuple[str, ...]]:
        """Compositions to retrieve from: the training set, each domain, and the large one."""
        compositions = [tuple(training_set), *((name,) for name in self.domains)]
        if self.large is not None:
            compositions.append((LARGE,))
        return list(dict.fromkeys(compositions))

    def training_title(self, training_set: Sequence[str]) -> str:
        """Name of a training set as in the paper's first column."""
        key = "+".join(training_set)
        return TRAINING_SETS.get(key) or " & ".join(self.domains[name].title for name in training_set)

    def datastore_label(self, composition: Sequence[str], training_set: Sequence[str], test_set: str) -> str:
        """Name of a row after its datastore: as in the paper, DS holds captions of the test set's training split."""
        if tuple(composition) == (LARGE,):
            return "w/ DSlarge"
        if tuple(composition) == tuple(training_set) and test_set in composition:
            return "w/ DS"
        if tuple(composition) == (test_set,):
            return "w/ DS" if test_set not in training_set else f"w/ DS of {self.domains[test_set].title} alone"
        return "w/ DS of " + self.training_title(composition)


_EVALUATION_KEYS = ("batch_size", "num_beams", "max_new_tokens", "device", "dtype", "exclude_references")
_SCORING_KEYS = ("metrics", "java", "spice_models", "sentence_model", "error_detector", "error_detector_encoder")


def read_grid(path: str | Path) -> GridConfig:
    """A grid from its YAML file.

    Raises:
        ValueError: naming the key that is unknown, missing or of the wrong kind.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} does not parse: {error}") from error
    return make_grid(content, str(path))


def make_grid(content: Any, where: str = "the grid") -> GridConfig:
    """A grid from plain values; see `read_grid`."""
    if not isinstance(content, Mapping) or not isinstance(content.get("domains"), Mapping):
        raise ValueError(f"{where}: expected a mapping with the key 'domains'")
    known = {item.name for item in fields(GridConfig)}
    _refuse_unknown(content, known, where)
    domains = {name: _domain(name, values, where) for name, values in content["domains"].items()}
    values = {key: value for key, value in content.items() if value is not None}
    sets = values.get("training_sets") or [[name] for name in domains] + ([list(domains)] if len(domains) > 1 else [])
    training_sets = tuple((names,) if isinstance(names, str) else tuple(names) for names in sets)
    for names in training_sets:
        unknown = [name for name in names if name not in domains]
        if unknown:
            raise ValueError(f"{where}: training set {list(names)} names {unknown[0]!r}, which is no domain")
    for key, allowed in (("evaluation", _EVALUATION_KEYS), ("scoring", _SCORING_KEYS), ("large", ("files",))):
        _refuse_unknown(values.get(key) or {}, set(allowed), f"{where}, {key}")
    seeds, k = _whole_numbers(values, "seeds", where), _whole_numbers(values, "k", where)
    lists = {name: value for name, value in (("seeds", seeds), ("k", k)) if value}
    models = {
        name: [paths] if isinstance(paths, str) else list(paths) for name, paths in values.get("models", {}).items()
    }
    rest = {
        key: values[key]
        for key in ("large", "training", "evaluation", "scoring", "clap_note", "resamples")
        if key in values
    }
    grid = GridConfig(domains=domains, training_sets=training_sets, models=models, **lists, **rest)
    return _check_models(grid, where)


def _domain(name: str, values: Any, where: str) -> Domain:
    if not isinstance(values, Mapping) or "dataset" not in values:
        raise ValueError(f"{where}: the domain {name!r} needs a 'dataset'")
    if name == LARGE or "+" in name or "/" in name:
        raise ValueError(f"{where}: {name!r} cannot be the name of a domain: no '+', no '/', and not {LARGE!r}")
    _refuse_unknown(values, {item.name for item in fields(Domain)} - {"name"}, f"{where}, domain {name!r}")
    return Domain(name=name, **values)


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _whole_numbers(values: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    numbers = values.get(key, [])
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{where}: {key} must be a list of whole numbers, got {numbers!r}")
    return tuple(numbers)


def _check_models(grid: GridConfig, where: str) -> GridConfig:
    names = {"+".join(training_set) for training_set in grid.training_sets}
    for name, paths in grid.models.items():
        if name not in names:
            raise ValueError(
                f"{where}: models names the training set {name!r}; the grid has {', '.join(sorted(names))}"
            )
        if len(paths) != len(grid.seeds):
            raise ValueError(f"{where}: {len(paths)} models for {name!r}, but {len(grid.seeds)} seeds")
    return grid
