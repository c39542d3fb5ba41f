"""Model and dataset cards, rendered from the templates of `model_cards/` and from what is known.

The metadata is huggingface_hub's `ModelCardData` and `DatasetCardData`, the figures are its `EvalResult`: what is
written here is read back by `ModelCard.load`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .facts import CardFacts, DataSource, Result
from .licences import forbids_commercial_use, licence_identifier

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, EvalResult, ModelCard

MARK = "<!-- rendered by recap_hf; a push renders it anew until somebody edits it ({}) -->"
PIPELINE_TAG = "audio-text-to-text"
TASK_NAME = "Audio captioning"
MODEL_TAGS = ("audio-captioning", "recap", "clap", "gpt2", "retrieval-augmented-generation")
DATASTORE_TAGS = ("audio-captioning", "recap", "caption-datastore")
MISSING = "–"
NOT_STATED = "not stated"
CODE_LICENCE = "The Python files of this repository are part of recap_hf and under Apache-2.0."
SIZE_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
LARGER_SIZES = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"))
DATASTORE_SUMMARY = "Captions of sounds with their CLAP text embeddings, for retrieval by a RECAP audio captioner."
COMMON_LIMITS = (
    "It repeats captions of its datastore: a wrong or offensive one can appear in its output. Look at `retrieved` "
    "when a caption surprises you.",
    "A sound that is neither in the training data nor in the datastore is described as the most similar one that is.",
    "It may caption speech as speech, but does not transcribe it.",
    "Do not rely on it where a missed or wrong caption does harm.",
)


@dataclass(frozen=True)
class DatastoreFacts:
    """What a card says about a datastore.

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
        return [cell(source.name) for source in self.sources if forbids_commercial_use(source.licence)]

    @property
    def unlicensed(self) -> int:
        """Number of captions for which no licence is recorded."""
        return sum(source.captions or 0 for source in self.sources if not source.licence)


@dataclass(frozen=True)
class ResultTable:
    """Figures of one test set: a row per system, a column per metric."""

    heading: str
    metrics: list[str]
    rows: list[tuple[str, list[str]]]
    implementations: list[str]
    intervals: bool


@dataclass
class ModelDescription:
    """What a checkpoint's own files say: parts (name to description), prompt and number of retrieved captions."""

    parts: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    num_retrieved: int = 0


