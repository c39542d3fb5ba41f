"""What a grid runs: training sets x test sets x datastores x seeds x k, from one YAML file."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from recap_hf.modeling.options_recap import CaptionOptions

from .clips import load_test_clips
from .published import TEST_SETS, TRAINING_SETS

LARGE, ESTIMATED = "large", "estimated"
MAIN_ROW, LARGE_ROW = "w/ DS", "w/ DSlarge"
PREFIX, AUDIO_TO_AUDIO = "prefix", "audio_to_audio"
# Methods that the paper compares with: settings of their training, and names of their rows.
RELATED_METHODS: dict[str, dict[str, Any]] = {
    PREFIX: {"conditioning": "prefix", "num_retrieved": 0},
    AUDIO_TO_AUDIO: {"datastore": ["training-audio"]},
}
RELATED_LABELS = {
    PREFIX: "prefix on CLAP (after Kim et al. [6])",
    AUDIO_TO_AUDIO: "audio-to-audio on CLAP (after Koizumi et al. [7])",
}


@dataclass(frozen=True)
class Model:
    """A captioner of the grid: its training set, its seed, and a key of `RELATED_METHODS` or empty for RECAP."""

    training_set: tuple[str, ...]
    seed: int
    method: str = ""

    @property
    def key(self) -> str:
        """Its name in `models` of the YAML file, which has one folder per seed."""
        return "+".join(self.training_set) + (f":{self.method}" if self.method else "")

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{'+'.join(self.training_set)}-seed{self.seed}" + (f"-{self.method}" if self.method else "")


@dataclass(frozen=True)
class Run:
    """One evaluation of the grid.

    Args:
        model: the captioner.
        test_set: domain that it captions.
        datastore: domains whose training captions it retrieves from, or `("large",)`; empty: no retrieval.
        k: captions in the prompt.
        share: of the datastore's captions, drawn at random; smaller shares are part of larger ones.
        index: kind of the search index; empty: that of the datastore.
    """

    model: Model
    test_set: str
    datastore: tuple[str, ...]
    k: int
    share: float = 1.0
    index: str = ""

    @property
    def folder(self) -> str:
        """Its path below the grid's folder."""
        variant = (f"-share{self.share:g}" if self.share < 1 else "") + (f"-{self.index}" if self.index else "")
        return f"runs/{self.test_set}/{self.model.name}/{'+'.join(self.datastore) or 'none'}-k{self.k}{variant}"

    @property
    def varies_datastore(self) -> bool:
        """Whether it belongs to the table of datastore sizes and indexes, and not to the paper's tables."""
        return self.share < 1 or bool(self.index)


@dataclass(frozen=True)
class GridConfig:
    """All settings of a grid; the fields are the keys of its YAML file.

    Args:
        domains: datasets with a training and a test split, by their names in the tables; `clotho` and `audiocaps` add
            the published rows. Each has the arguments of `load_test_clips` and `events`: a table with `clip_id` and
            `events`, the number of events in each test clip, or "estimated": counted from the words of the references.
        training_sets: lists of names of domains; default: each alone, and all together.
        models: "a" or "a+b" (a training set), "a:prefix" (a related method on it) -> checkpoint folders, one per seed,
            instead of training.
        large: `files` of captions for the large datastore, beside all training captions; None: no large datastore.
        seeds: of the trainings.
        k: captions in the prompt; the first is that of the tables.
        related_methods: by name (`prefix`, `audio_to_audio`), settings of their training beside `training`; a list of
            names for none. Each is trained and evaluated as one more captioner.
        shares: of the large datastore (of DS if there is none) to retrieve from, between 0 and 1.
        indexes: kinds of search index to try on it, see `recap datastore build --index`.
        training: settings of `recap train`.
        evaluation: `batch_size`, `device`, `dtype`, `exclude_references` and caption options but k.
        scoring: `metrics`, `java`, `spice_models`, and the models of FENSE.
        clap_note: what the CLAP was trained on.
        resamples: draws of the bootstraps.
    """

    domains: dict[str, dict[str, Any]]
    training_sets: tuple[tuple[str, ...], ...]
    models: dict[str, list[str]] = field(default_factory=dict)
    large: dict[str, Any] | None = None
    seeds: tuple[int, ...] = (42,)
    k: tuple[int, ...] = (4,)
    related_methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    indexes: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    clap_note: str = ""
    resamples: int = 2000

    @property
    def caption_options(self) -> CaptionOptions:
        """The caption options in `evaluation`."""
        return CaptionOptions.from_dict({key: self.evaluation[key] for key in _OPTIONS if key in self.evaluation})

    def all_models(self) -> list[Model]:
        """Every captioner, given or trained."""
        return [Model(*each) for each in product(self.training_sets, self.seeds, ("", *self.related_methods))]

    def runs(self) -> Iterator[Run]:
        """Every evaluation, those of one model together.

        RECAP has every datastore at the first k, the main row at every k, and one datastore in shares and by index. A
        prefix retrieves nothing; audio-to-audio has the datastores of the training and the test set.
        """
        for model in self.all_models():
            own, first_k = model.training_set, self.k[0]
            for test_set in self.domains:
                if model.method == PREFIX:
                    yield Run(model, test_set, (), 0)
                    continue
                others = [test_set] if model.method else [*self.domains, *([] if self.large is None else [LARGE])]
                stores = dict.fromkeys([own, *((name,) for name in others)])
                runs = [Run(model, test_set, store, first_k) for store in stores]
                for run in runs:
                    all_k = self.k if self.is_main(run) else [first_k]
                    yield from (replace(run, k=k) for k in all_k)
                varied = next((run for run in runs if not model.method and self.is_varied(run)), None)
                if varied:
                    yield from (replace(varied, share=share) for share in self.shares)
                    yield from (replace(varied, index=index) for index in self.indexes)

    def is_main(self, run: Run) -> bool:
        """Whether a run belongs to the row that the paper calls DS."""
        return self.label(run) == MAIN_ROW

    def is_varied(self, run: Run) -> bool:
        """Whether size and index of a run's datastore are varied: of the large one, or else of the main row's."""
        return self.is_main(run) if self.large is None else run.datastore == (LARGE,)

    def title(self, training_set: tuple[str, ...]) -> str:
        """Name of a training set as in the paper's first column."""
        names = " & ".join(TEST_SETS.get(name, name) for name in training_set)
        return TRAINING_SETS.get("+".join(training_set), names)

    def label(self, run: Run) -> str:
        """Name of a run's row: as in the paper, DS holds captions of the test set's own training split."""
        own, store, test_set = run.model.training_set, run.datastore, run.test_set
        if run.model.method == PREFIX:
            return RELATED_LABELS[PREFIX]
        label = f"w/ DS of {self.title(store)}"
        if store == (LARGE,):
            label = LARGE_ROW
        elif (store == own and test_set in own) or (store == (test_set,) and test_set not in own):
            label = MAIN_ROW
        elif store == (test_set,):
            label += " alone"
        if run.model.method:
            label = f"{RELATED_LABELS[run.model.method]} {label}"
        label += f", {run.share:.3g} of it" if run.share < 1 else ""
        return f"{label}, index {run.index}" if run.index else label


