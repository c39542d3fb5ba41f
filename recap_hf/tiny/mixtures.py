"""Training examples of recap-tiny, synthesised on the fly in the mel power domain.

Everything that a caption says is done here: offsets make the order, gains the background, a low-pass with a smear the
distance, copies of one burst the repetition. A "file" of up to 10 s is built first and then repeated as CLAP's feature
extractor repeats short files ("repeatpad"), because that is what inference will hear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .grammar import Part, Scene
from .lexicon import COUNTABLE, HEARD
from .sounds import FRAMES, MELS, POWER_FLOOR, Clip, SoundBank

__all__ = ["TIME_STEPS", "Example", "MixtureConfig", "draw_example", "repeat_pad", "to_decibels"]

TIME_STEPS = 32  # time steps of the audio tower's last hidden state


@dataclass(frozen=True)
class MixtureConfig:
    """Shares and ranges of the synthesis; gains in dB."""

    scenes: tuple[tuple[str, float], ...] = (
        ("single", 0.46),
        ("count", 0.05),
        ("overlap", 0.22),
        ("sequence", 0.15),
        ("three", 0.05),
        ("special", 0.07),
    )
    overlap_gain: float = 8.0
    background_gain: tuple[float, float] = (-18.0, -10.0)
    background_share: float = 0.15
    far_share: float = 0.12
    level_share: float = 0.5
    level: tuple[float, float] = (-32.0, 14.0)
    noise_share: float = 0.35
    low_pass_share: float = 0.25
    # Another performance of a recording: its speed by up to this factor, its spectrum by up to so many bins, and
    # where two recordings of one event are blended, a performance that nobody gave.
    speed_share: float = 0.4
    speed: float = 1.15
    shift_share: float = 0.5
    shift: float = 2.0
    blend_share: float = 0.0
    equaliser: float = 6.0
    mask_share: float = 0.5

    def strongly_varied(self) -> MixtureConfig:
        """These shares, with recordings varied so much that they are nearly new ones."""
        return replace(
            self,
            speed_share=0.6,
            speed=1.3,
            shift_share=0.7,
            shift=4.0,
            blend_share=0.25,
            equaliser=9.0,
            mask_share=0.7,
        )

    def with_singles(self, share: float, progress: float) -> MixtureConfig:
        """These shares, with the one of single sounds moved from `share` (progress 0) to its own (progress 1)."""
        shares = dict(self.scenes)
        own = shares.pop("single")
        single = own + (share - own) * max(0.0, 1.0 - progress)
        rest = (1.0 - single) / (1.0 - own)
        scenes = (("single", single), *((name, value * rest) for name, value in shares.items()))
        return replace(self, scenes=scenes)


@dataclass(frozen=True)
class Example:
    """`power` (1001, 64); `scene`, its truth; `activity` {event: (32,) bool}, when each event sounds."""

    power: np.ndarray
    scene: Scene
    activity: dict[str, np.ndarray]


def _mel_centres() -> np.ndarray:
    """Centre frequencies in Hz of the 64 slaney mel bins between 0 and 14 kHz."""
    step = 200 / 3
    top = 15.0 + np.log(14_000 / 1000) / (np.log(6.4) / 27)
    mels = np.linspace(0, top, MELS + 2)[1:-1]
    return np.where(mels < 15, mels * step, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))


_CENTRES = _mel_centres()


def to_decibels(power: np.ndarray) -> np.ndarray:
    """10 log10 with CLAP's floor: what `input_features` holds."""
    return 10 * np.log10(np.maximum(power, POWER_FLOOR), dtype=np.float32)


def low_pass(cutoff: float, slope_db: float) -> np.ndarray:
    """Factors (64,) on power: 1 below `cutoff` Hz, falling by `slope_db` per octave above."""
    return (10 ** (-slope_db / 10 * np.maximum(np.log2(_CENTRES / cutoff), 0))).astype(np.float32)


def smear(power: np.ndarray, seconds: float) -> np.ndarray:
    """Exponential reverberation along time, falling by 60 dB in `seconds`."""
    ratio = 10 ** (-6 / (seconds * 100))
    wet = power.copy()
    shift = 1
    # Each pass doubles the length of the impulse response: 1, 2, 4, ... 128 frames.
    while shift <= 128:
        wet[shift:] += ratio**shift * wet[:-shift].copy() if shift < len(wet) else 0
        shift *= 2
        if shift >= len(wet):
            break
    return wet * (1 - ratio)


