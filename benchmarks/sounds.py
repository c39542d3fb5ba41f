"""Source recordings of recap-tiny as mel power spectrograms, cached once.

Mixing is done in the mel power domain: a gain scales, an offset shifts frames, a filter weighs bins. The cross terms
that a waveform mixture has beside the sum of powers average out over a mel bin's FFT bins; the tests state how well.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.procedural import PROCEDURAL, synthesise

__all__ = ["FRAMES", "HOP", "MELS", "POWER_FLOOR", "SAMPLING_RATE", "Clip", "SoundBank", "mel_power", "read_metadata"]

SAMPLING_RATE = 48_000
HOP = 480
FRAMES = 1001
MELS = 64
POWER_FLOOR = 1e-10
_FFT = 1024
_CACHE_VERSION = 2


@dataclass(frozen=True)
class Clip:
    """A recording: `power` is (frames, 64) mel power; `bursts` are (start, end) frames of separate events."""

    name: str
    event: str
    fold: int
    source: str
    power: np.ndarray
    bursts: tuple[tuple[int, int], ...]


def mel_power(waveform: np.ndarray) -> np.ndarray:
    """Mel power (frames, 64) of a mono 48 kHz waveform, as ClapFeatureExtractor has it before the decibels.

    Slaney filters from 0 to 14 kHz, Hann window of 1024 samples, hop 480, centred with reflection.
    """
    import torch
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(_FFT // 2 + 1, MELS, 0.0, 14_000.0, SAMPLING_RATE, norm="slaney", mel_scale="slaney")
    if len(waveform) <= _FFT // 2:
        waveform = np.pad(waveform, (0, _FFT // 2 + 1 - len(waveform)))
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float64)),
        _FFT,
        HOP,
        window=torch.hann_window(_FFT, dtype=torch.float64),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = spectrum.abs().square().T @ torch.from_numpy(filters)
    return power.numpy().astype(np.float32)


def read_metadata(sounds: str | Path) -> list[dict[str, str]]:
    """Rows of `metadata.csv` of a folder of sounds (file_name, event, fold, ...).

    Raises:
        FileNotFoundError: the folder has no `metadata.csv`.
        ValueError: a column is missing.
    """
    path = Path(sounds) / "metadata.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: --sounds must name a folder of recordings with a metadata.csv"
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {"file_name", "event", "fold", "source"}
    if not rows or not needed <= set(rows[0]):
        raise ValueError(f"{path} must have the columns {', '.join(sorted(needed))}")
    return rows


def write_recordings(sounds: str | Path, folds: tuple[int, ...], path: str | Path) -> None:
    """Write the attribution of the recordings of some folds: event, source, number on Freesound, licence."""
    columns = ("file_name", "event", "source", "source_clip", "freesound_id", "licence")
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in read_metadata(sounds) if int(row["fold"]) in folds)


def load_mono(path: Path) -> np.ndarray:
    """A recording as mono float64 at 48 kHz, at most 10 s."""
    import soundfile
    import soxr

    waveform, rate = soundfile.read(path, dtype="float64", always_2d=True)
    mono = waveform.mean(axis=1)
    if rate != SAMPLING_RATE:
        mono = soxr.resample(mono, rate, SAMPLING_RATE, quality="HQ")
    return mono[: 10 * SAMPLING_RATE]


def find_bursts(power: np.ndarray, gap: int = 15, floor_db: float = 22.0) -> tuple[tuple[int, int], ...]:
    """Stretches above the peak level minus `floor_db`, at least `gap` frames (10 ms each) apart."""
    level = 10 * np.log10(power.sum(axis=1) + POWER_FLOOR)
    active = np.flatnonzero(level > level.max() - floor_db)
    if len(active) == 0:
        return ()
    breaks = np.flatnonzero(np.diff(active) > gap)
    starts = np.concatenate([active[:1], active[breaks + 1]])
    ends = np.concatenate([active[breaks], active[-1:]]) + 1
    return tuple((int(start), int(end)) for start, end in zip(starts, ends, strict=True))


class SoundBank:
    """All clips of a folder of sounds, and the procedural ones, with their mel power in memory (about 100 MB)."""

    def __init__(self, clips: list[Clip]):
        self.clips = clips
        self._by_event: dict[tuple[str, int], list[Clip]] = {}
        for clip in clips:
            self._by_event.setdefault((clip.event, clip.fold), []).append(clip)

    @property
    def events(self) -> tuple[str, ...]:
        return tuple(sorted({event for event, _ in self._by_event}))

    def of(self, event: str, folds: tuple[int, ...]) -> list[Clip]:
        return [clip for fold in folds for clip in self._by_event.get((event, fold), ())]

    @classmethod
    def load(
        cls, sounds: str | Path, cache: str | Path, procedural: tuple[tuple[str, int, int], ...] = PROCEDURAL
    ) -> SoundBank:
        """Read the cache of mel powers, or make it (a minute on one core).

        Args:
            sounds: Folder of recordings with a `metadata.csv`.
            cache: Folder of the cache.
            procedural: (kind, seed, fold) of the synthetic sounds beside the recordings.
        """
        cache = Path(cache)
        rows = read_metadata(sounds)
        index_path, data_path = cache / "mel_power.json", cache / "mel_power.npy"
        names = [row["file_name"] for row in rows] + [f"{kind}/{seed}" for kind, seed, _ in procedural]
        if index_path.is_file() and data_path.is_file():
            index = json.loads(index_path.read_text(encoding="utf-8"))
            if index["version"] == _CACHE_VERSION and index["names"] == names:
                return cls._assemble(rows, procedural, index["lengths"], np.load(data_path))
        powers = [mel_power(load_mono(Path(sounds) / row["file_name"])) for row in rows]
        powers += [mel_power(synthesise(kind, seed)) for kind, seed, _ in procedural]
        cache.mkdir(parents=True, exist_ok=True)
        np.save(data_path, np.concatenate(powers))
        lengths = [len(power) for power in powers]
        index_path.write_text(
            json.dumps({"version": _CACHE_VERSION, "names": names, "lengths": lengths}), encoding="utf-8"
        )
        return cls._assemble(rows, procedural, lengths, np.concatenate(powers))

    @classmethod
    def _assemble(
        cls,
        rows: list[dict[str, str]],
        procedural: tuple[tuple[str, int, int], ...],
        lengths: list[int],
        data: np.ndarray,
    ) -> SoundBank:
        labels = [(row["file_name"], row["event"], int(row["fold"]), row["source"]) for row in rows]
        labels += [(f"{kind}/{seed}", kind, fold, "procedural") for kind, seed, fold in procedural]
        ends = np.cumsum(lengths)
        clips = []
        for (name, event, fold, source), end, length in zip(labels, ends, lengths, strict=True):
            power = data[end - length : end]
            clips.append(Clip(name, event, fold, source, power, find_bursts(power)))
        return cls(clips)
