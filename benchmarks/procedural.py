"""Sounds that are no recordings: noise, tones, and a family of synthetic ones that stand for "anything else".

They teach the ear to say silence, noise, a tone, or that it does not recognise a sound. Every one is a function of
(kind, seed); folds are dealt by seed, so that evaluation hears others than training does.
"""

from __future__ import annotations

import numpy as np

__all__ = ["PROCEDURAL", "synthesise"]

_RATE = 48_000
_COUNTS = {"noise": 60, "tone": 60, "unknown": 160}
# (kind, seed, fold): folds 1 to 5 in turn.
PROCEDURAL: tuple[tuple[str, int, int], ...] = tuple(
    (kind, seed, seed % 5 + 1) for kind, count in _COUNTS.items() for seed in range(count)
)


def _coloured_noise(rng: np.random.Generator, samples: int, slope_db: float) -> np.ndarray:
    """Gaussian noise whose power falls by `slope_db` per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / _RATE), 20.0)
    spectrum *= 10 ** (-slope_db / 20 * np.log2(frequency / 1000))
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt(np.mean(noise**2) + 1e-12)


def _noise(rng: np.random.Generator) -> np.ndarray:
    samples = int(_RATE * rng.uniform(2, 10))
    return _coloured_noise(rng, samples, rng.uniform(-1, 5)) * 10 ** (rng.uniform(-35, -15) / 20)


def _tone(rng: np.random.Generator) -> np.ndarray:
    time = np.arange(int(_RATE * rng.uniform(1, 10))) / _RATE
    pitch = 80 * 2 ** rng.uniform(0, 6.5)
    tone = np.sin(2 * np.pi * pitch * time)
    kind = rng.integers(3)
    if kind == 1:
        tone = np.sign(tone) * 0.7
    elif kind == 2:
        tone = tone + 0.5 * np.sin(2 * np.pi * 2 * pitch * time + 1)
    return tone * 10 ** (rng.uniform(-35, -6) / 20)


def _unknown(rng: np.random.Generator) -> np.ndarray:
    """Sweeps, warbles, pulsed noise bands, beeps in patterns, inharmonic clusters, grains: one or two of them."""
    samples = int(_RATE * rng.uniform(2, 10))
    makers = (_sweep, _warble, _pulsed_band, _beeps, _cluster, _grains)
    sound = makers[rng.integers(len(makers))](rng, samples)
    if rng.random() < 0.3:
        sound = sound + 0.5 * makers[rng.integers(len(makers))](rng, samples)
    return sound * 10 ** (rng.uniform(-30, -10) / 20)


def _sweep(rng: np.random.Generator, samples: int) -> np.ndarray:
    time = np.arange(samples) / _RATE
    period = rng.uniform(0.2, 4)
    phase = (time / period) % 1
    low = 100 * 2 ** rng.uniform(0, 4)
    octaves = rng.uniform(-2, 3)
    return np.sin(2 * np.pi * np.cumsum(low * 2 ** (octaves * phase)) / _RATE)


def _warble(rng: np.random.Generator, samples: int) -> np.ndarray:
    time = np.arange(samples) / _RATE
    pitch = 150 * 2 ** rng.uniform(0, 4)
    index = rng.uniform(0.5, 8)
    ratio = rng.uniform(0.01, 3.7)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.1, 6) * time)
    return envelope * np.sin(2 * np.pi * pitch * time + index * np.sin(2 * np.pi * pitch * ratio * time))


def _pulsed_band(rng: np.random.Generator, samples: int) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / _RATE)
    centre = 200 * 2 ** rng.uniform(0, 5.5)
    width = rng.uniform(0.1, 0.8)
    spectrum *= np.exp(-0.5 * (np.log2(np.maximum(frequency, 1) / centre) / width) ** 2)
    band = np.fft.irfft(spectrum, samples)
    time = np.arange(samples) / _RATE
    gate = np.clip(np.sin(2 * np.pi * rng.uniform(0.3, 9) * time) * rng.uniform(1, 20), 0, 1)
    return gate * band / np.sqrt(np.mean(band**2) + 1e-12)


def _beeps(rng: np.random.Generator, samples: int) -> np.ndarray:
    sound = np.zeros(samples)
    scale = 200 * 2 ** rng.uniform(0, 4, size=rng.integers(2, 6))
    length = int(_RATE * rng.uniform(0.05, 0.4))
    window = np.hanning(length)
    for start in range(0, samples - length, int(length * rng.uniform(1.0, 3.0))):
        pitch = scale[rng.integers(len(scale))]
        sound[start : start + length] = window * np.sign(np.sin(2 * np.pi * pitch * np.arange(length) / _RATE))
    return sound * 0.5


def _cluster(rng: np.random.Generator, samples: int) -> np.ndarray:
    time = np.arange(samples) / _RATE
    sound = np.zeros(samples)
    period = rng.uniform(0.3, 3)
    for _ in range(rng.integers(3, 9)):
        decay = np.exp(-(time % period) * rng.uniform(1, 20))
        sound += decay * np.sin(2 * np.pi * 120 * 2 ** rng.uniform(0, 6) * time)
    return sound / 3


def _grains(rng: np.random.Generator, samples: int) -> np.ndarray:
    sound = np.zeros(samples)
    for _ in range(rng.integers(20, 200)):
        length = int(_RATE * rng.uniform(0.005, 0.2))
        start = rng.integers(0, samples - length)
        pitch = 100 * 2 ** rng.uniform(0, 6.5)
        sound[start : start + length] += np.hanning(length) * np.sin(2 * np.pi * pitch * np.arange(length) / _RATE)
    return sound


_MAKERS = {"noise": _noise, "tone": _tone, "unknown": _unknown}


def synthesise(kind: str, seed: int) -> np.ndarray:
    """Waveform (samples,) float64 at 48 kHz of "noise", "tone" or "unknown" number `seed`; 1 to 10 s, peak below 1.

    Raises:
        KeyError: another kind.
    """
    rng = np.random.default_rng([sorted(_MAKERS).index(kind), seed])
    sound = _MAKERS[kind](rng)
    return sound / max(1.0, 1.01 * float(np.abs(sound).max()))
