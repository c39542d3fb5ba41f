"""What ships inside the package: the embedded default model and example recordings."""

from pathlib import Path


def default_model_path() -> Path:
    """The folder of `recap-tiny`, the captioner that is used where no model is named."""
    return Path(__file__).parent / "recap-tiny"


def examples_path() -> Path:
    """The folder of the example recordings, all synthesised by this package's own code."""
    return Path(__file__).parent / "examples"
