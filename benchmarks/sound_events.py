"""Recordings of single sound events, and fixed mixtures of two of them.

A folder of sounds has a `metadata.csv` with the columns file_name, event (or label), fold and source; rows without a
label or a fold are not used.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from benchmarks.naming import EVENT_WORDS

SAMPLING_RATE = 48_000
# Their order decides which sounds are mixed: a list of mixtures keeps its hash only while the order stays.
EVENTS = tuple(EVENT_WORDS)
_COLUMNS = {"file_name", "event", "fold", "source"}


@dataclass(frozen=True)
class Item:
    """A waveform (mono, float64, 48 kHz) and the events in it; in a sequence these are in order."""

    name: str
    waveform: np.ndarray
    events: tuple[str, ...]
    sequence: bool = False


def read_metadata(sounds: str | Path) -> list[dict[str, str]]:
    """Rows of the `metadata.csv` of a folder of sounds.

    Raises:
        FileNotFoundError: if the folder has no `metadata.csv`. ValueError: if a column is missing.
    """
    path = Path(sounds) / "metadata.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a folder of recordings with a metadata.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "event" not in rows[0] and "label" in rows[0]:
        rows = [{**row, "event": row["label"]} for row in rows]
    if not rows or not set(rows[0]) >= _COLUMNS:
        raise ValueError(f"{path} must have the columns {', '.join(sorted(_COLUMNS))}")
    return [row for row in rows if row["event"] and row["fold"]]


def load_mono(path: str | Path) -> np.ndarray:
    """The first 10 s of a recording, mono float64 at 48 kHz."""
    waveform, rate = soundfile.read(path, dtype="float64", always_2d=True)
    mono = waveform.mean(axis=1)
    if rate != SAMPLING_RATE:
        mono = soxr.resample(mono, rate, SAMPLING_RATE, quality="HQ")
    return mono[: 10 * SAMPLING_RATE]


def singles(sounds: str | Path, fold: int) -> list[Item]:
    """The recordings of a fold, in the order of the metadata."""
    rows = [row for row in read_metadata(sounds) if int(row["fold"]) == fold]
    return [Item(row["file_name"], load_mono(Path(sounds) / row["file_name"]), (row["event"],)) for row in rows]


def mixture_list(sounds: str | Path, fold: int, count: int = 300) -> list[dict]:
    """What to mix of a fold: half overlapping at -6 to +6 dB, half in sequence, never an event with itself.

    Returns:
        `list[dict]`: `files`, `events` (two each), `kind` ("overlap" or "sequence") and `gain_db` of the second.
    """
    by_event: dict[str, list[str]] = {}
    for row in read_metadata(sounds):
        if int(row["fold"]) == fold:
            by_event.setdefault(row["event"], []).append(row["file_name"])
    rng = np.random.default_rng([2024, fold])
    events = sorted(by_event, key=EVENTS.index if set(by_event) <= set(EVENTS) else None)
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


def mixtures(sounds: str | Path, entries: list[dict]) -> list[Item]:
    """Waveforms of a mixture list.

    Overlap: the shorter recording is repeated to the length of the longer. Sequence: the loudest 4.5 s of each, one
    after the other, in a file of at least 6 s: the feature extractor repeats shorter ones, which would blur the order.
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
