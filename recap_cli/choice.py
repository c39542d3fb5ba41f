"""Options for which of the captions that are found are taken."""

from __future__ import annotations

import argparse


def add_choice_arguments(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Adds `--diversity` and `--score-drop`; not given, both are `None`.

    Args:
        prefix: of the names, such as "retrieval-".
    """
    parser.add_argument(
        f"--{prefix}diversity",
        type=_share,
        metavar="SHARE",
        help="above 0, up to 1: captions that differ from each other, by maximal marginal relevance (default: the "
        "nearest)",
    )
    parser.add_argument(
        f"--{prefix}score-drop",
        type=_drop,
        metavar="DROP",
        help="leave captions out that score so much less than the nearest, such as 0.05 (default: none)",
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def _drop(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


_share.__name__ = _drop.__name__ = "number"

__all__ = ["add_choice_arguments"]
