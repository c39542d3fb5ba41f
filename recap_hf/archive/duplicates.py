"""Recordings that hold the same sound: neighbours in the index, verified on the waveforms of their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from recap_hf.audio.stream import AudioStream
from recap_hf.modeling.audio_recap import resample, to_mono
from recap_hf.modeling.captioning_recap import READ_ERRORS

if TYPE_CHECKING:
    from recap_hf.modeling.retrieval_recap import CaptionDatastore

    from .sound_index import SoundIndex

# Of 100 copies among 2,000 recordings 95 are found, with 8 neighbours 94 in two thirds of the time
# (benchmarks/archive.py).
_CANDIDATE_COSINE, _NEIGHBOURS = 0.7, 16
_ROWS_FETCHED, _ROWS_AT_ONCE = 32, 1024
# Waveforms are compared up to 4 kHz: more is not in every copy.
_RATE = 8_000
# Seconds around a place that are compared; the shares of the shorter waveform, and of the energy of either, that must
# lie in both.
_MARGIN_S, _SHARED, _LOUD = 2.0, 0.7, 0.1
_WAVEFORMS_KEPT = 512
# A shift of half a sample takes a third of the correlation of noise: promising pairs are shifted by quarters.
_PROMISING, _FINER = 0.4, 4


def find_duplicates(index: SoundIndex, threshold: float, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Pairs of recordings that hold the same sound, also where one was made louder, cut, encoded or resampled.

    Neighbours in the index are compared by the correlation of their waveforms up to 4 kHz at the best shift in time:
    two recordings of one kind of sound have like embeddings, but not the same waveform.

    Args:
        index ([`SoundIndex`]): its recordings are read again.
        threshold (`float`): smallest correlation of a pair.
        progress: is called with the number of pairs that are compared, and of all.

    Returns:
        `list[dict]`: `{"path", "other", "similarity", "offset", "group"}`, most similar first. `offset` is how many
        seconds later the sound begins in `other`; recordings with the same `group` hold the same sound. Recordings
        that cannot be read any more are left out.

    Raises:
        `ValueError`: if the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold of duplicates is a correlation above 0 and at most 1, got {threshold!r}.")
    pairs, found = sorted(_candidates(index.store).items()), []
    read = lru_cache(_WAVEFORMS_KEPT)(lambda row: _around(index, row))
    for done, ((first, second), (row, other)) in enumerate(pairs, 1):
        a, b = read(row), read(other)
        if a is not None and b is not None:
            similarity, shift = correlation(a[1], b[1])
            if similarity >= threshold:
                paths = {"path": os.path.join(index.folder, first), "other": os.path.join(index.folder, second)}
                offset = b[0] - a[0] - shift / _RATE
                found.append({**paths, "similarity": round(similarity, 4), "offset": round(offset, 3)})
        progress(done, len(pairs))
    found.sort(key=lambda pair: -pair["similarity"])
    groups = _groups([(pair["path"], pair["other"]) for pair in found])
    return [{**pair, "group": groups[pair["path"]]} for pair in found]


def _candidates(store: CaptionDatastore) -> dict[tuple[str, str], tuple[int, int]]:
    """Pairs of recordings with near places, by name: the nearest two rows of each."""
    index, vectors = store.search_index, store.embeddings
    owners = [record["caption"] for record in store.records]
    best: dict[tuple[str, str], tuple[float, int, int]] = {}
    count = min(index.max_k, max(_ROWS_FETCHED, index.num_candidates))
    for start in range(0, len(owners), _ROWS_AT_ONCE):
        queries = np.asarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        for row, (others, scores) in enumerate(zip(*index.search(queries, count), strict=True), start):
            near = [at for at in np.argsort(-scores) if scores[at] >= _CANDIDATE_COSINE and others[at] >= 0]
            foreign = [at for at in near if owners[others[at]] != owners[row]][:_NEIGHBOURS]
            for other, score in zip(others[foreign].tolist(), scores[foreign].tolist(), strict=True):
                first, second = sorted((row, other), key=owners.__getitem__)
                key = (owners[first], owners[second])
                best[key] = max(best.get(key, (-1.0, 0, 0)), (score, -first, -second))
    return {key: (-first, -second) for key, (_, first, second) in best.items()}


def _around(index: SoundIndex, row: int) -> tuple[float, np.ndarray] | None:
    """Where the sound around a place begins in its recording, in seconds, and its waveform; `None` if the recording
    cannot be read any more."""
    record = index.store.records[row]
    start, path = max(0.0, record["start"] - _MARGIN_S), os.path.join(index.folder, record["caption"])
    try:
        return start, _excerpt(path, start, record["end"] + _MARGIN_S, _RATE).astype(np.float64)
    except READ_ERRORS:
        return None


def _excerpt(path: str, start: float, end: float, rate: int) -> np.ndarray:
    """The sound from `start` to `end` in seconds, mono at `rate` Hz."""
    try:
        with soundfile.SoundFile(path) as file:
            own, first = file.samplerate, round(start * file.samplerate)
            file.seek(first)
            waveform = file.read(round(end * own) - first, dtype="float32", always_2d=True)
        return resample(to_mono(waveform.T), own, rate)
    except (soundfile.LibsndfileError, RuntimeError):
        # What libsndfile does not read or seek in is read from its beginning.
        first, held, at = round(start * rate), [], 0
        for block in AudioStream(path, rate):
            held.append(block[max(0, first - at) :])
            at += len(block)
            if at >= end * rate:
                break
        return np.concatenate(held)[: round(end * rate) - first]


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The largest correlation of two waveforms, of either sign, over shifts in time; and the shift: sample `i + shift`
    of `a` goes with sample `i` of `b`.

    Args:
        a, b (`np.ndarray` of shape `(samples,)`): compared where at least 70 % of the shorter one and 10 % of the
            energy of either overlap.
    """
    if not len(a) or not len(b):
        return 0.0, 0.0
    size = 1 << (len(a) + len(b)).bit_length()
    product = np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size))
    least = max(1, round(_SHARED * min(len(a), len(b))))
    shifts = np.arange(least - len(b), len(a) - least + 1)
    low, high = np.maximum(0, shifts), np.minimum(len(a), shifts + len(b))
    energies = [np.concatenate([[0.0], np.cumsum(np.square(each))]) for each in (a, b)]
    own, other = energies[0][high] - energies[0][low], energies[1][high - shifts] - energies[1][low - shifts]
    # Where there is next to nothing in one of them, there is nothing to compare.
    loud = (own > _LOUD * energies[0][-1]) & (other > _LOUD * energies[1][-1])
    scale = np.sqrt(np.where(loud, own * other, np.inf))
    scores = np.abs(np.fft.irfft(product, size)[shifts]) / scale
    best = int(scores.argmax())
    if scores[best] < _PROMISING:
        return float(scores[best]), float(shifts[best])
    # In a longer spectrum the last frequency stands for itself and its mirror image.
    product[-1] /= 2
    fine = np.fft.irfft(product, size * _FINER) * _FINER
    steps = np.arange(-_FINER + 1, _FINER) + _FINER * int(shifts[best])
    near = np.abs(fine[steps]) / scale[best]
    return min(1.0, float(near.max())), float(steps[near.argmax()]) / _FINER


def _groups(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """The group of each recording, numbered from 1: those that pairs connect have the same one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for first, second in pairs:
        parent[root(second)] = root(first)
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(root(name), len(numbers) + 1) for name in list(parent)}
