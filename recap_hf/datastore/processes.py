"""Processes of multiprocessing that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def end_with_parent() -> None:
    """Ends this process when the one that started it dies. Without it a worker of a killed parent goes on with what it
    has begun, an hour of building an index perhaps, and then waits for more for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), name="end-with-parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    # Nobody reads the result, and an orderly exit would wait for the thread that computes it.
    os._exit(1)


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    if initializer is not None:
        initializer(*arguments)


def process_pool(
    processes: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A pool of freshly started processes that do not outlive this one, killed though it may be.

    Args:
        processes: how many.
        initializer, arguments: called with these in each, once.
    """
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (initializer, arguments))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, so that its memory is nobody else's, and returns what it returns."""
    with process_pool(1) as pool:
        return pool.submit(function, *arguments).result()


__all__ = ["end_with_parent", "in_own_process", "process_pool"]
