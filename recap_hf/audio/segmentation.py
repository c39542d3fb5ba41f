"""Segmentation of a recording: silence by level, and boundaries within sound where the CLAP embedding changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Levels are taken over blocks of 10 ms; all times of the segmentation are multiples of it.
BLOCK_S = 0.01
# Sound is processed in portions of this length, independent of the blocks it arrives in: the same windows then share
# a batch, and the same recording gives the same embeddings to the bit.
_PORTION_S = 16.0
_LEVEL_FLOOR_DB = -100.0
# A boundary moves to a rise or fall of the level of at least this much, between the means of 100 ms on either side.
_STEP_DB = 6.0
_STEP_BLOCKS = 10


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of the segmentation. Times in seconds.

    Args:
        window_s (`float`, *optional*, defaults to 1.0): length of the embedded windows.
        hop_s (`float`, *optional*, defaults to 0.5): distance between the starts of two windows.
        novelty (`float`, *optional*, defaults to 0.25):
            A boundary is a local maximum of 1 - cosine between the windows before and after, of at least this.
        silence_db (`float`, *optional*, defaults to -60): RMS level in dBFS below which 10 ms are silence.
        min_silence_s (`float`, *optional*, defaults to 0.5): shorter pauses belong to the sound around them.
        max_segment_s (`float`, *optional*, defaults to 30): longer sound is split into pieces of this length.

    Raises:
        `ValueError`: for a length that is not positive, or a hop longer than a window.
    """

    window_s: float = 1.0
    hop_s: float = 0.5
    novelty: float = 0.25
    silence_db: float = -60.0
    min_silence_s: float = 0.5
    max_segment_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("window_s", "hop_s", "min_silence_s", "max_segment_s"):
            if not getattr(self, name) >= BLOCK_S:
                raise ValueError(f"`{name}` must be at least {BLOCK_S} s, got {getattr(self, name)!r}.")
        window = self.window_s
        if self.hop_s > window:
            limit = f"`window_s` ({window} s): sound between the windows would be skipped."
            raise ValueError(f"`hop_s` ({self.hop_s} s) must not be longer than {limit}")
        if self.max_segment_s < 2 * window:
            raise ValueError(f"`max_segment_s` must be at least two windows of {window} s, got {self.max_segment_s}.")
        if not 0 < self.novelty <= 2:
            raise ValueError(f"`novelty` must lie between 0 and 2 (1 - cosine), got {self.novelty!r}.")


@dataclass
class Piece:
    """A part of a recording: `start` and `end` in samples from its beginning; `waveform` is `None` for silence."""

    start: int
    end: int
    waveform: np.ndarray | None


class _Stretch:
    """Sound without a pause, as far as it has been embedded. Positions are in blocks, novelties per hop."""

    def __init__(self, start: int, hops_per_window: int) -> None:
        self.start = start
        self.cut = start
        self.hops_per_window = hops_per_window
        # Embeddings of the last `hops_per_window` windows, and the number of all windows.
        self.recent: list[np.ndarray] = []
        self.num_windows = 0
        # Novelties from hop `first` on; boundaries before hop `decided` are final.
        self.novelty: list[float] = []
        self.first = self.decided = hops_per_window

    def add(self, embedding: np.ndarray) -> None:
        if len(self.recent) == self.hops_per_window:
            self.novelty.append(1.0 - float(self.recent.pop(0) @ embedding))
        self.recent.append(embedding)
        self.num_windows += 1

    def peaks(self, height: float, ended: bool) -> Iterator[int]:
        """Hops where the novelty is at least `height` and the maximum within a window on either side."""
        reach = self.hops_per_window
        while self.decided < self.first + len(self.novelty) - (0 if ended else reach):
            index = self.decided - self.first
            before = self.novelty[max(0, index - reach) : index]
            after = self.novelty[index + 1 : index + 1 + reach]
            value = self.novelty[index]
            self.decided += 1
            if value >= height and value > max(before, default=-1.0) and value >= max(after, default=-1.0):
                yield self.decided - 1
        drop = max(0, self.decided - reach - self.first)
        self.novelty = self.novelty[drop:]
        self.first += drop


