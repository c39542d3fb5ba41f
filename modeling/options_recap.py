"""What can be chosen about a caption, written down once: retrieval, decoding, reranking, and the words of the prompt.

[`CaptionOptions`] is the one list of options. The flags of every command that captions, the keyword arguments of the
pipeline, the keys of evaluation files, the settings that a resumed run compares and the lines of a model card are
derived from its fields. A new option is one field here and its use in `captioning_recap.py`.

This file imports the standard library only: the console script reads it before torch is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

RETRIEVAL, DECODING, RERANKING = "retrieval", "decoding", "reranking"
# What turns off the reranking of a checkpoint that has it in its generation configuration.
NO_RERANKING = "none"
RERANKERS = ("clap", NO_RERANKING)
# Of a recording that no caption of the datastore reaches the threshold for.
UNRECOGNISED_CAPTION = "an unrecognised sound"
PLACEHOLDER = "{captions}"
_FINAL_PUNCTUATION = " .!?,;:"


def _option(group: str, kind: type, text: str, **limits: Any) -> Any:
    """A field of a group, whose default, None, leaves the choice to the checkpoint. `text` is the help of its flag;
    `limits`: `minimum` and `maximum` (both allowed values), `above` (not allowed itself) or `choices`."""
    return field(default=None, metadata={"group": group, "kind": kind, "help": text, **limits})


@dataclass(frozen=True)
class CaptionOptions:
    """Options of retrieval, decoding and reranking. `None`, the default of each, leaves the choice to the checkpoint:
    retrieval to its processor, decoding and reranking to its `generation_config.json`.

    Each field states its meaning and range. The options of decoding are those of `transformers.GenerationConfig`,
    `retrieval_diversity` is the share of a retrieved caption that the next ones need not say, and `rerank="clap"`
    returns the candidate whose CLAP text embedding is nearest to the recording.

    Raises:
        `ValueError`: for a value outside its range; the message names the option and the range.
    """

    k: int | None = _option(RETRIEVAL, int, "number of captions in the prompt", minimum=0)
    retrieval_diversity: float | None = _option(
        RETRIEVAL, float, "0: the nearest captions; to 1: captions that differ from each other", minimum=0, maximum=1
    )
    retrieval_score_threshold: float | None = _option(
        RETRIEVAL, float, "leave out captions with a lower cosine; without any: unrecognised", minimum=-1, maximum=1
    )
    projection_temperature: float | None = _option(
        RETRIEVAL, float, "of the mean of captions that replaces an embedding of audio; 0: none", minimum=0
    )
    num_beams: int | None = _option(DECODING, int, "number of beams", minimum=1)
    max_new_tokens: int | None = _option(DECODING, int, "longest caption in tokens", minimum=1)
    # Beyond these limits a power of the length or a quotient of logits is infinite.
    length_penalty: float | None = _option(
        DECODING, float, "above 0 favours long captions, below 0 short ones", minimum=-100, maximum=100
    )
    do_sample: bool | None = _option(DECODING, bool, "sample instead of searching with beams")
    temperature: float | None = _option(DECODING, float, "of sampling", minimum=0.001)
    top_p: float | None = _option(DECODING, float, "share of probability to sample from", above=0, maximum=1)
    rerank: str | None = _option(
        RERANKING, str, "clap: the candidate nearest to the recording; none: the search's first", choices=RERANKERS
    )
    candidates: int | None = _option(RERANKING, int, "captions to rerank; default: the beams", minimum=1)
    rerank_weight: float | None = _option(
        RERANKING, float, "weight of the CLAP cosine beside the score; inf: the cosine alone", minimum=0
    )
    copy_margin: float | None = _option(
        RERANKING, float, "retrieved captions that cannot be written win if nearer by this; inf: none", minimum=0
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None:
                object.__setattr__(self, option.name, _checked(option.name, value, option.metadata))
        if self.rerank == NO_RERANKING:
            self.check_no_reranking()

    def check_no_reranking(self) -> None:
        """A `ValueError` for options of reranking, where nothing is reranked."""
        given = [f"`{name}`" for name in self.names(RERANKING)[1:] if getattr(self, name) is not None]
        if given:
            names = " and ".join(given)
            raise ValueError(f"Without reranking {names} cannot be chosen: set `rerank` to 'clap', or leave that out.")

    @classmethod
    def check(cls, option: str, value: Any, name: str | None = None) -> Any:
        """The value in the type of an option; a `ValueError`, which calls it `name`, if it is outside the range."""
        return _checked(name or option, value, cls.__dataclass_fields__[option].metadata)

    @classmethod
    def names(cls, *groups: str) -> list[str]:
        """Names of all options, or of those in `groups`."""
        return [option.name for option in fields(cls) if not groups or option.metadata["group"] in groups]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CaptionOptions:
        """The options in a mapping.

        Raises:
            `ValueError`: for keys that are no options, or values outside their range.
        """
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise ValueError(f"Unknown caption options: {', '.join(unknown)}. Known: {', '.join(cls.names())}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The options that are set, by name, in the order of the fields."""
        return {name: value for name in self.names() if (value := getattr(self, name)) is not None}

    def generate_kwargs(self) -> dict[str, Any]:
        """The decoding options that are set, as `generate` takes them."""
        given = self.to_dict()
        return {name: given[name] for name in self.names(DECODING) if name in given}

    def merged_with(self, other: CaptionOptions) -> CaptionOptions:
        """These options, with those that `other` sets in their place."""
        return CaptionOptions(**{**self.to_dict(), **other.to_dict()})


