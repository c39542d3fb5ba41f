"""Long recordings with known times, made of a folder of sounds: what a timeline can be measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.sound_events import SAMPLING_RATE, load_mono, read_metadata

# The background: pink noise whose level wanders between these, in dB below full scale.
BACKGROUND_DB = (-70.0, -50.0)
_BACKGROUND_KNOT_S = 30
# The level of an event, of its 10 ms blocks within 30 dB of the loudest.
EVENT_DB = (-32.0, -20.0)
_FADE_S = 0.02
_BLOCK = SAMPLING_RATE // 100
# Of three events one follows the one before at once.
_SHARE_WITHOUT_GAP = 1 / 3
_GAP_S = (2.0, 10.0)


@dataclass(frozen=True)
class PlacedEvent:
    """An event of a recording: `start` and `end` in seconds, of what stands above the background."""

    start: float
    end: float
    event: str
    file_name: str
    gain: float
    # First sample and number of samples of the recording that are heard.
    offset: int
    length: int


def plan_recording(sounds: str | Path, fold: int, minutes: float, seed: int = 0) -> list[PlacedEvent]:
    """Where which recording of a fold is heard: all in random order, again and again until the time is full.

    Two thirds come 2 to 10 s after the event before, the others at once; never the same event twice in a row. Levels
    are drawn from -32 to -20 dB, and what lies below the loudest background at either end is cut off.

    Args:
        sounds (`str` or `Path`): folder of recordings with a `metadata.csv` (`file_name`, `event`, `fold`).
        fold (`int`): whose recordings are heard.
        minutes (`float`): length of the recording.
        seed (`int`, *optional*, defaults to 0): of the order, the gaps and the levels.

    Raises:
        `FileNotFoundError`, `ValueError`: if there is no such folder, or no two events in the fold.
    """
    rows = [row for row in read_metadata(sounds) if int(row["fold"]) == fold]
    if len({row["event"] for row in rows}) < 2:
        raise ValueError(f"{sounds}: fold {fold} has fewer than two kinds of events; a timeline needs changes.")
    rng = np.random.default_rng([seed, fold])
    placed: list[PlacedEvent] = []
    time = float(rng.uniform(*_GAP_S))
    for row in _endless(rows, rng):
        waveform = load_mono(Path(sounds) / row["file_name"])
        gain, start, length = _audible(waveform, float(rng.uniform(*EVENT_DB)))
        if length < _BLOCK * 10:
            continue
        end = time + length / SAMPLING_RATE
        if end + _GAP_S[0] > minutes * 60:
            return placed
        placed.append(PlacedEvent(time, end, row["event"], row["file_name"], gain, start, length))
        gap = 0.0 if rng.random() < _SHARE_WITHOUT_GAP else float(rng.uniform(*_GAP_S))
        # On the samples' grid, so that the plan says to the sample what is rendered.
        time = round((end + gap) * SAMPLING_RATE) / SAMPLING_RATE
    return placed


def _endless(rows: list[dict[str, str]], rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """The rows in random order, again and again; one that repeats the event before it waits for its turn."""
    last, waiting = None, []
    while True:
        waiting += [rows[index] for index in rng.permutation(len(rows))]
        while True:
            row = next((row for row in waiting if row["event"] != last), None)
            if row is None:
                break
            waiting.remove(row)
            last = row["event"]
            yield row


def _audible(waveform: np.ndarray, level_db: float) -> tuple[float, int, int]:
    """The gain that gives a recording its level, and the stretch that then is above the loudest background."""
    blocks = np.square(waveform[: len(waveform) // _BLOCK * _BLOCK]).reshape(-1, _BLOCK).mean(axis=1) + 1e-12
    level = blocks[blocks > blocks.max() * 1e-3].mean()
    gain = min(10 ** (level_db / 20) / np.sqrt(level), 0.9 / np.abs(waveform).max())
    above = np.flatnonzero(blocks * gain**2 > 10 ** (BACKGROUND_DB[1] / 10))
    if not len(above):
        return float(gain), 0, 0
    return float(gain), int(above[0]) * _BLOCK, int(above[-1] + 1 - above[0]) * _BLOCK


def render_recording(
    sounds: str | Path, events: list[PlacedEvent], minutes: float, path: str | Path, seed: int = 0
) -> None:
    """Writes the recording of a plan, mono at 48 kHz (the suffix chooses the format), a second at a time."""
    import soundfile

    fade = int(_FADE_S * SAMPLING_RATE)
    ramp = np.linspace(0, 1, fade)
    waiting = list(events)
    sounding: list[tuple[int, np.ndarray]] = []
    with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1) as file:
        for second, block in enumerate(_background(minutes, seed)):
            first = second * SAMPLING_RATE
            while waiting and waiting[0].start * SAMPLING_RATE < first + len(block):
                event = waiting.pop(0)
                waveform = load_mono(Path(sounds) / event.file_name)
                waveform = event.gain * waveform[event.offset : event.offset + event.length]
                waveform[:fade] *= ramp
                waveform[-fade:] *= ramp[::-1]
                sounding.append((round(event.start * SAMPLING_RATE), waveform))
            for start, waveform in sounding:
                low, high = max(start, first), min(start + len(waveform), first + len(block))
                if low < high:
                    block[low - first : high - first] += waveform[low - start : high - start]
            sounding = [(start, wave) for start, wave in sounding if start + len(wave) > first + len(block)]
            file.write(np.clip(block, -1.0, 1.0).astype(np.float32))


def _background(minutes: float, seed: int) -> Iterator[np.ndarray]:
    """Pink noise, a second at a time, its level going from one random value to the next in 30 s."""
    rng = np.random.default_rng([seed, 99])
    seconds = round(minutes * 60)
    knots = rng.uniform(*BACKGROUND_DB, size=seconds // _BACKGROUND_KNOT_S + 2)
    # A minute of noise in a ring: noise of a whole recording would take gigabytes.
    spectrum = np.fft.rfft(rng.standard_normal(60 * SAMPLING_RATE))
    frequencies = np.fft.rfftfreq(60 * SAMPLING_RATE, 1 / SAMPLING_RATE)
    spectrum *= np.where(frequencies > 20, 1 / np.sqrt(np.maximum(frequencies, 20)), 0)
    pink = np.fft.irfft(spectrum)
    pink /= np.sqrt(np.mean(pink**2))
    for second in range(seconds):
        times = second + np.arange(SAMPLING_RATE) / SAMPLING_RATE
        level = np.interp(times / _BACKGROUND_KNOT_S, np.arange(len(knots)), knots)
        start = second % 60 * SAMPLING_RATE
        yield pink[start : start + SAMPLING_RATE] * 10 ** (level / 20)


def write_plan(events: list[PlacedEvent], path: str | Path) -> None:
    """Writes a plan as JSON."""
    Path(path).write_text(json.dumps([asdict(event) for event in events], indent=1) + "\n", encoding="utf-8")


def read_plan(path: str | Path) -> list[PlacedEvent]:
    """Reads what [`write_plan`] wrote."""
    return [PlacedEvent(**event) for event in json.loads(Path(path).read_text(encoding="utf-8"))]
