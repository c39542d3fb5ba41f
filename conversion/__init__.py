"""Weights of other layouts into `recap_hf` and back: pure state-dict functions, with commands that check them."""

from .assemble import convert_recap_original, convert_stock, convert_to_stock, read_cross_attention
from .laion_clap import clap_config_from_laion, convert_laion_clap, convert_laion_clap_state_dict
from .recap_original import convert_recap_original_state_dict, recap_config_from_original
from .state_dicts import ConversionError
from .stock import split_state_dict, stock_decoder, stock_parts, widen_cross_attention
from .yamnet import convert_yamnet

__all__ = [
    "ConversionError",
    "clap_config_from_laion",
    "convert_laion_clap",
    "convert_laion_clap_state_dict",
    "convert_recap_original",
    "convert_recap_original_state_dict",
    "convert_stock",
    "convert_to_stock",
    "convert_yamnet",
    "read_cross_attention",
    "recap_config_from_original",
    "split_state_dict",
    "stock_decoder",
    "stock_parts",
    "widen_cross_attention",
]
