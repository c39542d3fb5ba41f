"""The recordings of the recipe, what the teacher hears in them, and mixtures of two.

`DATA` is a folder with `recordings/` and `sound_events/`, each with a `metadata.csv`; see the README beside this file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from recap_hf.training.tasks.contrastive import clip_scores

RATE = 16_000
MAX_SECONDS = 10.0
_QUIET_DB = -45.0


@dataclass(frozen=True)
class Recording:
    """A recording, or one made of several.

    Args:
        clip_id: unique.
        path: of the audio file.
        label: what its publisher says it is; empty if nothing.
        group: recordings of one original have the same.
        source, licence: of the recording.
    """

    clip_id: str
    path: str
    label: str = ""
    group: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Mixture:
    """Two recordings, at the same time or one after the other.

    Args:
        clip_id: unique.
        parts: numbers of the recordings, in the order of their beginnings.
        starts: of the parts, in seconds.
        gains: of the parts, in dB.
        in_sequence: whether the second begins after the first.
    """

    clip_id: str
    parts: tuple[int, ...]
    starts: tuple[float, ...]
    gains: tuple[float, ...]
    in_sequence: bool = False


def labelled_recordings(
    data: Path, folds: Sequence[int], split: str = "train", hidden: Iterable[str] = ()
) -> list[Recording]:
    """Recordings of a split: of labelled collections the clips of `folds`, and with `train` what has no folds.

    Args:
        data: the folder.
        folds: of ESC-50 and `sound_events`.
        split: `train` or `validation`.
        hidden: labels that are not told.
    """
    found = []
    for row in _table(data / "recordings"):
        if row["fold"]:
            if int(row["fold"]) not in folds:
                continue
        elif row["split"] != split:
            continue
        found.append((row, row["label"], "recordings"))
    events = (row for row in _table(data / "sound_events") if int(row["fold"]) in folds)
    found += [(row, row["event"], "sound_events") for row in events]
    hidden = set(hidden)
    return [
        Recording(
            f"{folder}/{row['file_name']}",
            str(data / folder / row["file_name"]),
            "" if label in hidden else label,
            row["group"],
            row["source"],
            row["licence"],
        )
        for row, label, folder in found
    ]


def _table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def read(path: str | Path, seconds: float = MAX_SECONDS) -> np.ndarray:
    """The first seconds of a recording at 16 kHz, `(num_samples,)` float32."""
    from recap_hf.modeling.audio_recap import load_audio, resample, to_mono

    waveform, rate = load_audio(path)
    return resample(to_mono(waveform), rate, RATE)[: int(seconds * RATE)]


@torch.no_grad()
def teacher_scores(model: object, extractor: object, waveforms: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The teacher's class scores of each waveform, `(num_labels,)`; see `clip_scores`.

    Args:
        model (`MobileNetClapModel`), extractor (`RecapFeatureExtractor`): of `recap convert yamnet`.
        waveforms: at 16 kHz.
    """
    for waveform in waveforms:
        windows = extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
        probabilities = model.classify_features(model.audio_features(windows[:, None]))
        yield clip_scores(probabilities.flatten(0, 1)[None])[0].numpy()


def plan_mixtures(
    recordings: Sequence[Recording], durations: Sequence[float], usable: Sequence[int], count: int, seed: int
) -> list[Mixture]:
    """Pairs of usable recordings from different groups; half of them overlap, half are in sequence.

    Args:
        recordings, durations: the recordings and their lengths in seconds.
        usable: numbers of those that may take part, as often as they are listed.
        count: mixtures to plan.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 1])
    plans = []
    while len(plans) < count:
        first, second = (int(number) for number in rng.choice(usable, size=2, replace=False))
        ours, theirs = recordings[first], recordings[second]
        if ours.group == theirs.group or (ours.label and ours.label == theirs.label):
            continue
        lengths = [min(durations[number], 5.0) for number in (first, second)]
        in_sequence = bool(rng.random() < 0.5)
        if in_sequence:
            start = lengths[0] + float(rng.uniform(-0.1, 0.8))
            starts = (0.0, max(0.3, min(start, MAX_SECONDS - lengths[1])))
        else:
            starts = (0.0, float(rng.uniform(0.0, max(0.3, lengths[0] - lengths[1]))))
        gains = (float(rng.uniform(-6.0, 0.0)), float(rng.uniform(-6.0, 0.0)))
        plans.append(Mixture(f"mixture-{len(plans):05d}", (first, second), starts, gains, in_sequence))
    return plans


def render(mixture: Mixture, waveforms: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The mixture's samples at 16 kHz, `(num_samples,)` float32 with a peak of at most 0.95.

    The parts are brought to the same level before their gains are applied.
    """
    limit = int(5.0 * RATE)
    mixed = np.zeros(int((MAX_SECONDS + 5.0) * RATE), dtype=np.float32)
    end = 0
    for number, start, gain in zip(mixture.parts, mixture.starts, mixture.gains, strict=True):
        part, first = level(_fade(waveforms[number][:limit])), int(start * RATE)
        mixed[first : first + len(part)] += part * 10 ** (gain / 20)
        end = max(end, first + len(part))
    mixed = mixed[: min(end, int(MAX_SECONDS * RATE))]
    return normalise_peak(mixed * 10 ** (rng.uniform(-12.0, 6.0) / 20))


