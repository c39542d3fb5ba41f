"""Live captions: a caption every few seconds, each sample in exactly one caption.

No sound is dropped if the model is slower than the sound. A thread reads the sound, starting before the model is
loaded. If more than an interval waits, pieces become longer (up to the encoder's window) and are captioned in batches,
which is the fastest mode of the model. If that is still too slow, the delay grows; once the buffer is full, reading
pauses and the source has to wait.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from recap_hf.modeling.captioning_recap import Captioner

from .segmentation import is_quiet
from .stream import Blocks, resample_blocks
from .timeline import silent_segment

# A shorter rest at the end of the stream is part of the piece before.
_SHORTEST_S = 0.1
_WAIT_S = 0.2


class LiveSound:
    """A buffer that a thread fills with sound.

    Args:
        blocks (`Iterable[tuple[np.ndarray, int]]`): mono float32 samples and their sampling rate, as they arrive.
        buffer_s (`float`, *optional*, defaults to 600): seconds to buffer before reading pauses.
        sampling_rate (`int`, *optional*, defaults to 48,000): sampling rate of the buffer in Hz.
    """

    def __init__(self, blocks: Blocks, buffer_s: float = 600.0, sampling_rate: int = 48_000) -> None:
        self.sampling_rate = sampling_rate
        self.limit = round(buffer_s * sampling_rate)
        self.ended = False
        self.paused = False
        self.error: Exception | None = None
        self._source = blocks
        self._changed = threading.Condition()
        self._blocks: deque[np.ndarray] = deque()
        self._waiting = 0
        # Arrival times: pairs of the number of samples received and the time.
        self._arrivals: deque[tuple[int, float]] = deque()
        self._received = self._taken = 0

    def start(self) -> "LiveSound":
        """Starts the thread."""
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends the stream; what has arrived can still be taken."""
        self._end(None)

    def wait(self, samples: int, timeout_s: float = float("inf")) -> int:
        """Waits for `samples`, the end of the stream or the timeout; returns the number of buffered samples."""
        latest = time.monotonic() + timeout_s
        with self._changed:
            # A limit below `samples` would make both sides wait forever.
            self.limit = max(self.limit, samples)
            while self._waiting < samples and not self.ended and time.monotonic() < latest:
                # In short steps, so that an interrupt is noticed on every system.
                self._changed.wait(_WAIT_S)
            return self._waiting

    def take(self, samples: int) -> tuple[np.ndarray, float]:
        """Removes the next `samples` from the buffer; returns them and when the last of them arrived
        (`time.monotonic`)."""
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
        error: Exception | None = None
        try:
            for block in resample_blocks(self._source, self.sampling_rate):
                if self.ended:
                    return
                self._append(block)
        except Exception as caught:
            # Raised in the thread that captions.
            error = caught
        self._end(error)

    def _append(self, block: np.ndarray) -> None:
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
    """Captions sound as it arrives.

    Args:
        captioner ([`Captioner`]): captions the pieces with its options.
        interval_s (`float`, *optional*, defaults to 5.0): seconds of sound in a caption.
        silence_db (`float`, *optional*, defaults to -60): as in `TimelineSettings`; quieter pieces are "silence".
        batch_size (`int`, *optional*, defaults to 8): pieces that are captioned together if it is behind.

    Raises:
        `ValueError`: for an interval of at most 0.1 s, or longer than the encoder's window.
    """

    def __init__(self, captioner: Captioner, interval_s: float = 5, silence_db: float = -60, batch_size: int = 8):
        window_s = captioner.processor.feature_extractor.max_length_s
        if not _SHORTEST_S < interval_s <= window_s:
            limits = f"above {_SHORTEST_S} s and at most the encoder's window of {window_s} s"
            raise ValueError(f"The interval must be {limits}, got {interval_s} s.")
        self.captioner = captioner
        self.rate = captioner.sampling_rate
        self.interval = round(interval_s * self.rate)
        self.longest = round(window_s * self.rate)
        self.silence_db = silence_db
        self.batch_size = batch_size
        self.seconds = 0.0
        self.longest_delay = 0.0

    def run(self, sound: LiveSound) -> Iterator[dict[str, Any]]:
        """Yields segments, each as soon as it is captioned.

        Args:
            sound ([`LiveSound`]): started.

        Yields:
            `dict`: `start`, `end`, `caption`, `score`, `retrieved` as in a timeline, without gaps from 0 to the last
            sample, and `delay`: seconds since its last sample arrived.

        Raises:
            What reading raised, after everything before it is captioned. `ValueError`: for another sampling rate than
            the captioner's.
        """
        if sound.sampling_rate != self.rate:
            raise ValueError(f"Expected sound at the captioner's {self.rate} Hz, got {sound.sampling_rate} Hz.")
        start = 0
        while lengths := self._lengths(sound.wait(self.interval), sound.ended):
            taken = [sound.take(length) for length in lengths]
            quiet = [is_quiet(waveform, self.rate, self.silence_db) for waveform, _ in taken]
            loud = [waveform for (waveform, _), silent in zip(taken, quiet, strict=True) if not silent]
            results = iter(self.captioner.caption(loud) if loud else ())
            for (waveform, arrived), silent in zip(taken, quiet, strict=True):
                end = start + len(waveform)
                segment = silent_segment(start / self.rate, end / self.rate)
                if not silent:
                    segment.update(next(results).to_dict())
                delay = time.monotonic() - arrived
                self.longest_delay = max(self.longest_delay, delay)
                self.seconds = end / self.rate
                yield {**segment, "delay": round(delay, 3)}
                start = end
        if sound.error is not None:
            raise sound.error

    def _lengths(self, there: int, ended: bool) -> list[int]:
        """Lengths of the next pieces, of the number of samples that are there."""
        if there < self.interval:
            # The end of the stream.
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
