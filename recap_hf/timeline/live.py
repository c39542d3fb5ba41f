"""Captions while it sounds: a caption every few seconds, each second of sound in exactly one of them.

What happens when the model is slower than the sound: nothing is thrown away. A thread of its own reads the sound, from
before the model is loaded, so that the source does not wait for the model. What waits longer than an interval is
captioned in longer pieces, up to the encoder's window, and several of them in one batch, which is what the model is
fastest at. If it still falls behind, the delay grows, and once ten minutes wait, reading pauses: then the program at
the other end of the pipe has to wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from recap_hf.modeling.segmentation_recap import is_quiet
from recap_hf.modeling.timeline_recap import SegmentCaptioner

__all__ = ["LiveCaptioner", "LiveSound"]

_SAMPLING_RATE = 48_000
# What is left at the end of the stream and shorter than this belongs to the piece before.
_SHORTEST_S = 0.1
_WAIT_S = 0.2


class LiveSound:
    """Sound that a thread of its own reads, until somebody takes it.

    Args:
        blocks (`Iterable[tuple[np.ndarray, int]]`): mono samples and their sampling rate, as they come.
        buffer_s (`float`, *optional*, defaults to 600): seconds that may wait; then reading pauses.
        sampling_rate (`int`, *optional*, defaults to 48,000): that the samples are brought to, in Hz.
    """

    def __init__(
        self, blocks: Iterable[tuple[np.ndarray, int]], buffer_s: float = 600.0, sampling_rate: int = _SAMPLING_RATE
    ) -> None:
        self.sampling_rate = sampling_rate
        self.limit = round(buffer_s * sampling_rate)
        self.ended = False
        self.paused = False
        self.error: Exception | None = None
        self._source = blocks
        self._changed = threading.Condition()
        self._blocks: deque[np.ndarray] = deque()
        self._waiting = 0
        # When which sample came in: pairs of samples so far and time.
        self._arrivals: deque[tuple[int, float]] = deque()
        self._received = self._taken = 0

    def start(self) -> LiveSound:
        """Begins to read."""
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends the stream; what has come in can still be taken."""
        self._end(None)

    def wait(self, samples: int, timeout_s: float = float("inf")) -> int:
        """Waits until `samples` are there, no more come or the time is over; returns how many are there."""
        latest = time.monotonic() + timeout_s
        with self._changed:
            # A limit below what is asked for must not make both sides wait.
            self.limit = max(self.limit, samples)
            while self._waiting < samples and not self.ended and time.monotonic() < latest:
                # In short steps, so that an interrupt is noticed on every system.
                self._changed.wait(_WAIT_S)
            return self._waiting

    def take(self, samples: int) -> tuple[np.ndarray, float]:
        """The next `samples`, of those that are there, and when the last of them came in (`time.monotonic`)."""
        with self._changed:
            parts, missing = [], samples
            while missing:
                block = self._blocks.popleft()
                if len(block) > missing:
                    self._blocks.appendleft(block[missing:])
                    block = block[:missing]
                parts.append(block)
                missing -= len(block)
            self._waiting -= samples
            self._taken += samples
            while self._arrivals[0][0] < self._taken:
                self._arrivals.popleft()
            self._changed.notify_all()
            return np.concatenate(parts), self._arrivals[0][1]

    def _read(self) -> None:
        import soxr

        resampler = None
        try:
            for block, rate in self._source:
                if not np.isfinite(block).all():
                    raise ValueError("The sound holds NaN or infinite samples: is --sample-format right?")
                if rate != self.sampling_rate:
                    if resampler is None:
                        resampler = soxr.ResampleStream(rate, self.sampling_rate, 1, dtype="float32", quality="HQ")
                    block = resampler.resample_chunk(block)
                if self.ended:
                    return
                self._append(block)
            if resampler is not None:
                self._append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        except Exception as error:
            # Whatever it is: the thread that captions raises it.
            self._end(error)
        else:
            self._end(None)

    def _append(self, block: np.ndarray) -> None:
        if not len(block):
            return
        with self._changed:
            while self._waiting >= self.limit and not self.ended:
                self.paused = True
                self._changed.wait(_WAIT_S)
            self._blocks.append(block)
            self._waiting += len(block)
            self._received += len(block)
            self._arrivals.append((self._received, time.monotonic()))
            self._changed.notify_all()

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            self.ended = True
            self.error = self.error or error
            self._changed.notify_all()


