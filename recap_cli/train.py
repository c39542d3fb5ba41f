"""`recap train`: a captioner from recordings and captions."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap train`: every field of `CaptionerTrainingConfig`."""
    from recap_hf.training.config import add_config_arguments
    from recap_hf.training.tasks.captioner import CaptionerTrainingConfig

    add_config_arguments(parser, CaptionerTrainingConfig)


def run(args: argparse.Namespace) -> int:
    """Train, or start the processes that do."""
    from recap_hf.training.config import load_config
    from recap_hf.training.launch import launch
    from recap_hf.training.tasks.captioner import CaptionerTrainingConfig

    return launch(load_config(args, CaptionerTrainingConfig))
