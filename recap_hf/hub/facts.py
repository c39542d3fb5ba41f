"""What a card may say: facts about a model, its data and its figures, as plain data that JSON and YAML hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

FACTS_FILE = "card_facts.json"


@dataclass(frozen=True)
class DataSource:
    """Data that a model was trained on, or captions that a datastore holds.

    Args:
        name: what people call it ("Clotho development").
        licence: as its publisher states it; None where nothing is stated.
        clips, captions: counts, where known.
        hub_id: id of the dataset on the Hub, if it is there.
        url: where it is published.
        use: what it served for ("cross-attention", "contrastive training of CLAP").
    """

    name: str
    licence: str | None = None
    clips: int | None = None
    captions: int | None = None
    hub_id: str | None = None
    url: str | None = None
    use: str | None = None


@dataclass(frozen=True)
class Result:
    """One figure.

    Args:
        metric: its usual name ("SPIDEr", "event F1").
        value: the figure.
        dataset: what it was measured on ("Clotho evaluation").
        implementation: the code that computed it, with its version ("pycocoevalcap 1.2, PTB tokenizer").
        split: split of the dataset.
        clips: how many clips.
        clip_list: name of the list of clips, where several are in use.
        low, high: ends of its 95 % interval.
        system: whose figure it is; None is the model, a baseline or control has its name here.
        dataset_id: id of the dataset on the Hub, where it has one.
    """

    metric: str
    value: float
    dataset: str
    implementation: str
    split: str = "test"
    clips: int | None = None
    clip_list: str | None = None
    low: float | None = None
    high: float | None = None
    system: str | None = None
    dataset_id: str | None = None


@dataclass
class CardFacts:
    """What is known about a model beyond what its own files say. Everything is optional.

    Args:
        title: heading of the card; the repository's name by default.
        summary: the first paragraph.
        licence: licence of the weights.
        languages: ISO 639-1 codes of the captions.
        base_models: Hub ids of the models that it was made from.
        training_data: what it was trained on.
        training: settings of the training, name to value, in the order in which they are to be shown.
        results: figures, the model's own and its controls'.
        result_notes: what a reader of the figures should know, one sentence each.
        limits: one sentence each, added to what is true of every RECAP model.
        tags: added to the card's tags.
    """

    title: str | None = None
    summary: str | None = None
    licence: str | None = None
    languages: list[str] = field(default_factory=lambda: ["en"])
    base_models: list[str] = field(default_factory=list)
    training_data: list[DataSource] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    result_notes: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CardFacts":
        """Facts from plain data.

        Raises:
            ValueError: a key is unknown or a required one is missing; the message names it and the ones that exist.
        """
        facts = _build(cls, values, "the card's facts")
        for name, kind in (("training_data", DataSource), ("results", Result)):
            setattr(facts, name, [_build(kind, item, f"an entry of {name!r}") for item in getattr(facts, name)])
        return facts

    @classmethod
    def from_file(cls, path: str | Path) -> "CardFacts":
        """Facts from a JSON or YAML file.

        Raises:
            ValueError: the file is not what `from_dict` takes.
        """
        text = Path(path).read_text(encoding="utf-8")
        is_yaml = Path(path).suffix in (".yaml", ".yml")
        try:
            values = yaml.safe_load(text) if is_yaml else json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} does not parse: {error}") from error
        if not isinstance(values, Mapping):
            raise ValueError(f"{path} must hold a mapping of facts, it holds a {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _build(kind: type, values: Mapping[str, Any], what: str) -> Any:
    """An instance of a dataclass; its error names the keys that are unknown or missing."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping, got {values!r}")
    names = [entry.name for entry in fields(kind)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}; known are {', '.join(names)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{what} is incomplete: {error}") from error
