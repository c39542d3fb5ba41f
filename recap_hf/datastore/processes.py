"""Processes of multiprocessing that end with the one that started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def _start(number: Any, initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Ends this process when the one that started it dies: a worker of a killed parent would finish what it has
    begun, and then wait for more for ever."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=_end_after, args=(sentinel,), name="end-with-parent", daemon=True).start()
    if initializer is not None:
        with number.get_lock():
            rank, number.value = number.value, number.value + 1
        initializer(rank, *arguments)


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
        initializer, arguments: called in each, once, with the number of the process, from 0 on, and these.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, _start, (context.Value("i", 0), initializer, arguments))
