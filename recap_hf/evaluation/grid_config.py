"""What a grid runs: training sets x test sets x datastores x seeds x k, from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .published import TEST_SETS, TRAINING_SETS

LARGE = "large"
PREFIX, AUDIO_TO_AUDIO = "prefix", "audio_to_audio"
# The neighbours of the paper that fit this house: settings of their training, and names of their rows.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    PREFIX: {"conditioning": "prefix", "num_retrieved": 0},
    AUDIO_TO_AUDIO: {"datastore": ["training-audio"]},
}
NEIGHBOUR_LABELS = {
    PREFIX: "prefix on CLAP (after Kim et al. [6])",
    AUDIO_TO_AUDIO: "audio-to-audio on CLAP (after Koizumi et al. [7])",
}
ESTIMATED = "estimated"


@dataclass(frozen=True)
class Run:
    """One evaluation of the grid.

    Args:
        training_set, seed: of the captioner.
        test_set: domain that it captions.
        datastore: composition that it retrieves from; empty: nothing.
        k: captions in the prompt.
        neighbour: a key of `NEIGHBOURS`, or empty for RECAP.
        share: of the datastore's captions, drawn at random, smaller shares inside larger ones.
        index: kind of the search index; empty: as the datastore has it.
    """

    training_set: tuple[str, ...]
    seed: int
    test_set: str
    datastore: tuple[str, ...]
    k: int
    neighbour: str = ""
    share: float = 1.0
    index: str = ""

    @property
    def model(self) -> str:
        """Name of its captioner."""
        return f"{'+'.join(self.training_set)}-seed{self.seed}" + (f"-{self.neighbour}" if self.neighbour else "")

    @property
    def folder(self) -> str:
        """Its place below the grid's folder."""
        variant = (f"-share{self.share:g}" if self.share < 1 else "") + (f"-{self.index}" if self.index else "")
        return f"runs/{self.test_set}/{self.model}/{'+'.join(self.datastore) or 'none'}-k{self.k}{variant}"

    @property
    def varies_the_store(self) -> bool:
        """Whether it is a point on the axis of sizes or of indexes, and no row of the paper's tables."""
        return self.share < 1 or bool(self.index)


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
        events: CSV file with `clip_id` and `events`, the number of events in each test clip, or "estimated": counted
            from the words of the references.
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
        models: "a" or "a+b" (a training set), "a:prefix" (its neighbour) -> checkpoint folders, one a seed, instead of
            training.
        large: `files` of captions for the large datastore, besides all training captions; None: no large datastore.
        seeds: of the trainings.
        k: captions in the prompt, at evaluation; the first is the table's.
        neighbours: by name (`prefix`, `audio_to_audio`), settings of their training beside `training`; a list of names
            for none. Each is trained and evaluated as one more captioner.
        shares: of the large datastore (of DS where there is none) to retrieve from, between 0 and 1.
        indexes: kinds of search index to try on it, see `recap datastore build --index`.
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
    neighbours: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    indexes: tuple[str, ...] = ()
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

    def run_label(self, run: Run) -> str:
        """Name of a run's row, after its datastore and what else tells it from others."""
        if run.neighbour == PREFIX:
            return NEIGHBOUR_LABELS[PREFIX]
        label = self.datastore_label(run.datastore, run.training_set, run.test_set)
        if run.neighbour:
            label = f"{NEIGHBOUR_LABELS[run.neighbour]} {label}"
        if run.share < 1:
            label += f", {run.share:.3g} of it"
        return f"{label}, index {run.index}" if run.index else label

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
    lists |= {"shares": _shares(values, where), "indexes": tuple(map(str, values.get("indexes", [])))}
    models = {
        name: [paths] if isinstance(paths, str) else list(paths) for name, paths in values.get("models", {}).items()
    }
    rest = {
        key: values[key]
        for key in ("large", "training", "evaluation", "scoring", "clap_note", "resamples")
        if key in values
    }
    neighbours = _neighbours(values.get("neighbours", {}), where)
    grid = GridConfig(
        domains=domains, training_sets=training_sets, models=models, neighbours=neighbours, **lists, **rest
    )
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


def _shares(values: Mapping[str, Any], where: str) -> tuple[float, ...]:
    shares = values.get("shares", [])
    if not isinstance(shares, list) or not all(isinstance(share, (int, float)) and 0 < share < 1 for share in shares):
        raise ValueError(f"{where}: shares must be a list of numbers between 0 and 1, got {shares!r}")
    return tuple(sorted(map(float, shares)))


def _neighbours(values: Any, where: str) -> dict[str, dict[str, Any]]:
    values = values if isinstance(values, Mapping) else dict.fromkeys(values, None)
    _refuse_unknown(values, set(NEIGHBOURS), f"{where}, neighbours")
    return {name: dict(settings or {}) for name, settings in values.items()}


def _check_models(grid: GridConfig, where: str) -> GridConfig:
    names = {"+".join(training_set) for training_set in grid.training_sets}
    names |= {f"{name}:{neighbour}" for name in names for neighbour in grid.neighbours}
    for name, paths in grid.models.items():
        if name not in names:
            raise ValueError(
                f"{where}: models names the training set {name!r}; the grid has {', '.join(sorted(names))}"
            )
        if len(paths) != len(grid.seeds):
            raise ValueError(f"{where}: {len(paths)} models for {name!r}, but {len(grid.seeds)} seeds")
    return grid