# k is an axis of the grid.
_OPTIONS = [name for name in CaptionOptions.names() if name != "k"]
_KEYS = {
    "evaluation": ("batch_size", "device", "dtype", "exclude_references", *_OPTIONS),
    "scoring": ("metrics", "java", "spice_models", "sentence_model", "error_detector", "error_detector_encoder"),
    "large": ("files",),
}


def read_grid(path: str | Path) -> GridConfig:
    """A grid from its YAML file.

    Raises:
        ValueError: naming the key that is unknown, missing or has a wrong value.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} does not parse: {error}") from error
    return make_grid(content, str(path))


def make_grid(content: Any, where: str = "the grid") -> GridConfig:
    """A grid from plain values; see `read_grid`."""
    if not isinstance(content, Mapping) or not isinstance(content.get("domains"), Mapping):
        raise ValueError(f"{where}: expected a mapping with the key 'domains'")
    if "neighbours" in content:
        raise ValueError(f"{where}: the key 'neighbours' is now called 'related_methods'")
    _refuse_unknown(content, [item.name for item in fields(GridConfig)], where)
    values = {key: value for key, value in content.items() if value is not None}
    domains = values["domains"]
    for name, domain in domains.items():
        _check_domain(name, domain, where)
    sets = values.get("training_sets") or [[name] for name in domains] + ([list(domains)] if len(domains) > 1 else [])
    values["training_sets"] = tuple((names,) if isinstance(names, str) else tuple(names) for names in sets)
    for names in values["training_sets"]:
        unknown = [name for name in names if name not in domains]
        if unknown:
            raise ValueError(f"{where}: training set {list(names)} names {unknown[0]!r}, which is no domain")
    for key, known in _KEYS.items():
        _refuse_unknown(values.get(key) or {}, known, f"{where}, {key}")
    for key in ("seeds", "k"):
        _check_list(values, key, "whole numbers", lambda n: isinstance(n, int) and n >= 0, where)
    _check_list(values, "shares", "numbers between 0 and 1", lambda n: isinstance(n, int | float) and 0 < n < 1, where)
    _check_list(values, "indexes", "names", lambda name: isinstance(name, str), where)
    values["shares"] = tuple(sorted(values.get("shares", ())))
    methods = values.get("related_methods", {})
    methods = methods if isinstance(methods, Mapping) else dict.fromkeys(methods)
    _refuse_unknown(methods, RELATED_METHODS, f"{where}, related_methods")
    values["related_methods"] = {name: dict(settings or {}) for name, settings in methods.items()}
    models = values.get("models", {}).items()
    values["models"] = {name: [paths] if isinstance(paths, str) else list(paths) for name, paths in models}
    grid = GridConfig(**values)
    grid.caption_options  # noqa: B018 (the options check themselves)
    known = sorted({model.key for model in grid.all_models()})
    for name, paths in grid.models.items():
        if name not in known:
            raise ValueError(f"{where}: models names the training set {name!r}; the grid has {', '.join(known)}")
        if len(paths) != len(grid.seeds):
            raise ValueError(f"{where}: {len(paths)} models for {name!r}, but {len(grid.seeds)} seeds")
    return grid


def _check_domain(name: str, values: Any, where: str) -> None:
    if not isinstance(values, Mapping) or "dataset" not in values:
        raise ValueError(f"{where}: the domain {name!r} needs a 'dataset'")
    if name == LARGE or "+" in name or "/" in name:
        raise ValueError(f"{where}: {name!r} cannot be the name of a domain: no '+', no '/', and not {LARGE!r}")
    _refuse_unknown(values, [*signature(load_test_clips).parameters, "events"], f"{where}, domain {name!r}")


def _refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _check_list(values: dict[str, Any], key: str, kind: str, fits: Callable[[Any], bool], where: str) -> None:
    if key in values:
        items = [values[key]] if isinstance(values[key], int) else values[key]
        if not isinstance(items, list) or not all(map(fits, items)):
            raise ValueError(f"{where}: {key} must be a list of {kind}, got {items!r}")
        values[key] = tuple(items)