def render_model_card(
    repo_id: str,
    description: ModelDescription,
    facts: CardFacts | None = None,
    datastore: DatastoreFacts | None = None,
    datastore_repo: tuple[str, str | None] | None = None,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        repo_id: where it is going to be.
        description: what its files say.
        facts: what else is known; nothing by default.
        datastore: the datastore that it comes with.
        datastore_repo: id and revision of the dataset repository that holds the datastore, if one does.
    """
    from huggingface_hub import ModelCard, ModelCardData

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
    limits = [*COMMON_LIMITS, *facts.limits]
    if facts.languages == ["en"]:
        limits.insert(3, "It writes English.")
    content = render(
        "model_card.md",
        card_data=card_data.to_yaml(),
        title=facts.title or name,
        summary=facts.summary or default_summary(description, datastore),
        repo_id=repo_id,
        model=description.parts,
        retrieval={"count": description.num_retrieved, "prompt": description.prompt},
        datastore=datastore,
        where=datastore_location(datastore_repo),
        training_data=facts.training_data,
        training=facts.training,
        tables=result_tables(facts.results),
        notes=facts.result_notes,
        sections=facts.sections,
        limits=limits,
        licence_text=model_licence_text(facts.licence, datastore),
    )
    return ModelCard(content)


def render_datastore_card(
    repo_id: str,
    datastore: DatastoreFacts,
    data_file: str,
    columns: Sequence[str] = (),
    examples: Sequence[str] = (),
    encoder: str | None = None,
    model_id: str = "recap-tiny",
    facts: CardFacts | None = None,
) -> DatasetCard:
    """The card of a datastore that is a dataset repository of its own.

    Args:
        repo_id: where it is going to be.
        datastore: what it holds.
        data_file: path or pattern of its Parquet files in the repository, named by `configs` for the viewer.
        columns: columns of these files.
        examples: a few captions to show.
        encoder: name of the text encoder of its embeddings.
        model_id: a captioner that takes it.
        facts: what else is known (title, summary, licence, languages, limits, tags).
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    facts = facts or CardFacts()
    licences = unique(licence_identifier(source.licence) or "other" for source in datastore.sources if source.licence)
    metadata = licence_metadata(facts.licence) if facts.licence else {"license": licences or None}
    if datastore.unlicensed and not facts.licence:
        metadata["license"] = [*licences, "unknown"]
    card_data = DatasetCardData(
        language=facts.languages or None,
        **metadata,
        pretty_name=facts.title or repo_id.rpartition("/")[2],
        size_categories=[size_category(datastore.captions)],
        task_categories=["text-retrieval"],
        tags=unique([*DATASTORE_TAGS, *facts.tags]),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": data_file}]}],
        caption_sources=[
            {"name": source.name, "captions": source.captions, "license": source.licence or "unknown"}
            for source in datastore.sources
        ],
    )
    content = render(
        "datastore_card.md",
        card_data=card_data.to_yaml(),
        title=facts.title or repo_id.rpartition("/")[2],
        summary=facts.summary or DATASTORE_SUMMARY,
        repo_id=repo_id,
        datastore=datastore,
        data_file=data_file,
        columns=[f"`{column}`" for column in columns],
        examples=[cell(example) for example in examples],
        encoder=encoder,
        model_id=model_id,
        limits=facts.limits,
        licence_text=datastore_licence_text(facts.licence, datastore),
    )
    return DatasetCard(content)


def render(template: str, **values: Any) -> str:
    """A template of `model_cards/`, filled in; a name that it uses and does not get is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(template_text), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "count": count, "linked": linked, "stated": stated}
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def template_text(name: str) -> str:
    """The text of a template, from the source tree or an installed wheel."""
    return resources.files("recap_hf.model_cards").joinpath(name).read_text(encoding="utf-8")


# words and cells


def cell(value: object) -> str:
    """A value as plain text of Markdown: no table cell, link, HTML or emphasis can begin or end in it."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", re.sub(r"\s+", " ", str(value)).strip())


def count(value: int | None) -> str:
    """A count with thousands separated, or a dash."""
    return MISSING if value is None else f"{value:,}"


def stated(value: str | None) -> str:
    """A licence in a table, or that there is none."""
    return cell(value) if value else NOT_STATED


def linked(source: DataSource) -> str:
    """A source's name, linked to where it is published if that is a web address."""
    url = f"https://huggingface.co/datasets/{source.hub_id}" if source.hub_id else source.url or ""
    safe = quote(url, safe=":/?#&=%+,;~@!$-._")
    return f"[{cell(source.name)}]({safe})" if url.startswith(("https://", "http://")) else cell(source.name)


def slug(name: str) -> str:
    """A name as an identifier: lower case, words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def unique(values: Iterable[str | None]) -> list[str]:
    """Values in order, each once, without the empty ones."""
    return list(dict.fromkeys(value for value in values if value))


def size_category(number: int) -> str:
    """The Hub's size category of a dataset of so many rows."""
    return next((name for limit, name in (*SIZE_CATEGORIES, *LARGER_SIZES) if number < limit), "10B<n<100B")


def default_summary(description: ModelDescription, datastore: DatastoreFacts | None) -> str:
    """The first paragraph where its author has written none."""
    if not description.num_retrieved:
        return "An audio captioner: it describes a recording in one sentence."
    number = description.num_retrieved
    captions = f"{number} captions that fit it" if number > 1 else "caption that fits it"
    of = f" of {count(datastore.captions)} captions" if datastore else ""
    return (
        f"A retrieval-augmented audio captioner: it retrieves the {captions} best from a datastore{of}, and describes "
        "the recording in one sentence. With another datastore it captions another domain without training."
    )


