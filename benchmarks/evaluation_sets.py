"""What recap-tiny is evaluated on: single clips, fixed mixtures, sounds that are no event, and degraded clips."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.procedural import PROCEDURAL, synthesise
from benchmarks.sounds import SAMPLING_RATE, load_mono, read_metadata
from recipes.recap_tiny.lexicon import HEARD

__all__ = [
    "DEGRADATIONS",
    "Item",
    "degrade_waveform",
    "mixture_hash",
    "mixture_list",
    "mixtures",
    "no_events",
    "singles",
]


@dataclass(frozen=True)
class Item:
    """A waveform (mono, 48 kHz), the events in it, and for a sequence their order."""

    name: str
    waveform: np.ndarray
    events: tuple[str, ...]
    sequence: bool = False


def singles(sounds: str | Path, fold: int) -> list[Item]:
    """The recordings of a fold."""
    rows = [row for row in read_metadata(sounds) if int(row["fold"]) == fold]
    return [Item(row["file_name"], load_mono(Path(sounds) / row["file_name"]), (row["event"],)) for row in rows]


def mixture_list(sounds: str | Path, fold: int, count: int = 300) -> list[dict]:
    """Half overlapping at -6 to +6 dB, half in sequence; every event equally often, no event with itself."""
    by_event: dict[str, list[str]] = {event: [] for event in HEARD}
    for row in read_metadata(sounds):
        if int(row["fold"]) == fold:
            by_event[row["event"]].append(row["file_name"])
    rng = np.random.default_rng([2024, fold])
    events = [event for event in HEARD if by_event[event]]
    result = []
    for index in range(count):
        pair = rng.choice(len(events), size=2, replace=False)
        files = [str(rng.choice(by_event[events[i]])) for i in pair]
        result.append(
            {
                "files": files,
                "events": [events[i] for i in pair],
                "kind": "overlap" if index < count // 2 else "sequence",
                "gain_db": round(float(rng.uniform(-6, 6)), 2),
            }
        )
    return result


def mixture_hash(entries: list[dict]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the list as JSON."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


def _loudest(waveform: np.ndarray, samples: int) -> np.ndarray:
    """The stretch of `samples` with the most energy, found to 10 ms."""
    if len(waveform) <= samples:
        return waveform
    energy = np.concatenate([[0.0], np.cumsum(waveform**2)])
    starts = np.arange(0, len(waveform) - samples + 1, 480)
    best = int(starts[np.argmax(energy[starts + samples] - energy[starts])])
    return waveform[best : best + samples]


def _level(waveform: np.ndarray) -> float:
    """RMS over the 10 ms blocks within 30 dB of the loudest."""
    blocks = np.square(waveform[: len(waveform) // 480 * 480]).reshape(-1, 480).mean(axis=1)
    return float(np.sqrt(blocks[blocks > blocks.max() * 1e-3].mean())) + 1e-9


def mixtures(sounds: str | Path, entries: list[dict]) -> list[Item]:
    """Waveforms of a mixture list.

    Overlap: the shorter recording is repeated to the length of the longer. Sequence: the loudest 4.5 s of each, one
    after the other, in a file of at least 6 s, so that the feature extractor's repetition cannot blur the order.
    """
    items = []
    for entry in entries:
        first, second = (load_mono(Path(sounds) / name) for name in entry["files"])
        gain = 10 ** (entry["gain_db"] / 20)
        if entry["kind"] == "overlap":
            length = max(len(first), len(second))
            first, second = (np.tile(wave, length // len(wave) + 1)[:length] for wave in (first, second))
            mixed = first + second * (gain * _level(first) / _level(second))
        else:
            first, second = (_loudest(wave, int(4.5 * SAMPLING_RATE)) for wave in (first, second))
            second = second * (gain * _level(first) / _level(second))
            mixed = np.concatenate([first, np.zeros(SAMPLING_RATE // 4), second])
            mixed = np.pad(mixed, (0, max(0, 6 * SAMPLING_RATE - len(mixed))))
        mixed = mixed / max(1.0, float(np.abs(mixed).max()))
        name = f"{entry['kind']}:{entry['files'][0]}+{entry['files'][1]}"
        items.append(Item(name, mixed, tuple(entry["events"]), entry["kind"] == "sequence"))
    return items


def no_events(fold: int) -> list[Item]:
    """Silence (digital, and at -80 to -100 dBFS), noise, tones and synthetic sounds that are none of the events."""
    rng = np.random.default_rng([77, fold])
    items = [Item("silence/0", np.zeros(5 * SAMPLING_RATE), ())]
    for index in range(1, 12):
        hiss = rng.standard_normal(int(SAMPLING_RATE * rng.uniform(1, 10))) * 10 ** (rng.uniform(-100, -80) / 20)
        items.append(Item(f"silence/{index}", hiss, ()))
    for kind, seed, group in PROCEDURAL:
        if group == fold:
            items.append(Item(f"{kind}/{seed}", synthesise(kind, seed), ()))
    return items


DEGRADATIONS = ("-30 dB", "-20 dB", "+10 dB", "16 kHz", "codec")


def degrade_waveform(waveform: np.ndarray, kind: str) -> np.ndarray:
    """A recording at another level, through 16 kHz, or through MP3 at a low bit rate.

    Raises:
        ValueError: another kind.
    """
    if kind.endswith("dB"):
        return waveform * 10 ** (float(kind[:-3]) / 20)
    if kind == "16 kHz":
        import soxr

        narrow = soxr.resample(waveform, SAMPLING_RATE, 16_000, quality="HQ")
        return soxr.resample(narrow, 16_000, SAMPLING_RATE, quality="HQ")
    if kind == "codec":
        import soundfile

        buffer = io.BytesIO()
        clipped = np.clip(waveform, -1, 1)
        soundfile.write(buffer, clipped, SAMPLING_RATE, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.95)
        buffer.seek(0)
        return soundfile.read(buffer, dtype="float64")[0]
    raise ValueError(f"no degradation {kind!r}; there are {', '.join(DEGRADATIONS)}")
