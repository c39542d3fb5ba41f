"""What a caller can choose about a caption, written down once.

[`CaptionOptions`] is the one list of retrieval and decoding options. The flags of every command that captions, the
keyword arguments of the pipeline, the keys of evaluation files, the settings that a resumed run compares and the lines
of a model card are derived from its fields. A new option is one field here and its use in `captioning_recap.py`.

This file imports the standard library only: the console script reads it before torch is imported.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

RETRIEVAL, DECODING, RERANKING = "retrieval", "decoding", "reranking"
# What turns off the reranking of a checkpoint that has it in its generation configuration.
NO_RERANKING = "none"
RERANKERS = ("clap", NO_RERANKING)


def _option(group: str, kind: type, text: str, **limits: Any) -> Any:
    """A field whose default, None, leaves the choice to the checkpoint.

    Args:
        group: `RETRIEVAL`, `DECODING` or `RERANKING`.
        kind: `int`, `float`, `bool` or `str`.
        text: the help of its flag.
        limits: `minimum`, `maximum` (both allowed values), `above` (not allowed itself) or `choices`.
    """
    return field(default=None, metadata={"group": group, "kind": kind, "help": text, **limits})


@dataclass(frozen=True)
class CaptionOptions:
    """Options of retrieval, decoding and reranking. `None`, the default of each, leaves the choice to the checkpoint:
    retrieval to its processor, decoding and reranking to its `generation_config.json`.

    Args:
        k (`int`, *optional*): number of captions in the prompt.
        retrieval_diversity (`float`, *optional*): 0 takes the nearest captions, above 0 up to 1 captions that differ
            from each other (maximal marginal relevance).
        retrieval_score_threshold (`float`, *optional*): leaves out captions with a lower cosine to the recording.
        num_beams, max_new_tokens (`int`, *optional*), length_penalty (`float`, *optional*), do_sample (`bool`,
            *optional*), temperature, top_p (`float`, *optional*): as in `transformers.GenerationConfig`.
        rerank (`str`, *optional*): `"clap"` returns the candidate whose CLAP text embedding is nearest to the
            recording, `"none"` the one that the search ranks first.
        candidates (`int`, *optional*): captions to rerank; default: the number of beams.
        rerank_weight (`float`, *optional*): weight of the CLAP cosine beside the score of the search; infinite: the
            cosine alone decides.

    Raises:
        `ValueError`: for a value outside its range; the message names the option and the range.
    """

    k: int | None = _option(RETRIEVAL, int, "number of captions in the prompt", minimum=0)
    retrieval_diversity: float | None = _option(
        RETRIEVAL,
        float,
        "0: the nearest captions; up to 1: captions that differ from each other",
        minimum=0,
        maximum=1,
    )
    retrieval_score_threshold: float | None = _option(
        RETRIEVAL, float, "leave out captions with a lower cosine to the recording", minimum=-1, maximum=1
    )
    num_beams: int | None = _option(DECODING, int, "number of beams", minimum=1)
    max_new_tokens: int | None = _option(DECODING, int, "longest caption in tokens", minimum=1)
    length_penalty: float | None = _option(DECODING, float, "above 0 favours long captions, below 0 short ones")
    do_sample: bool | None = _option(DECODING, bool, "sample instead of searching with beams")
    temperature: float | None = _option(DECODING, float, "of sampling", above=0)
    top_p: float | None = _option(DECODING, float, "share of probability to sample from", above=0, maximum=1)
    rerank: str | None = _option(
        RERANKING,
        str,
        "clap: the candidate nearest to the recording; none: the first of the search",
        choices=RERANKERS,
    )
    candidates: int | None = _option(RERANKING, int, "captions to rerank; default: the beams", minimum=1)
    rerank_weight: float | None = _option(
        RERANKING, float, "weight of the CLAP cosine beside the score; inf: the cosine alone", minimum=0
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None:
                object.__setattr__(self, option.name, _checked(option.name, value, option.metadata))
        if self.rerank == NO_RERANKING and (self.candidates is not None or self.rerank_weight is not None):
            raise ValueError(
                "`candidates` and `rerank_weight` are options of reranking, and `rerank` is 'none': leave them out, "
                "or set `rerank` to 'clap'."
            )

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

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds a flag for each option to a parser: `--num-beams N`, in one group for each group of options."""
        groups: dict[str, Any] = {}
        for option in fields(cls):
            data = option.metadata
            group = groups.get(data["group"])
            if group is None:
                group = groups[data["group"]] = parser.add_argument_group(f"{data['group']} (default: the model's)")
            flag = "--" + option.name.replace("_", "-")
            if data["kind"] is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=data["help"])
            else:
                metavar = None if "choices" in data else ("N" if data["kind"] is int else "X")
                group.add_argument(
                    flag,
                    type=_parser(option.name, data),
                    choices=data.get("choices"),
                    metavar=metavar,
                    help=data["help"],
                )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> CaptionOptions:
        """The options among parsed arguments.

        Raises:
            `ValueError`: for options that contradict each other.
        """
        return cls(**{name: getattr(args, name, None) for name in cls.names()})


def _parser(name: str, limits: Mapping[str, Any]) -> Any:
    """A converter for argparse, whose errors say what was expected."""

    def parse(text: str) -> Any:
        try:
            return _checked(name, limits["kind"](text), limits)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {_expected(limits)}, got {text!r}") from None

    return parse


def _checked(name: str, value: Any, limits: Mapping[str, Any]) -> Any:
    kind = limits["kind"]
    # NumPy's numbers are numbers; True is not one, and 3.0 is no integer.
    fits = isinstance(value, kind) or (
        kind is float and not isinstance(value, (str, bool)) and hasattr(value, "__float__")
    )
    fits = fits or (kind is int and hasattr(value, "__index__"))
    if kind is not bool and isinstance(value, bool):
        fits = False
    if fits:
        value = kind(value)
        if kind is float and math.isnan(value):
            fits = False
        for limit, outside in (
            ("minimum", lambda bound: value < bound),
            ("maximum", lambda bound: value > bound),
            ("above", lambda bound: value <= bound),
            ("choices", lambda allowed: value not in allowed),
        ):
            fits = fits and not (limit in limits and outside(limits[limit]))
    if not fits:
        raise ValueError(f"`{name}` must be {_expected(limits)}, got {value!r}.")
    return value


def _expected(limits: Mapping[str, Any]) -> str:
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


__all__ = ["DECODING", "NO_RERANKING", "RERANKERS", "RERANKING", "RETRIEVAL", "CaptionOptions"]
