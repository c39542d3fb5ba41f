"""Captions of recordings of any number: read ahead by threads, encoded in groups, decoded in batches."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from recap_hf.modeling.captioning_recap import READ_ERRORS, Captioner, CaptionResult

# Batches of the decoder that are encoded together, and the seconds of sound that are enough for less.
_BATCHES_TOGETHER, _SECONDS_TOGETHER = 4, 640.0


def recordings_together(batch_size: int) -> int:
    """The number of readable recordings that `caption_stream` encodes together at the most. A run that is cut at
    multiples of it gives the same captions to the last digit."""
    return _BATCHES_TOGETHER * batch_size


def caption_stream(
    captioner: Captioner, sources: Iterable[Any], batch_size: int = 8
) -> Iterator[tuple[Any, CaptionResult | Exception]]:
    """See `Captioner.caption_stream`."""
    for group in caption_groups(captioner, sources, batch_size):
        yield from group


def caption_groups(
    captioner: Captioner, sources: Iterable[Any], batch_size: int = 8
) -> Iterator[list[tuple[Any, CaptionResult | Exception]]]:
    """As `caption_stream`, in lists of what is captioned together. A run that goes on behind such a list gives the
    same captions to the last digit."""
    waiting: list[tuple[Any, Any]] = []
    together = recordings_together(batch_size)
    for source, waveform in read_ahead(partial(_read, captioner), sources, 2 * together):
        waiting.append((source, waveform))
        readable = [one for _, one in waiting if not isinstance(one, Exception)]
        seconds = sum(map(len, readable)) / captioner.sampling_rate
        whole = len(readable) and not len(readable) % batch_size
        if whole and (len(readable) >= together or seconds >= _SECONDS_TOGETHER):
            yield _caption_group(captioner, waiting, batch_size)
            waiting = []
    if waiting:
        yield _caption_group(captioner, waiting, batch_size)


def _caption_group(
    captioner: Captioner, waiting: list[tuple[Any, Any]], batch_size: int
) -> list[tuple[Any, CaptionResult | Exception]]:
    waveforms = [one for _, one in waiting if not isinstance(one, Exception)]
    results = iter(captioner.caption(waveforms, batch_size))
    return [(source, one if isinstance(one, Exception) else next(results)) for source, one in waiting]


def _read(captioner: Captioner, source: Any) -> np.ndarray | Exception:
    try:
        return captioner.read(source)
    except READ_ERRORS as error:
        return error


def read_ahead(read: Callable[[Any], Any], sources: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Any]]:
    """Each source with the result of `read`, which threads compute for the next `ahead` sources."""
    jobs: SimpleQueue[tuple[Any, Future[Any]] | None] = SimpleQueue()

    def work() -> None:
        while (job := jobs.get()) is not None:
            source, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(read(source))
                except BaseException as error:
                    # Raised where the result is taken.
                    future.set_exception(error)

    # One core is the model's; libsndfile and soxr release Python's lock. When Python ends it waits for a pool, and not
    # for daemons: a pipe without a writer cannot hold back Ctrl-C.
    workers = [Thread(target=work, daemon=True) for _ in range(max(1, min(8, (os.cpu_count() or 1) - 1)))]
    for worker in workers:
        worker.start()
    pending: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for source in sources:
            pending.append((source, Future()))
            jobs.put(pending[-1])
            if len(pending) > ahead:
                yield pending[0][0], pending[0][1].result()
                pending.popleft()
        while pending:
            yield pending[0][0], pending[0][1].result()
            pending.popleft()
    finally:
        # A caller that stops early does not wait for recordings that it will not get. Threads that read none are
        # awaited: one that ended while Python does, and freed the model that `read` holds, would abort the process.
        reading = [future for _, future in pending if not future.cancel() and not future.done()]
        for _ in workers:
            jobs.put(None)
        if not reading:
            for worker in workers:
                worker.join()
