"""Example recordings that the package ships: imitations of sounds, synthesised here, nobody's recordings.

They are what a first `recap caption` is tried on. Only those are shipped that recap-tiny names rightly, which is a
statement about the imitation as much as about the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["EXAMPLES", "SHIPPED", "synthesise_example", "write_examples"]

_RATE = 48_000


def _band_noise(rng: np.random.Generator, samples: int, low: float, high: float) -> np.ndarray:
    """Gaussian noise between two frequencies, unit RMS, with soft edges."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / _RATE)
    spectrum *= 1 / (1 + (low / np.maximum(frequency, 1)) ** 4) / (1 + (frequency / high) ** 4)
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt(np.mean(noise**2))


def _clock(rng: np.random.Generator) -> np.ndarray:
    """Two wooden clicks a second, the second of each pair duller."""
    sound = _band_noise(rng, 8 * _RATE, 100, 4000) * 2e-4
    for index in range(16):
        length = int(0.03 * _RATE)
        time = np.arange(length) / _RATE
        pitch = 2600 if index % 2 == 0 else 2100
        click = np.exp(-time * 260) * (np.sin(2 * np.pi * pitch * time) + 0.7 * rng.standard_normal(length))
        start = int(index * 0.5 * _RATE) + 2000
        sound[start : start + length] += 0.25 * click
    return sound


def _rain(rng: np.random.Generator) -> np.ndarray:
    """A bed of hiss and thousands of drops."""
    samples = 8 * _RATE
    sound = 0.04 * _band_noise(rng, samples, 800, 9000)
    for _ in range(2500):
        length = int(_RATE * rng.uniform(0.002, 0.012))
        time = np.arange(length) / _RATE
        pitch = rng.uniform(1500, 9000)
        start = rng.integers(0, samples - length)
        sound[start : start + length] += (
            rng.exponential(0.05)
            * np.exp(-time * 500)
            * np.sin(2 * np.pi * pitch * time)
            * np.hanning(2 * length)[length:]
        )
    return sound


def _sea(rng: np.random.Generator) -> np.ndarray:
    """Noise that swells, brightens and runs out every four seconds."""
    samples = 10 * _RATE
    time = np.arange(samples) / _RATE
    phase = (time / 4.2 + 0.1) % 1
    swell = np.where(phase < 0.35, phase / 0.35, np.exp(-(phase - 0.35) * 4))
    low = _band_noise(rng, samples, 60, 700)
    high = _band_noise(rng, samples, 500, 6000)
    return 0.05 * low * (0.4 + swell) + 0.12 * high * swell**2