class Segmenter:
    """Splits a stream of samples into [`Piece`]s; memory does not grow with the stream.

    Silence is found by the level. Within sound, overlapping windows are embedded, each padded as a short clip.
    Where the embeddings before and after a point differ most, there is a boundary; it moves to the strongest rise or
    fall of the level within half a window. Sound shorter than a window that follows other sound without a pause is
    not separated from it.

    Args:
        embed (`Callable[[list[np.ndarray]], np.ndarray]`): L2-normalised embeddings `(n, dimension)` of n waveforms.
        sampling_rate (`int`): sampling rate of the samples in Hz.
        settings ([`SegmentationSettings`], *optional*)
    """

    def __init__(self, embed: Callable, sampling_rate: int, settings: SegmentationSettings | None = None) -> None:
        self.embed = embed
        self.settings = settings or SegmentationSettings()
        self.block = round(BLOCK_S * sampling_rate)
        self._window = round(self.settings.window_s / BLOCK_S)
        self._hop = round(self.settings.hop_s / BLOCK_S)
        self._patience = round(self.settings.min_silence_s / BLOCK_S)
        self._longest = round(self.settings.max_segment_s / BLOCK_S)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._num_samples = 0
        # Positions below are in blocks. `_buffer` and `_levels` begin at block `_first` and end at `_seen`.
        self._buffer = np.zeros(0, np.float32)
        self._levels = np.zeros(0)
        self._first = self._seen = 0
        self._silence_start = 0
        self._stretch: _Stretch | None = None
        self._sound_end = 0

    def push(self, samples: np.ndarray) -> Iterator[Piece]:
        """Adds samples and yields the pieces that are final, in order."""
        self._waiting.append(samples)
        self._num_waiting += len(samples)
        self._num_samples += len(samples)
        size = round(_PORTION_S / BLOCK_S) * self.block
        if self._num_waiting < size:
            return
        joined = np.concatenate(self._waiting)
        for start in range(0, len(joined) - size + 1, size):
            yield from self._take(joined[start : start + size])
        # A copy: a view would keep the whole array in memory.
        self._waiting = [joined[len(joined) // size * size :].copy()]
        self._num_waiting = len(self._waiting[0])

    def finish(self) -> Iterator[Piece]:
        """Yields the remaining pieces. The segmenter cannot be used afterwards."""
        if self._num_waiting:
            rest = np.concatenate(self._waiting)
            yield from self._take(np.pad(rest, (0, -len(rest) % self.block)))
        if self._stretch is not None:
            # A pause too short to be silence.
            yield from self._end_stretch(self._seen)
        if self._silence_start < self._seen:
            yield self._silence(self._seen)

    # ---------------------------------------------------------- sound and silence

    def _take(self, samples: np.ndarray) -> Iterator[Piece]:
        levels = levels_db(samples, self.block)
        self._buffer = np.concatenate([self._buffer, samples])
        self._levels = np.concatenate([self._levels, levels])
        sounding = np.flatnonzero(levels >= self.settings.silence_db) + self._seen
        self._seen += len(levels)
        for index in sounding.tolist():
            if self._stretch is not None and index - self._sound_end > self._patience:
                yield from self._end_stretch(self._sound_end)
            if self._stretch is None:
                start = 0 if index <= self._patience else index
                if self._silence_start < start:
                    yield self._silence(start)
                self._stretch = _Stretch(start, max(1, round(self._window / self._hop)))
            self._sound_end = index + 1
        if self._stretch is not None and self._seen - self._sound_end > self._patience:
            yield from self._end_stretch(self._sound_end)
        elif self._stretch is not None:
            yield from self._advance(self._sound_end, ended=False)
        self._forget()

    def _silence(self, end: int) -> Piece:
        piece = Piece(self._silence_start * self.block, self._sample(end), None)
        self._silence_start = end
        return piece

    def _end_stretch(self, end: int) -> Iterator[Piece]:
        yield from self._advance(end, ended=True)
        self._stretch = None
        self._silence_start = end

    def _forget(self) -> None:
        """Drops samples that no later piece needs, but for a window whose levels `_refine` reads."""
        needed = self._seen if self._stretch is None else self._stretch.cut
        drop = max(0, needed - self._window - self._first)
        self._buffer = self._buffer[drop * self.block :].copy()
        self._levels = self._levels[drop:].copy()
        self._first += drop

    # ------------------------------------------------------- novelty, boundaries

    def _advance(self, end: int, ended: bool) -> Iterator[Piece]:
        """Embeds the stretch up to block `end` and yields the pieces that are final."""
        stretch = self._stretch
        start = stretch.start + stretch.num_windows * self._hop
        starts = range(start, end - self._window + 1, self._hop)
        windows = [self._samples(first, first + self._window) for first in starts]
        for embedding in self.embed(windows) if windows else ():
            stretch.add(embedding)
        for hops in stretch.peaks(self.settings.novelty, ended):
            boundary = self._refine(stretch.start + hops * self._hop, end)
            yield from self._cut(boundary)
            yield self._piece(boundary)
        # A later boundary is at most half a window before the first hop that is not decided yet.
        yield from self._cut(end if ended else stretch.start + stretch.decided * self._hop - self._window)
        if ended and end > stretch.cut:
            yield self._piece(end)

    def _refine(self, place: int, end: int) -> int:
        """The strongest rise or fall of the level within half a window of `place`, or `place` itself."""
        reach, side = self._window // 2, min(_STEP_BLOCKS, self._window // 2)
        low, high = max(place - reach, self._stretch.cut + 1), min(place + reach, end - side)
        best, step = place, _STEP_DB
        for candidate in range(low, high + 1):
            index = candidate - self._first
            before, after = self._levels[max(0, index - side) : index], self._levels[index : index + side]
            size = abs(float(after.mean() - before.mean()))
            if size > step:
                best, step = candidate, size
        return best

    def _cut(self, end: int) -> Iterator[Piece]:
        """Yields pieces of the maximum length while more than that is left before `end`."""
        while end - self._stretch.cut > self._longest:
            yield self._piece(self._stretch.cut + self._longest)

    def _piece(self, end: int) -> Piece:
        start, self._stretch.cut = self._stretch.cut, end
        waveform = self._samples(start, end)[: self._sample(end) - start * self.block]
        return Piece(start * self.block, self._sample(end), waveform.copy())

    def _sample(self, block: int) -> int:
        return min(block * self.block, self._num_samples)

    def _samples(self, start: int, end: int) -> np.ndarray:
        return self._buffer[(start - self._first) * self.block : (end - self._first) * self.block]


def levels_db(samples: np.ndarray, block: int) -> np.ndarray:
    """RMS levels in dBFS of consecutive blocks of `block` samples, at least -100."""
    power = np.square(samples.reshape(-1, block), dtype=np.float64).mean(axis=1)
    return 10 * np.log10(np.maximum(power, 10 ** (_LEVEL_FLOOR_DB / 10)))


def is_quiet(waveform: np.ndarray, sampling_rate: int, silence_db: float) -> bool:
    """Whether the RMS level of every 10 ms of a waveform is below `silence_db` dBFS."""
    block = round(BLOCK_S * sampling_rate)
    return bool((levels_db(np.pad(waveform, (0, -len(waveform) % block)), block) < silence_db).all())
