"""`recap pretrain`: the bases of a captioner, a CLAP and a GPT-2, on one's own data."""

from __future__ import annotations

import argparse

from recap_hf.pretraining.arguments import ClapPretrainingConfig, LanguageModelConfig
from recap_hf.training.options import add_config_arguments, load_settings

_STAGES = {
    "clap": (ClapPretrainingConfig, "contrastive training of a CLAP on recordings and captions"),
    "language-model": (LanguageModelConfig, "training of a GPT-2 on retrieval prompts and captions"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap pretrain`: every field of the stage's settings."""
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, (kind, text) in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_arguments(stage, kind)


def run(args: argparse.Namespace) -> int:
    """Trains, or starts the processes that do."""
    config = load_settings(args, _STAGES[args.stage][0])
    from recap_hf.training.launch import launch

    if args.stage == "clap":
        from recap_hf.pretraining.clap import pretrain_clap as train
    else:
        from recap_hf.pretraining.language_model import pretrain_language_model as train
    return launch(config, train, ("pretrain", args.stage))