def level(waveform: np.ndarray, target_db: float = -20.0) -> np.ndarray:
    """The waveform with its loud tenths of a second at `target_db` below full scale."""
    size = RATE // 10
    padded = np.pad(waveform, (0, -len(waveform) % size)).reshape(-1, size)
    loud = np.quantile(np.sqrt((padded**2).mean(axis=1)), 0.9)
    return waveform * (10 ** (target_db / 20) / max(float(loud), 10 ** (_QUIET_DB * 2 / 20)))


def normalise_peak(waveform: np.ndarray, peak: float = 0.95) -> np.ndarray:
    """The waveform, made quieter where it exceeds `peak`."""
    highest = float(np.abs(waveform).max(initial=0.0))
    return waveform if highest <= peak else waveform * (peak / highest)


def _fade(waveform: np.ndarray, seconds: float = 0.02) -> np.ndarray:
    length = min(int(seconds * RATE), len(waveform) // 2)
    ramp = np.ones(len(waveform), dtype=np.float32)
    if length:
        ramp[:length] = np.linspace(0.0, 1.0, length)
        ramp[-length:] = ramp[:length][::-1]
    return waveform * ramp


def degrade(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The recording as another microphone, room or codec gives it, and at another level. (`(num_samples,)` float32)"""
    kind = rng.integers(6)
    if kind <= 1:
        waveform = band(waveform, 0.0, float(rng.uniform(1_500, 5_000)))
    elif kind == 2:
        waveform = band(waveform, float(rng.uniform(150, 600)), RATE / 2)
    elif kind == 3:
        noise = rng.standard_normal(len(waveform)).astype(np.float32)
        noise = band(noise, 0.0, float(rng.uniform(500, 8_000)))
        waveform = level(waveform) + level(noise, -20.0 - float(rng.uniform(10, 30)))
    elif kind == 4:
        # A room: an exponentially decaying tail of noise.
        tail = rng.standard_normal(int(RATE * rng.uniform(0.1, 0.5))).astype(np.float32)
        tail *= np.exp(-6.0 * np.arange(len(tail)) / len(tail))
        size = len(waveform) + len(tail)
        wet = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(tail, size), size)[: len(waveform)]
        waveform = level(waveform) + level(wet.astype(np.float32), -20.0 - float(rng.uniform(0, 10)))
    else:
        waveform = codec(waveform)
    waveform = waveform * np.float32(10 ** (rng.uniform(-36.0, 12.0) / 20))
    # Too loud is clipped, as recorders do.
    return np.clip(waveform, -1.0, 1.0).astype(np.float32)


def codec(waveform: np.ndarray, rate: int = RATE) -> np.ndarray:
    """The recording after Vorbis at its lowest quality, `(num_samples,)` float32."""
    file = io.BytesIO()
    soundfile.write(file, normalise_peak(waveform), rate, format="OGG", subtype="VORBIS", compression_level=1.0)
    return soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0]


def course(waveform: np.ndarray) -> dict[str, object]:
    """How a recording of one sound goes on in time, as attributes of a `Sound`: how often it comes, or that it lasts.

    A sound is what is at most 20 dB below the loudest tenth of a second; pauses of 0.3 s part one from the next.
    """
    size = RATE // 20
    frames = np.pad(waveform, (0, -len(waveform) % size)).reshape(-1, size)
    power = 10 * np.log10((frames.astype(np.float64) ** 2).mean(axis=1) + 1e-10)
    heard = power > max(power.max() - 20.0, _QUIET_DB - 20.0)
    if heard.mean() > 0.9:
        return {"steady": True}
    places = np.flatnonzero(heard)
    times = 1 + int((np.diff(places) > 6).sum())
    return {"count": times if times <= 3 else "several" if times <= 5 else "repeated"}


def band(waveform: np.ndarray, low: float, high: float, rate: int = RATE) -> np.ndarray:
    """The part of a waveform, `(num_samples,)` float32 at `rate`, between two frequencies in Hz."""
    spectrum = np.fft.rfft(waveform)
    frequency = np.fft.rfftfreq(len(waveform), 1 / rate)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.fft.irfft(spectrum, len(waveform)).astype(np.float32)
