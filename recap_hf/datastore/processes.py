"""Processes of multiprocessing that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Ends this process when the one that started it dies: a worker of a killed parent would go on with what it has
    begun, and then wait for more for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), name="end-with-parent", daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    # Nobody reads the result, and an orderly exit would wait for the thread that computes it.
    os._exit(1)


def process_pool(
    processes: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A pool of freshly started processes that do not outlive this one, even if it is killed.

    Args:
        processes: their number.
        initializer, arguments: called with these in each, once.
    """
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (initializer, arguments))


__all__ = ["process_pool"]