def datastore_location(repo: tuple[str, str | None] | None) -> str:
    """Where the datastore of a checkpoint is, as a sentence."""
    if repo is None:
        return "The datastore is in the folder `datastore` of this repository."
    repo_id, revision = repo
    pinned = f" at revision `{revision}`" if revision else ""
    return f"The datastore is the dataset [{repo_id}](https://huggingface.co/datasets/{repo_id}){pinned}."


# licences


def licence_metadata(name: str | None) -> dict[str, str]:
    """The licence keys of a card's metadata: a known identifier, or `other` with its name."""
    if not name:
        return {}
    identifier = licence_identifier(name)
    if identifier:
        return {"license": identifier}
    return {"license": "other", "license_name": slug(name).replace("_", "-")}


def model_licence_text(name: str | None, datastore: DatastoreFacts | None) -> str:
    """The licence section of a model card."""
    weights = (
        f"The weights are released under {cell(name)}."
        if name
        else "No licence is stated for the weights: ask their author before you build on them."
    )
    captions = " The captions of the datastore keep the licences of their sources, listed above." if datastore else ""
    return f"{weights} {CODE_LICENCE}{captions}"


def datastore_licence_text(name: str | None, datastore: DatastoreFacts) -> str:
    """The licence section of a datastore's card."""
    whole = f"The collection is released under {cell(name)}. " if name else ""
    return f"{whole}Each caption keeps the licence of its source, as listed above and in the metadata."


# figures


def eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """Figures as huggingface_hub's `EvalResult`, for the `model-index`.

    Raises:
        ValueError: two test sets of different names would be written as one.
    """
    from huggingface_hub import EvalResult

    names: dict[tuple, tuple] = {}
    converted = []
    for result in results:
        entry = EvalResult(
            task_type=PIPELINE_TAG,
            task_name=TASK_NAME,
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
            raise ValueError(
                f"two test sets share the name {entry.dataset_type!r}, split {result.split!r} and clip list "
                f"{result.clip_list!r}: {names[entry.unique_identifier]} and {described} (name, clips). Give each its "
                "own `clip_list`."
            )
        converted.append(entry)
    return converted


def result_tables(results: Sequence[Result]) -> list[ResultTable]:
    """Figures as tables: one per test set, the model's own row in bold, controls and baselines beside it."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.split, result.clip_list, result.clips), []).append(result)
    return [result_table(key, group) for key, group in groups.items()]


def result_table(key: tuple, results: Sequence[Result]) -> ResultTable:
    """The table of one test set; `key` is its dataset, split, clip list and number of clips."""
    dataset, split, clip_list, clips = key
    parts = [f"{cell(dataset)} ({cell(split)} split)"]
    parts += [f"{count(clips)} clips"] if clips is not None else []
    parts += [f"clip list `{clip_list.replace(chr(96), chr(39))}`"] if clip_list else []
    metrics = unique(result.metric for result in results)
    systems = list(dict.fromkeys(result.system for result in results))
    found = {(result.system, result.metric): result for result in results}
    rows = [
        (cell(system) if system else "**this model**", [figure(found.get((system, metric))) for metric in metrics])
        for system in systems
    ]
    by_code: dict[str, list[str]] = {}
    for result in results:
        by_code.setdefault(result.implementation, []).append(result.metric)
    codes = [
        cell(code) if len(by_code) == 1 else f"{cell(code)} ({', '.join(unique(used))})"
        for code, used in by_code.items()
    ]
    return ResultTable(
        ", ".join(parts),
        [cell(metric) for metric in metrics],
        rows,
        codes,
        any(has_interval(result) for result in results),
    )


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
    """Writes a card as README.md into a folder, marked so that `is_unedited` knows it."""
    path = Path(folder, "README.md")
    text = str(card).rstrip() + "\n"
    path.write_text(f"{text}\n{MARK.format(digest(text))}\n", encoding="utf-8")
    return path


def is_unedited(path: str | Path) -> bool:
    """Whether a card is as `save_card` wrote it: nobody's words are lost when it is rendered again."""
    text, _, mark = Path(path).read_text(encoding="utf-8").rstrip().rpartition("\n\n")
    return mark == MARK.format(digest(text + "\n"))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
