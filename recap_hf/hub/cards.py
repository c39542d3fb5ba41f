"""Model and dataset cards, rendered from the templates of `model_cards/` and from what is known.

The metadata is huggingface_hub's `ModelCardData` and `DatasetCardData`, the figures are its `EvalResult`: what is
written here is read back by `ModelCard.load`.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .facts import CardFacts, DataSource, Result
from .licences import forbids_commercial_use, licence_identifier

MARK = "<!-- rendered by recap_hf; a push renders it again until somebody edits it ({}) -->"
PIPELINE_TAG = "audio-text-to-text"
MODEL_TAGS = ("audio-captioning", "recap", "clap", "gpt2", "retrieval-augmented-generation")
DATASTORE_TAGS = ("audio-captioning", "recap", "caption-datastore")
MISSING = "–"
# The Hub's names of sizes up to 10 billion rows.
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


@dataclass(frozen=True)
class DatastoreFacts:
    """The description of a datastore on a card.

    Args:
        captions: number of captions.
        dimension: of an embedding.
        index: how it is searched, in words ("exact search").
        sources: where the captions are from, one entry per source and licence.
    """

    captions: int
    dimension: int
    index: str
    sources: tuple[DataSource, ...] = ()

    @property
    def non_commercial(self) -> list[str]:
        """Names of the sources whose licence forbids commercial use."""
        return [source.name for source in self.sources if forbids_commercial_use(source.licence)]

    @property
    def unlicensed(self) -> int:
        """Number of captions for which no licence is recorded."""
        return sum(source.captions or 0 for source in self.sources if not source.licence)


@dataclass(frozen=True)
class ResultTable:
    """Figures of one test set, which `test` is one of; `rows` are those of a system, `None` for the model itself."""

    test: Result
    metrics: list[str]
    rows: dict[str | None, list[Result | None]]
    implementations: list[str]
    intervals: bool


@dataclass
class ModelDescription:
    """What a checkpoint's own files say.

    Args:
        parts: name of a part to its description.
        prompt: with placeholders for the captions.
        num_retrieved: number of captions in the prompt.
        options: name, value and meaning of each option of `CaptionOptions` that the checkpoint sets.
    """

    parts: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    num_retrieved: int = 0
    options: list[tuple[str, Any, str]] = field(default_factory=list)


def render_model_card(
    repo_id: str,
    description: ModelDescription,
    facts: CardFacts | None = None,
    datastore: DatastoreFacts | None = None,
    datastore_repo: tuple[str, str | None] | None = None,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        repo_id: the repository that it is going to.
        description: what its files say.
        facts: what else is known; default: nothing.
        datastore: the datastore that it comes with.
        datastore_repo: id and revision of the dataset repository that holds the datastore, if one does.
    """
    facts = facts or CardFacts()
    name = repo_id.rpartition("/")[2]
    own = [result for result in facts.results if result.system is None]
    datasets = unique([*(source.hub_id for source in facts.training_data), datastore_repo and datastore_repo[0]])
    card_data = ModelCardData(
        language=facts.languages or None,
        **licence_metadata(facts.licence),
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=unique([*MODEL_TAGS, *facts.tags]),
        base_model=facts.base_models or None,
        datasets=datasets or None,
        metrics=unique(slug(result.metric) for result in own) or None,
        model_name=name if own else None,
        eval_results=eval_results(own) if own else None,
    )
    values = {"title": facts.title or name, "repo_id": repo_id, "model": description, "facts": facts}
    values |= {"datastore": datastore, "datastore_repo": datastore_repo, "tables": result_tables(facts.results)}
    return ModelCard(render("model_card.md", card_data=card_data.to_yaml(), **values))


def render_datastore_card(
    repo_id: str,
    datastore: DatastoreFacts,
    data_file: str,
    columns: Sequence[str] = (),
    examples: Sequence[str] = (),
    facts: CardFacts | None = None,
) -> DatasetCard:
    """The card of a datastore that is a dataset repository of its own.

    Args:
        repo_id: the repository that it is going to.
        datastore: what it holds.
        data_file: path or pattern of its Parquet files in the repository, named by `configs` for the viewer.
        columns: columns of these files.
        examples: a few captions to show.
        facts: what else is known (title, summary, licence, languages, limits, tags).
    """
    facts = facts or CardFacts()
    licences = unique(licence_identifier(source.licence) or "other" for source in datastore.sources if source.licence)
    metadata = licence_metadata(facts.licence) if facts.licence else {"license": licences or None}
    if datastore.unlicensed and not facts.licence:
        metadata["license"] = [*licences, "unknown"]
    title = facts.title or repo_id.rpartition("/")[2]
    card_data = DatasetCardData(
        language=facts.languages or None,
        **metadata,
        pretty_name=title,
        size_categories=[size_category(datastore.captions)],
        task_categories=["text-retrieval"],
        tags=unique([*DATASTORE_TAGS, *facts.tags]),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": data_file}]}],
        caption_sources=[
            {"name": source.name, "captions": source.captions, "license": source.licence or "unknown"}
            for source in datastore.sources
        ],
    )
    values = {"title": title, "repo_id": repo_id, "facts": facts, "datastore": datastore, "data_file": data_file}
    values |= {"columns": columns, "examples": examples}
    return DatasetCard(render("datastore_card.md", card_data=card_data.to_yaml(), **values))


