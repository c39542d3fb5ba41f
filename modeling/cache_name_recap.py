"""What this transformers calls the cache of keys and values."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GPT2LMHeadModel

# transformers 5.24 renamed it everywhere at once: in what forward passes take, in what `generate` takes and hands on,
# in what outputs are called. Since then the older name warns, and it ends in 5.40; before, the newer one is unknown.
# Asked of the layer that is called, not of the version: a development version counts as one before its release.
CACHE = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, under whichever of the two names a caller gave it.

    Raises:
        `ValueError`: under both, of which one would have to be ignored.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Give either `cache` or `past_key_values`: two names of one argument, and both are set.")
    return past_key_values if cache is None else cache


def name_cache(kwargs: dict[str, Any]) -> None:
    """Puts a cache among `kwargs`, under whichever name, under the one that this transformers knows.

    Raises:
        `ValueError`: as [`one_cache`].
    """
    cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
    if cache is not None:
        kwargs[CACHE] = cache


__all__ = ["CACHE", "name_cache", "one_cache"]
