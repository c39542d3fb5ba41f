"""`recap train`: a captioner from recordings and captions."""

from __future__ import annotations

import argparse

from recap_hf.training.arguments import add_training_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap train`: every field of `TrainingConfig`."""
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, or starts the processes that do."""
    config = load_config(args)
    from recap_hf.training.launch import launch
    from recap_hf.training.main import train

    return launch(config, train)