def repeat_pad(power: np.ndarray) -> np.ndarray:
    """A file's frames repeated as often as they fit into 10 s, then padded with silence."""
    if len(power) >= FRAMES:
        return power[:FRAMES]
    # The last frame of a file is half padding: the period is one frame less.
    period = max(len(power) - 1, 1)
    times = max((FRAMES - 1) // period, 1)
    padded = np.zeros((FRAMES, MELS), dtype=np.float32)
    padded[: times * period] = np.tile(power[:period], (times, 1))
    return padded


def _active_level(power: np.ndarray) -> float:
    total = power.sum(axis=1)
    return float(total[total > total.max() * 1e-3].mean()) + POWER_FLOOR


def _vary(power: np.ndarray, rng: np.random.Generator, config: MixtureConfig) -> np.ndarray:
    """Another performance of the clip: faster or slower, with the spectrum shifted."""
    if rng.random() < config.speed_share:
        length = max(int(len(power) * config.speed ** rng.uniform(-1, 1)), 2)
        power = power[np.linspace(0, len(power) - 1, length).round().astype(int)]
    if rng.random() < config.shift_share:
        shift = rng.uniform(-config.shift, config.shift)
        positions = np.clip(np.arange(MELS) - shift, 0, MELS - 1)
        low = np.floor(positions).astype(int)
        share = (positions - low).astype(np.float32)
        power = power[:, low] * (1 - share) + power[:, np.minimum(low + 1, MELS - 1)] * share
    return power


def _equalise(rng: np.random.Generator, strength: float) -> np.ndarray:
    points = rng.normal(0, strength / 2, size=5)
    return (10 ** (np.interp(np.arange(MELS), np.linspace(0, MELS - 1, 5), points) / 10)).astype(np.float32)


def _crop(power: np.ndarray, rng: np.random.Generator, longest: int) -> np.ndarray:
    """At most `longest` frames that hold the loudest stretch."""
    if len(power) <= longest:
        return power
    total = np.cumsum(np.concatenate([[0], power.sum(axis=1)]))
    energy = total[longest:] - total[:-longest]
    good = np.flatnonzero(energy >= 0.4 * energy.max())
    start = int(good[rng.integers(len(good))])
    return power[start : start + longest]


class _Builder:
    """Places sounds on a file and remembers when each of them sounds."""

    def __init__(self, frames: int):
        self.file = np.zeros((frames, MELS), dtype=np.float32)
        self.parts: list[tuple[str, np.ndarray]] = []

    def place(self, event: str, power: np.ndarray, start: int) -> None:
        end = min(start + len(power), len(self.file))
        self.file[start:end] += power[: end - start]
        total = np.zeros(len(self.file), dtype=np.float32)
        total[start:end] = power[: end - start].sum(axis=1)
        self.parts.append((event, total))

    def activity(self, frames_of: np.ndarray) -> dict[str, np.ndarray]:
        """Per event, (32,) bool: within 25 dB of its own peak in that step; `frames_of` maps 10 s to file frames."""
        steps = np.linspace(0, len(frames_of), TIME_STEPS + 1).astype(int)[:-1]
        result: dict[str, np.ndarray] = {}
        for event, total in self.parts:
            active = np.append(total > total.max() * 10**-2.5, False)
            heard = np.maximum.reduceat(active[frames_of], steps)
            result[event] = result.get(event, False) | heard
        return result


def _finish(builder: _Builder, scene: Scene, rng: np.random.Generator, config: MixtureConfig) -> Example:
    """Repeat and pad the file, then what any recording may suffer: level, band limit, noise, masks."""
    length = len(builder.file)
    frames_of = np.full(FRAMES, length, dtype=int)
    if length >= FRAMES:
        frames_of = np.arange(FRAMES)
    else:
        period = max(length - 1, 1)
        times = max((FRAMES - 1) // period, 1)
        frames_of[: times * period] = np.tile(np.arange(period), times)
    power = np.concatenate([builder.file, np.zeros((1, MELS), dtype=np.float32)])[frames_of]
    return Example(degrade(power, rng, config), scene, builder.activity(frames_of))


def degrade(power: np.ndarray, rng: np.random.Generator, config: MixtureConfig) -> np.ndarray:
    """Noise floor, band limit, overall level and masks: nothing of it is ever said in a caption."""
    if rng.random() < config.noise_share:
        gain = 10 ** (-rng.uniform(12, 45) / 10)
        noise = rng.gamma(2.0, 0.5, size=power.shape).astype(np.float32) * _equalise(rng, 8.0)
        power = power + noise * (gain * _active_level(power) / MELS)
    factors = np.ones(MELS, dtype=np.float32)
    if rng.random() < config.low_pass_share:
        cutoff = 3_300 * 4 ** rng.uniform(0, 1)
        factors = factors * low_pass(cutoff, rng.choice([24.0, 200.0]))
    spread = config.level if rng.random() < config.level_share else (-5.0, 5.0)
    power = power * (factors * 10 ** (rng.uniform(*spread) / 10))
    if rng.random() < config.mask_share:
        for _ in range(rng.integers(1, 3)):
            width = rng.integers(1, 8)
            start = rng.integers(0, MELS - width)
            power[:, start : start + width] *= 1e-4
            width = rng.integers(5, 50)
            start = rng.integers(0, FRAMES - width)
            power[start : start + width] *= 1e-4
    return power.astype(np.float32)


def _pick(bank: SoundBank, event: str, folds: tuple[int, ...], rng: np.random.Generator) -> Clip:
    clips = bank.of(event, folds)
    return clips[rng.integers(len(clips))]


def _sound(
    bank: SoundBank,
    event: str,
    folds: tuple[int, ...],
    rng: np.random.Generator,
    config: MixtureConfig,
) -> np.ndarray:
    def performance() -> np.ndarray:
        return _vary(_pick(bank, event, folds, rng).power, rng, config) * _equalise(rng, config.equaliser)

    power = performance()
    if rng.random() < config.blend_share:
        other = performance()
        gain = _active_level(power) / _active_level(other) * 10 ** (rng.uniform(-6, 6) / 10)
        length = min(len(power), len(other))
        power = power.copy()
        power[:length] += gain * other[:length]
    return power


def _make_far(power: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tail = np.zeros((60, MELS), dtype=np.float32)
    wet = smear(np.concatenate([power, tail]), rng.uniform(0.6, 1.5))
    wet[: len(power)] += 0.1 * power
    return wet * (low_pass(rng.uniform(700, 1800), 9.0) * 10 ** (rng.uniform(-22, -14) / 10))


def _single(bank: SoundBank, folds: tuple[int, ...], rng: np.random.Generator, config: MixtureConfig, events):
    event = events[rng.integers(len(events))]
    power = _sound(bank, event, folds, rng, config)
    attributes: frozenset[str] = frozenset()
    if rng.random() < config.far_share:
        power = _make_far(power, rng)
        attributes = frozenset({"far"})
    if rng.random() < 0.25:
        power = _crop(power, rng, int(rng.integers(120, 500)))
    start = 0
    frames = len(power)
    if rng.random() < 0.25 and frames < 900:
        frames = int(rng.integers(frames, FRAMES))
        start = int(rng.integers(0, frames - len(power) + 1))
    builder = _Builder(min(frames, FRAMES))
    builder.place(event, power[:FRAMES], start)
    return builder, Scene((Part(event, attributes),))


def _count(bank: SoundBank, folds: tuple[int, ...], rng: np.random.Generator, config: MixtureConfig, events):
    """One burst of a sound, placed once, twice or four to six times."""
    countable = [event for event in events if event in COUNTABLE]
    if not countable:
        return _single(bank, folds, rng, config, events)
    event = countable[rng.integers(len(countable))]
    clip = _pick(bank, event, folds, rng)
    bursts = [(start, end) for start, end in clip.bursts if 4 <= end - start <= 130]
    if not bursts:
        return _single(bank, folds, rng, config, events)
    start, end = bursts[rng.integers(len(bursts))]
    burst = _vary(clip.power[max(start - 3, 0) : end + 5], rng, config) * _equalise(rng, config.equaliser)
    name, times = (("once", 1), ("twice", 2), ("repeatedly", int(rng.integers(4, 7))))[rng.integers(3)]
    gap = len(burst) + int(rng.integers(30, 120))
    builder = _Builder(min(max(gap * times, 505), FRAMES))
    for index in range(times):
        position = index * gap
        if position < len(builder.file):
            builder.place(event, burst * 10 ** (rng.uniform(-1.5, 1.5) / 10), position)
    return builder, Scene((Part(event, frozenset({name})),))


def _overlap(bank, folds, rng, config: MixtureConfig, events, count: int = 2):
    chosen = [events[index] for index in rng.choice(len(events), size=count, replace=False)]
    sounds = [_sound(bank, event, folds, rng, config) for event in chosen]
    frames = min(max(len(sound) for sound in sounds), FRAMES)
    builder = _Builder(frames)
    reference = _active_level(sounds[0])
    parts = []
    for index, (event, power) in enumerate(zip(chosen, sounds, strict=True)):
        attributes: frozenset[str] = frozenset()
        gain = rng.uniform(-config.overlap_gain, config.overlap_gain) if index else 0.0
        if index == count - 1 and rng.random() < config.background_share:
            gain = rng.uniform(*config.background_gain)
            attributes = frozenset({"background"})
        power = power[:frames] * (reference / _active_level(power) * 10 ** (gain / 10))
        free = frames - len(power)
        if free > len(power) // 2 and rng.random() < 0.6:
            power = np.tile(power, (frames // len(power) + 1, 1))[:frames]
            free = 0
        builder.place(event, power, int(rng.integers(0, free + 1)) if free else 0)
        parts.append(Part(event, attributes))
    return builder, Scene(tuple(parts))


def _sequence(bank, folds, rng, config: MixtureConfig, events, count: int = 2):
    """One after another with up to 0.6 s between; longer than 5 s, so that nothing repeats and blurs the order."""
    chosen = [events[index] for index in rng.choice(len(events), size=count, replace=False)]
    longest = (FRAMES - 1) // count
    sounds = []
    for event in chosen:
        power = _crop(_sound(bank, event, folds, rng, config), rng, int(rng.integers(longest // 2, longest + 1)))
        if len(power) < longest // 2 and rng.random() < 0.6:
            power = np.tile(power, (longest // max(len(power), 1) + 1, 1))[: rng.integers(longest // 2, longest + 1)]
        sounds.append(power)
    reference = _active_level(sounds[0])
    placed = []
    position = 0
    for event, power in zip(chosen, sounds, strict=True):
        gain = reference / _active_level(power) * 10 ** (rng.uniform(-5, 5) / 10)
        placed.append((event, power * gain, position))
        position += len(power) + int(rng.integers(0, 60))
    builder = _Builder(int(np.clip(position, 505, FRAMES)))
    for event, power, start in placed:
        builder.place(event, power, min(start, len(builder.file) - 1))
    return builder, Scene(tuple(Part(event) for event in chosen), "sequence")


def _special(bank: SoundBank, folds: tuple[int, ...], rng: np.random.Generator, config: MixtureConfig) -> Example:
    key = ("silence", "noise", "tone", "unknown", "unknown")[rng.integers(5)]
    if key == "silence":
        level = 10 ** rng.uniform(-11, -7.5) * (rng.random() < 0.6)
        power = level * rng.gamma(2.0, 0.5, size=(FRAMES, MELS)) * _equalise(rng, 6.0)
        steps = np.ones(TIME_STEPS, dtype=bool)
        return Example(power.astype(np.float32), Scene((Part(key),)), {key: steps})
    power = _vary(_pick(bank, key, folds, rng).power, rng, config)[:FRAMES]
    builder = _Builder(len(power))
    builder.place(key, power, 0)
    return _finish(builder, Scene((Part(key),)), rng, config)


def draw_example(
    bank: SoundBank,
    folds: tuple[int, ...],
    rng: np.random.Generator,
    config: MixtureConfig | None = None,
    events: tuple[str, ...] = tuple(HEARD),
) -> Example:
    """One training example.

    Args:
        bank: The source clips.
        folds: Folds that may be heard.
        rng: Source of every choice.
        config: Shares and ranges.
        events: Events that may occur.
    """
    config = config or MixtureConfig()
    names, shares = zip(*config.scenes, strict=True)
    kind = names[rng.choice(len(names), p=np.array(shares) / sum(shares))]
    if kind == "special":
        return _special(bank, folds, rng, config)
    if kind == "three":
        maker = (_overlap, _sequence)[rng.integers(2)]
        builder, scene = maker(bank, folds, rng, config, events, 3)
    else:
        maker = {"single": _single, "count": _count, "overlap": _overlap, "sequence": _sequence}[kind]
        builder, scene = maker(bank, folds, rng, config, events)
    return _finish(builder, scene, rng, config)