class LiveCaptioner:
    """Captions sound while it comes in.

    Args:
        captioner ([`AudioCaptioningPipeline`]): model, processor and parameters.
        interval_s (`float`, *optional*, defaults to 5.0): a caption for every so many seconds.
        silence_db (`float`, *optional*, defaults to -60): as in `TimelineSettings`: quieter intervals are "silence".
        batch_size (`int`, *optional*, defaults to 8): pieces that are captioned at once when it is behind.

    Raises:
        `ValueError`: for an interval that is not positive, or longer than the encoder's window.
    """

    def __init__(
        self, captioner: Any, interval_s: float = 5.0, silence_db: float = -60.0, batch_size: int = 8
    ) -> None:
        extractor = captioner.processor.feature_extractor
        if not _SHORTEST_S < interval_s <= extractor.max_length_s:
            raise ValueError(
                f"A caption every {interval_s} s is not possible: more than {_SHORTEST_S} s and at most the encoder's "
                f"window of {extractor.max_length_s} s."
            )
        self.caption = SegmentCaptioner(captioner)
        self.rate = extractor.sampling_rate
        self.interval = round(interval_s * self.rate)
        self.longest = round(extractor.max_length_s * self.rate)
        self.silence_db = silence_db
        self.batch_size = batch_size
        self.seconds = 0.0
        self.longest_delay = 0.0

    def run(self, sound: LiveSound) -> Iterator[dict[str, Any]]:
        """Yields segments, each as soon as its caption is there.

        Args:
            sound ([`LiveSound`]): started.

        Yields:
            `dict`: `start`, `end`, `caption`, `score`, `retrieved` as in a timeline, without gaps from 0 to the last
            sample, and `delay`: seconds since the last of its samples came in.

        Raises:
            What reading raised, after all that came in before is captioned.
        """
        if sound.sampling_rate != self.rate:
            raise ValueError(f"The sound has {sound.sampling_rate} Hz, the feature extractor {self.rate} Hz.")
        start = 0
        while lengths := self._lengths(sound.wait(self.interval), sound.ended):
            taken = [sound.take(length) for length in lengths]
            results = self._caption([waveform for waveform, _ in taken])
            for (waveform, arrived), result in zip(taken, results, strict=True):
                delay = time.monotonic() - arrived
                self.longest_delay = max(self.longest_delay, delay)
                end = start + len(waveform)
                self.seconds = end / self.rate
                times = {"start": round(start / self.rate, 3), "end": round(end / self.rate, 3)}
                yield {**times, **result, "delay": round(delay, 3)}
                start = end
        if sound.error is not None:
            raise sound.error

    def _lengths(self, there: int, ended: bool) -> list[int]:
        """How many of the samples that are there go into which piece."""
        if there < self.interval:
            # The stream is over: what is left, if anything.
            return [there] if there else []
        pieces = min(self.batch_size, there // self.longest)
        if there < 2 * self.interval:
            lengths = [self.interval]
        elif pieces:
            lengths = [self.longest] * pieces
        else:
            lengths = [there // self.interval * self.interval]
        rest = there - sum(lengths)
        if ended and rest < round(_SHORTEST_S * self.rate):
            lengths[-1] += rest
        return lengths

    def _caption(self, waveforms: list[np.ndarray]) -> list[dict[str, Any]]:
        results = [self.caption.silence] * len(waveforms)
        quiet = [is_quiet(waveform, self.rate, self.silence_db) for waveform in waveforms]
        heard = [index for index, silent in enumerate(quiet) if not silent]
        if heard:
            captions = self.caption([waveforms[index] for index in heard])
            for index, result in zip(heard, captions, strict=True):
                results[index] = result
        return results
