"""Weights of other layouts into `recap_hf` and back: pure state-dict functions, with commands that check them."""

from .laion_clap import clap_config_from_laion, convert_laion_clap, convert_laion_clap_state_dict
from .state_dicts import ConversionError

__all__ = [
    "ConversionError",
    "clap_config_from_laion",
    "convert_laion_clap",
    "convert_laion_clap_state_dict",
]