def _sneeze(rng: np.random.Generator) -> np.ndarray:
    """A drawn breath, then a burst of noise with the resonances of a mouth."""
    sound = np.zeros(4 * _RATE)
    breath = _band_noise(rng, int(0.5 * _RATE), 400, 2500) * np.linspace(0, 1, int(0.5 * _RATE)) ** 2
    sound[_RATE // 2 : _RATE // 2 + len(breath)] += 0.03 * breath
    length = int(0.35 * _RATE)
    time = np.arange(length) / _RATE
    burst = (_band_noise(rng, length, 900, 5000) + 0.6 * np.sin(2 * np.pi * (500 - 500 * time) * time)) * np.exp(
        -time * 11
    )
    start = int(1.05 * _RATE)
    sound[start : start + length] += 0.35 * burst
    return sound


def _bass_drum(rng: np.random.Generator) -> np.ndarray:
    """A sine that falls from 120 to 50 Hz, with a click at its start."""
    sound = np.zeros(int(1.5 * _RATE))
    time = np.arange(int(0.6 * _RATE)) / _RATE
    pitch = 50 + 70 * np.exp(-time * 30)
    hit = np.sin(2 * np.pi * np.cumsum(pitch) / _RATE) * np.exp(-time * 8)
    hit += 0.15 * rng.standard_normal(len(time)) * np.exp(-time * 300)
    sound[2000 : 2000 + len(hit)] += 0.6 * hit
    return sound


def _hi_hat(rng: np.random.Generator) -> np.ndarray:
    """High noise and inharmonic partials that die away."""
    length = int(1.2 * _RATE)
    time = np.arange(length) / _RATE
    partials = sum(np.sign(np.sin(2 * np.pi * 40 * ratio * 100 * time)) for ratio in (1.34, 1.68, 2.05, 2.37, 2.91))
    hit = (0.5 * _band_noise(rng, length, 6000, 16000) + 0.1 * partials) * np.exp(-time * 9)
    return 0.3 * np.concatenate([np.zeros(2000), hit])


def _helicopter(rng: np.random.Generator) -> np.ndarray:
    """Low noise chopped eleven times a second."""
    samples = 8 * _RATE
    time = np.arange(samples) / _RATE
    blades = np.maximum(np.sin(2 * np.pi * 11 * time), 0) ** 3
    engine = 0.3 * np.sin(2 * np.pi * 88 * time) + 0.2 * np.sin(2 * np.pi * 176 * time)
    return (
        0.25 * blades * _band_noise(rng, samples, 40, 900)
        + 0.04 * _band_noise(rng, samples, 100, 3000)
        + 0.05 * engine
    )


def _flute(rng: np.random.Generator) -> np.ndarray:
    """Five notes: few partials, vibrato, breath."""
    notes = []
    for pitch in (587.3, 659.3, 740.0, 880.0, 740.0):
        time = np.arange(int(1.1 * _RATE)) / _RATE
        phase = 2 * np.pi * pitch * time + 1.2 * np.sin(2 * np.pi * 5 * time)
        note = np.sin(phase) + 0.35 * np.sin(2 * phase) + 0.12 * np.sin(3 * phase)
        note += 0.06 * _band_noise(rng, len(time), 1000, 6000)
        envelope = np.minimum(1, time / 0.07) * np.minimum(1, (time[-1] - time) / 0.1)
        notes.append(0.2 * note * envelope)
    return np.concatenate(notes)


def _tone(rng: np.random.Generator) -> np.ndarray:
    """440 Hz."""
    return 0.2 * np.sin(2 * np.pi * 440 * np.arange(5 * _RATE) / _RATE)


def _silence(rng: np.random.Generator) -> np.ndarray:
    """Nothing but the noise of a quiet recorder."""
    return rng.standard_normal(5 * _RATE) * 1e-5


# File name -> (maker, event that it imitates or the special answer it should get).
EXAMPLES = {
    "clock": (_clock, "clock_tick"),
    "rain": (_rain, "rain"),
    "sea": (_sea, "sea_waves"),
    "sneeze": (_sneeze, "person_sneeze"),
    "bass_drum": (_bass_drum, "bass_drum"),
    "hi_hat": (_hi_hat, "hi_hat"),
    "helicopter": (_helicopter, "helicopter"),
    "flute": (_flute, "flute"),
    "tone": (_tone, "tone"),
    "silence": (_silence, "silence"),
}

# Those of them that the shipped recap-tiny names rightly.
SHIPPED = ("clock", "rain", "sea", "bass_drum", "hi_hat", "flute", "tone", "silence")


def synthesise_example(name: str) -> np.ndarray:
    """Waveform (samples,) float64 at 48 kHz, peak at most 0.9.

    Raises:
        KeyError: no such example.
    """
    maker, _ = EXAMPLES[name]
    sound = maker(np.random.default_rng([0xE8, sorted(EXAMPLES).index(name)]))
    return sound / max(1.0, float(np.abs(sound).max()) / 0.9)


def write_examples(folder: str | Path, names: tuple[str, ...] = SHIPPED) -> list[Path]:
    """Write examples as FLAC (48 kHz, 16 bit) and return their paths."""
    import soundfile

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        path = folder / f"{name}.flac"
        soundfile.write(path, synthesise_example(name), _RATE, subtype="PCM_16")
        paths.append(path)
    return paths
