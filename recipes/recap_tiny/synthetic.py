"""Sounds that the recipe makes itself: silence, noises and tones, with captions that say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .recordings import RATE

# Kind -> classes, captions of ours.
KINDS: dict[str, tuple[dict[str, float], tuple[str, ...]]] = {
    "white_noise": (
        {"White noise": 1.0, "Noise": 1.0, "Static": 0.5},
        (
            "White noise",
            "Steady white noise",
            "Static hisses continuously",
            "Constant hissing noise",
        ),
    ),
    "pink_noise": (
        {"Pink noise": 1.0, "Noise": 1.0},
        ("Pink noise", "A soft steady noise", "Continuous noise like a distant rush", "Steady background noise"),
    ),
    "rumble": (
        {"Noise": 1.0, "Rumble": 0.7},
        ("A low rumbling noise", "Deep steady rumbling", "Low frequency noise drones on", "A constant low rumble"),
    ),
    "tone": (
        {"Sine wave": 1.0, "Beep, bleep": 0.3},
        ("A steady tone", "A single tone sounds continuously", "A pure tone is held", "A continuous electronic tone"),
    ),
    "hum": (
        {"Hum": 1.0, "Mains hum": 1.0},
        ("An electrical hum", "A steady electric hum", "Mains hum drones continuously", "A constant low hum"),
    ),
    "chirp": (
        {"Chirp tone": 1.0, "Sine wave": 0.5},
        (
            "A tone rises in pitch",
            "A tone sweeps up and down",
            "An electronic tone glides",
            "A sweeping electronic tone",
        ),
    ),
    "near_silence": (
        {"Silence": 1.0},
        ("Silence", "Almost complete silence", "A nearly silent recording"),
    ),
}
_CLIPS_PER_KIND = 90


def synthetic_examples(folder: Path, seed: int) -> list:
    """Ninety clips of each kind, written to `folder`."""
    from .prepare import Example, write_once

    examples = []
    for place, (kind, (classes, captions)) in enumerate(KINDS.items()):
        for number in range(_CLIPS_PER_KIND):
            rng = np.random.default_rng([seed, 4, place, number])
            path = folder / f"{kind}-{number:02d}.flac"
            write_once(path, lambda kind=kind, rng=rng: make(kind, rng))
            known = (f"synthetic/{kind}-{number:02d}", str(path.resolve()), "recap_hf recipe", "Apache-2.0")
            examples.append(Example(*known, dict(classes), list(captions), len(captions)))
    return examples


def make(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One clip of a kind of `KINDS`, 2 to 10 s at 16 kHz, `(num_samples,)` float32."""
    size = int(RATE * rng.uniform(2.0, 10.0))
    time = np.arange(size) / RATE
    makers: dict[str, Callable[[], np.ndarray]] = {
        "white_noise": lambda: _coloured(size, 0.0, rng),
        "pink_noise": lambda: _coloured(size, -0.5, rng),
        "rumble": lambda: _coloured(size, -1.0, rng),
        "tone": lambda: np.sin(2 * np.pi * 10 ** rng.uniform(2.0, 3.7) * time + rng.uniform(0, 6)),
        "hum": lambda: sum(np.sin(2 * np.pi * rng.choice((50, 60)) * k * time) / k for k in (1, 2, 3, 5)),
        "chirp": lambda: np.sin(2 * np.pi * 10 ** rng.uniform(2.3, 3.3) * time * (1 + time * rng.uniform(0.05, 0.3))),
        "near_silence": lambda: _coloured(size, rng.uniform(-0.5, 0.0), rng),
    }
    waveform = makers[kind]()
    peak = 10 ** (rng.uniform(-80, -62) / 20) if kind == "near_silence" else 10 ** (rng.uniform(-40, -3) / 20)
    return (waveform * (peak / np.abs(waveform).max())).astype(np.float32)


def _coloured(size: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with frequency to the power `exponent`."""
    spectrum = rng.standard_normal(size // 2 + 1) + 1j * rng.standard_normal(size // 2 + 1)
    return np.fft.irfft(spectrum * np.maximum(np.arange(size // 2 + 1), 20.0) ** exponent, size)