def render(template: str, **values: Any) -> str:
    """A template of `model_cards/`, filled in; a name that it uses and does not get is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str:
        return resources.files("recap_hf.model_cards").joinpath(name).read_text(encoding="utf-8")

    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FunctionLoader(load), **options)
    environment.filters |= {"cell": cell, "code": code, "count": count, "linked": linked, "figure": figure}
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def cell(value: object) -> str:
    """A text as one line of Markdown that shows it as it is: no markup, no HTML, no end of a table's cell."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", re.sub(r"\s+", " ", str(value)).strip())


def code(value: object) -> str:
    """A text that cannot end the code span or block that it stands in."""
    return re.sub(r"\s+", " ", str(value)).replace("`", "'").strip()


def count(value: int | None) -> str:
    """A count with thousands separated, or a dash."""
    return MISSING if value is None else f"{value:,}"


def linked(source: DataSource) -> str:
    """A source's name, linked to where it is published."""
    url = f"https://huggingface.co/datasets/{source.hub_id}" if source.hub_id else source.url or ""
    if not re.match("https?://", url):
        return cell(source.name)
    return f"[{cell(source.name)}]({quote(url, safe=':/?#&=%@+,;~-._')})"


def slug(name: str) -> str:
    """A name as an identifier: lower case, words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def unique(values: Iterable[str | None]) -> list[str]:
    """Values in order, each once, without the empty ones."""
    return list(dict.fromkeys(value for value in values if value))


def size_category(number: int) -> str:
    """The Hub's size category of a dataset with this number of rows."""
    return next((name for power, name in enumerate(SIZES, start=3) if number < 10**power), "10B<n<100B")


def licence_metadata(name: str | None) -> dict[str, str]:
    """The licence keys of a card's metadata: a known identifier, or `other` with its name."""
    if not name:
        return {}
    identifier = licence_identifier(name)
    other = {"license": "other", "license_name": slug(name).replace("_", "-")}
    return {"license": identifier} if identifier else other


def eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """Figures as huggingface_hub's `EvalResult`, for the `model-index`.

    Raises:
        ValueError: two test sets of different names would be written as one.
    """
    names: dict[tuple, tuple] = {}
    converted = []
    for result in results:
        entry = EvalResult(
            task_type=PIPELINE_TAG,
            task_name="Audio captioning",
            dataset_type=result.dataset_id or slug(result.dataset),
            dataset_name=result.dataset,
            # The model-index tells test sets apart by type, config and split only.
            dataset_config=result.clip_list,
            dataset_split=result.split,
            dataset_args={"clips": result.clips} if result.clips is not None else None,
            metric_type=slug(result.metric),
            metric_name=result.metric,
            metric_value=round(result.value, 6),
            metric_args={"implementation": result.implementation}
            | ({"low": round(result.low, 6), "high": round(result.high, 6)} if has_interval(result) else {}),
        )
        described = (entry.dataset_name, result.clips)
        if names.setdefault(entry.unique_identifier, described) != described:
            shared = f"the name {entry.dataset_type!r}, split {result.split!r} and clip list {result.clip_list!r}"
            both = f"{names[entry.unique_identifier]} and {described} (name, clips)"
            raise ValueError(f"two test sets share {shared}: {both}. Give each its own `clip_list`.")
        converted.append(entry)
    return converted


def result_tables(results: Sequence[Result]) -> list[ResultTable]:
    """Figures as tables, one for each test set."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.split, result.clip_list, result.clips), []).append(result)
    return [result_table(group) for group in groups.values()]


def result_table(results: Sequence[Result]) -> ResultTable:
    """The figures of one test set: a row for each system, a column for each metric."""
    found = {(result.system, result.metric): result for result in results}
    metrics = unique(result.metric for result in results)
    rows = {
        system: [found.get((system, metric)) for metric in metrics]
        for system in dict.fromkeys(result.system for result in results)
    }
    by_code: dict[str, list[str]] = {}
    for result in results:
        by_code.setdefault(result.implementation, []).append(result.metric)
    codes = [name if len(by_code) == 1 else f"{name} ({', '.join(unique(used))})" for name, used in by_code.items()]
    return ResultTable(results[0], metrics, rows, codes, any(has_interval(result) for result in results))


def has_interval(result: Result) -> bool:
    return result.low is not None and result.high is not None


def figure(result: Result | None) -> str:
    """A figure in a table, with its interval."""
    if result is None:
        return MISSING
    digits = 3 if abs(result.value) < 10 else 1
    text = f"{result.value:.{digits}f}"
    return f"{text} [{result.low:.{digits}f}, {result.high:.{digits}f}]" if has_interval(result) else text


def save_card(card: ModelCard | DatasetCard, folder: str | Path) -> Path:
    """Writes a card as README.md into a folder, with a mark by which `is_unedited` knows it."""
    path, text = Path(folder, "README.md"), str(card).rstrip() + "\n"
    path.write_text(f"{text}\n{MARK.format(_digest(text))}\n", encoding="utf-8")
    return path


def is_unedited(path: str | Path) -> bool:
    """Whether a card is as it was rendered, so that rendering it again loses no edit."""
    text, _, mark = Path(path).read_text(encoding="utf-8").rstrip().rpartition("\n\n")
    return mark == MARK.format(_digest(text + "\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