def _checked(name: str, value: Any, limits: Mapping[str, Any]) -> Any:
    kind = limits["kind"]
    # NumPy's numbers are numbers; True is not one, and 3.0 is no integer.
    number = {int: "__index__", float: "__float__"}.get(kind)
    fits = isinstance(value, kind) or (number is not None and hasattr(value, number))
    if fits and (kind is bool or not isinstance(value, bool)):
        value = kind(value)
        if (
            not (kind is float and math.isnan(value))
            and value in limits.get("choices", (value,))
            and ("above" not in limits or value > limits["above"])
            and ("minimum" not in limits or value >= limits["minimum"])
            and ("maximum" not in limits or value <= limits["maximum"])
        ):
            return value
    raise ValueError(f"`{name}` must be {expected(limits)}, got {value!r}.")


def expected(limits: Mapping[str, Any]) -> str:
    """The values that the metadata of a field allow, in words."""
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    text = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}[limits["kind"]]
    if "minimum" in limits and "maximum" in limits:
        return f"{text} from {limits['minimum']} to {limits['maximum']}"
    if "minimum" in limits:
        return f"{text} of at least {limits['minimum']}"
    if "above" in limits:
        return f"{text} above {limits['above']}" + (f" and at most {limits['maximum']}" if "maximum" in limits else "")
    return text


def clean_caption(caption: str) -> str:
    """A caption as it stands in a prompt: white space folded, final punctuation gone, the rest verbatim.

    >>> clean_caption(" A dog  barks, twice. ")
    'A dog barks, twice'
    """
    return " ".join(caption.split()).rstrip(_FINAL_PUNCTUATION)


@dataclass(frozen=True)
class PromptTemplate:
    """The words around the retrieved captions.

    Args:
        template (`str`): the prompt with `{captions}` once, where the captions go, and words after it.
        separator (`str`): what stands between two captions.
        without_captions (`str`): the prompt when nothing was retrieved. It ends as `template` does.
        target_prefix (`str`): what joins prompt and caption when the target of the training is tokenized.

    Raises:
        `ValueError`: if the template has no place for the captions, no words of their own after them (they tell the
            caption from the prompt in a generated text), or another ending than `without_captions`.
    """

    template: str
    separator: str
    without_captions: str
    target_prefix: str

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in vars(self).values()):
            raise ValueError(f"Template, separator and prefix of a prompt must be texts, got {vars(self)}.")
        if self.template.count(PLACEHOLDER) != 1:
            raise ValueError(f"`prompt_template` must contain {PLACEHOLDER!r} exactly once, got {self.template!r}.")
        before = f"{self.template.partition(PLACEHOLDER)[0]} {self.separator}"
        if not self.ending or self.ending in before:
            raise ValueError(
                f"`prompt_template` needs words after {PLACEHOLDER!r}, which tell the caption from the prompt, and "
                f"neither stand before it nor in `caption_separator`; got {self.template!r} and {self.separator!r}."
            )
        if not self.without_captions.rstrip().endswith(self.ending):
            raise ValueError(
                f"`prompt_without_captions` must end as `prompt_template` does, in {self.ending!r}; got "
                f"{self.without_captions!r}."
            )

    @classmethod
    def of(cls, settings: Any) -> PromptTemplate:
        """The template in the fields `prompt_template`, `caption_separator`, ... of a configuration or a processor."""
        names = ("prompt_template", "caption_separator", "prompt_without_captions", "target_prefix")
        return cls(*(getattr(settings, name) for name in names))

    @property
    def ending(self) -> str:
        """The words after the captions, without the punctuation and white space around them."""
        return self.template.partition(PLACEHOLDER)[2].strip().lstrip(_FINAL_PUNCTUATION)

    def build(self, captions: Sequence[str]) -> str:
        """The prompt of `captions`, most similar first."""
        cleaned = [text for text in map(self.cleaned, captions) if text]
        if not cleaned:
            return self.without_captions
        # Not str.format: a caption or a template may hold braces.
        return self.template.replace(PLACEHOLDER, self.separator.join(cleaned))

    def strip(self, text: str) -> str:
        """The caption in a generated `text`: what follows the first ending of a prompt, or all where there is none."""
        _, found, caption = text.partition(self.ending)
        return (caption if found else text).strip()

    def cleaned(self, caption: str) -> str:
        """A caption as it is in a prompt: `clean_caption` without the template's ending, at which `strip` cuts."""
        return " ".join(re.sub(re.escape(self.ending), " ", clean_caption(caption)).split())


PAPER_PROMPT = PromptTemplate(
    template="Audios similar to this audio sounds like: {captions}. This audio sounds like:",
    separator=", ",
    without_captions="This audio sounds like:",
    target_prefix=" ",
)
"""Section 3.1 of the paper, to the letter."""

__all__ = ["CaptionOptions", "PromptTemplate"]
