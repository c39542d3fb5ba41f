"""The version of recap_hf, in one place."""

__version__ = "0.1.0"
