"""Recordings that hold the same sound: neighbours in the index, verified on the spectrograms of their files."""

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

# Of 100 copies 98 have a higher cosine and are among as many neighbours; two had lost the sound itself, which was
# cut off (benchmarks/archive.py).
_CANDIDATE_COSINE, _NEIGHBOURS = 0.7, 8
_ROWS_FETCHED, _ROWS_AT_ONCE = 32, 1024
# Seconds around a place that are compared, and the share of the shorter sound that must lie in both.
_MARGIN_S, _SHARED = 2.0, 0.7
_SPECTROGRAMS_KEPT = 512
_SHORT_FRAMES, _LONG_FRAMES = 3, 31
# Level of a sound when it is compared, and how far below its loudest moment counts, in dB.
_LEVEL, _RANGE = 0.1, 40.0


def find_duplicates(index: SoundIndex, threshold: float, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Pairs of recordings that hold the same sound, also where one was made louder, cut, encoded or resampled.

    Neighbours in the index are compared by the correlation of their log-mel spectrograms at the best shift in time:
    two recordings of one kind of sound have like embeddings, but not the same course.

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
    pairs, extractor = sorted(_candidates(index.store).items()), index.encoder.feature_extractor
    read = lru_cache(_SPECTROGRAMS_KEPT)(lambda row: _spectrogram(index, row))
    found = []
    for done, ((first, second), (row, other)) in enumerate(pairs, 1):
        a, b = read(row), read(other)
        if a is not None and b is not None:
            similarity, shift = correlation(a[1], b[1])
            if similarity >= threshold:
                paths = {"path": os.path.join(index.folder, first), "other": os.path.join(index.folder, second)}
                offset = b[0] - a[0] - shift * extractor.hop_length / extractor.sampling_rate
                found.append({**paths, "similarity": round(similarity, 4), "offset": round(offset, 2)})
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


def _spectrogram(index: SoundIndex, row: int) -> tuple[float, np.ndarray] | None:
    """Where the sound around a place begins in its recording, in seconds, and its fluctuations at one level, `(frames,
    mels)`; `None` if the recording cannot be read any more."""
    record, extractor = index.store.records[row], index.encoder.feature_extractor
    rate, start = extractor.sampling_rate, max(0.0, record["start"] - _MARGIN_S)
    try:
        waveform = _excerpt(os.path.join(index.folder, record["caption"]), start, record["end"] + _MARGIN_S, rate)
    except READ_ERRORS:
        return None
    level = float(np.sqrt(np.square(waveform, dtype=np.float64).mean())) if len(waveform) else 0.0
    if not level:
        return None
    # Frames on the grid of the whole recording would need all of it.
    margin = np.zeros(extractor.fft_window_size // 2, dtype=np.float32)
    mel = extractor.log_mel(np.concatenate([margin, waveform * np.float32(_LEVEL / level), margin])).numpy()
    return start, fluctuations(np.maximum(mel, mel.max() - _RANGE * extractor.decibel))


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


def fluctuations(mel: np.ndarray) -> np.ndarray:
    """What changes in a log-mel spectrogram within 30 to 300 ms, `(frames, bands)`: the colour of a sound and its slow
    course, which others of its kind share, are taken out."""
    return _moving_mean(mel, _SHORT_FRAMES) - _moving_mean(mel, _LONG_FRAMES)


def _moving_mean(mel: np.ndarray, frames: int) -> np.ndarray:
    """Means over an odd number of frames around each; at the ends over those that are there."""
    sums = np.concatenate([np.zeros((1, mel.shape[1])), np.cumsum(mel, axis=0, dtype=np.float64)])
    centres, half = np.arange(len(mel)), frames // 2
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half + 1, len(mel))
    return (sums[high] - sums[low]) / (high - low)[:, None]


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """The largest correlation of two sounds over shifts in time, and the shift: frame `i + shift` of `a` goes with
    frame `i` of `b`.

    Args:
        a, b (`np.ndarray` of shape `(frames, bands)`): compared where at least 70 % of the shorter one overlaps.
    """
    size = 1 << (len(a) + len(b)).bit_length()
    products = np.fft.irfft((np.fft.rfft(a, size, axis=0) * np.conj(np.fft.rfft(b, size, axis=0))).sum(axis=1), size)
    least = max(1, round(_SHARED * min(len(a), len(b))))
    shifts = np.arange(least - len(b), len(a) - least + 1)
    low, high = np.maximum(0, shifts), np.minimum(len(a), shifts + len(b))
    energies = [np.concatenate([[0.0], np.cumsum(np.square(each).sum(axis=1))]) for each in (a, b)]
    own, other = energies[0][high] - energies[0][low], energies[1][high - shifts] - energies[1][low - shifts]
    scores = products[shifts] / np.sqrt(np.maximum(own * other, 1e-12))
    best = int(scores.argmax())
    return float(scores[best]), int(shifts[best])


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
