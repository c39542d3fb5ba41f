"""The options of decoding that the commands share: what they are not given, the checkpoint decides."""

from __future__ import annotations

import argparse
from typing import Any

from .numbers import positive, share, weight

_NAMES = ("promptless_weight", "soundless_weight", "rerank", "candidates", "rerank_weight")


def add_reading_arguments(parser: Any) -> None:
    """`--promptless-weight` and `--soundless-weight`."""
    parser.add_argument(
        "--promptless-weight",
        type=share,
        metavar="W",
        help="share of each word's probability that comes from listening without the retrieved captions; below 1 "
        "(default: the model's)",
    )
    parser.add_argument(
        "--soundless-weight",
        type=share,
        metavar="W",
        help="share that comes from the language model alone, which reads the captions and does not listen; both "
        "together below 1 (default: the model's)",
    )


def add_rerank_arguments(parser: Any) -> None:
    """`--rerank`, `--candidates` and `--rerank-weight`."""
    parser.add_argument(
        "--rerank",
        choices=("clap", "none"),
        help="clap: of several captions keep the one that CLAP finds nearest; none: the search's best "
        "(default: the model's)",
    )
    parser.add_argument(
        "--candidates", type=positive, metavar="N", help="captions to choose from when reranking (default: the beams)"
    )
    parser.add_argument(
        "--rerank-weight",
        type=weight,
        metavar="W",
        help="what CLAP's cosine counts beside the caption's own score when reranking; inf: CLAP alone decides "
        "(default: the model's)",
    )


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those options that were given, by the names that the pipeline has for them."""
    return {name: getattr(args, name) for name in _NAMES if getattr(args, name, None) is not None}


def rerank_error(args: argparse.Namespace) -> str | None:
    """What is wrong with the reranking options together, before a model is loaded."""
    asked = args.candidates is not None or args.rerank_weight is not None
    if asked and args.rerank == "none":
        return "--candidates and --rerank-weight say how captions are reranked, and --rerank none that they are not."
    return None
