"""`recap pretrain`: the bases of a captioner, a CLAP and a GPT-2, on your own data."""

import argparse

from recap_cli.train import run as run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap pretrain`: every field of the settings of the base."""
    from recap_hf.training.config import add_config_arguments
    from recap_hf.training.tasks.clap import ClapTrainingConfig
    from recap_hf.training.tasks.language_model import LanguageModelTrainingConfig

    bases = parser.add_subparsers(metavar="BASE", required=True)
    for name, kind, text in (
        ("clap", ClapTrainingConfig, "contrastive training of a CLAP on recordings and captions"),
        ("language-model", LanguageModelTrainingConfig, "training of a GPT-2 on retrieval prompts and captions"),
    ):
        base = bases.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_config_arguments(base, kind)
        base.set_defaults(settings=kind)
