"""Explanations beside shuffled ones: whether maps and weights are better than chance, on sequences of real sounds.

    python -m benchmarks.explanations --sounds DIR [--fold 5] [--model DIR] [--methods gradient insertion]

The recordings are the sequences of the project's fixed mixtures: 4.5 s of one event, a quarter of a second of nothing,
4.5 s of another. A look is a word (all words) of a caption that names one of the two events; it lies on its event if
its map has more weight a second there than on the other event. Given captions name both events, in both orders for
each recording, so that the order of words says nothing about time. Of the model's own captions the words count that
name an event of the recording.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.explanation_chance import Look, caption_weights, correlation, shuffled_maps, swapped_maps
from benchmarks.naming import NamingRules
from benchmarks.sound_events import SAMPLING_RATE, Item, load_mono, mixture_hash, mixture_list, mixtures
from recap_cli.status import exit_status
from recap_hf.explain import explain_caption
from recap_hf.explain.picture import clip_spectrogram
from recap_hf.modeling.audio_recap import resample
from recipes.recap_tiny.grammar import PARTICIPLE, inflect
from recipes.recap_tiny.lexicon import labels

METHODS = ("gradient", "insertion")
_LONGEST_S, _GAP_S = 4.5, 0.25


@dataclass(frozen=True)
class Sequence2:
    """A recording of two events and when each sounds, in seconds."""

    item: Item
    times: tuple[tuple[float, float], tuple[float, float]]


@dataclass
class Observations:
    """What the explanations of one method gave."""

    given: list[tuple[Look, Look]] = field(default_factory=list)
    own: list[Look] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    has_word: list[np.ndarray] = field(default_factory=list)
    upper_share: list[float] = field(default_factory=list)
    upper_energy: list[float] = field(default_factory=list)


def sequences(sounds: str | Path, fold: int, limit: int | None = None) -> Iterator[Sequence2]:
    """The sequences of the fixed mixtures of a fold, with the times of their events."""
    entries = [entry for entry in mixture_list(sounds, fold) if entry["kind"] == "sequence"][:limit]
    for entry in entries:
        first, second = (
            min(len(load_mono(Path(sounds) / name)) / SAMPLING_RATE, _LONGEST_S) for name in entry["files"]
        )
        start = first + _GAP_S
        yield Sequence2(next(iter(mixtures(sounds, [entry]))), ((0.0, first), (start, start + second)))


def look_at(explanation: Any, event: str, times: tuple, which: int, rules: NamingRules, item: int) -> Look | None:
    """The map of the words that name an event, over time; None where the caption does not name it."""
    text = explanation.caption.lower()
    spans = [match.span() for match in rules.events[event].finditer(text)]
    words = [w for w in explanation.words if any(w.start < end and w.end > start for start, end in spans)]
    if not words:
        return None
    density = np.mean([word.audio_map.sum(axis=0) for word in words], axis=0) / np.diff(explanation.time_edges_s)
    # The stratum: whether the word stands in the first or the second half of the caption's events.
    before = any(
        match.start() < spans[0][0]
        for other, pattern in rules.events.items()
        if other != event
        for match in pattern.finditer(text)
    )
    return Look(density, explanation.time_edges_s, times[which], times[1 - which], item, int(before))


def observe(captioner: Any, sequence: Sequence2, number: int, method: str, encoding: Any, found: Observations) -> None:
    """Explains the two given captions and the model's own caption of one recording."""
    rules, item = NamingRules.ours(), sequence.item
    clip = item.waveform.astype(np.float32)
    options = {"sampling_rate": SAMPLING_RATE, "method": method, "encoding": encoding}
    names = [inflect(labels()[event].phrases[0], PARTICIPLE, False) for event in item.events]
    energy = [_upper_energy(clip, interval, captioner.processor.feature_extractor) for interval in sequence.times]
    for order in ((0, 1), (1, 0)):
        caption = f"{names[order[0]]} and {names[order[1]]}"
        explanation = explain_caption(captioner, clip, caption=caption, **options)
        looks = [look_at(explanation, item.events[e], sequence.times, e, rules, number) for e in order]
        if all(looks):
            found.given.append((looks[0], looks[1]))
        for place, event in enumerate(order):
            start = 0 if place == 0 else len(caption) - len(names[event])
            audio_map = explanation.map_of(start, start + len(names[event]))
            if audio_map.sum() > 0:
                found.upper_share.append(float(audio_map[audio_map.shape[0] // 2 :].sum() / audio_map.sum()))
                found.upper_energy.append(energy[event])
    explanation = explain_caption(captioner, clip, **options)
    for which, event in enumerate(item.events):
        look = look_at(explanation, event, sequence.times, which, rules, number)
        if look is not None:
            found.own.append(look)
    _observe_captions(explanation, found)


def _observe_captions(explanation: Any, found: Observations) -> None:
    texts = [set(hit["caption"].lower().split()) for hit in explanation.retrieved]
    for word in explanation.words:
        has = np.array([word.text.lower() in text for text in texts], dtype=bool)
        if 0 < has.sum() < len(has) and word.caption_weights.sum() > 0:
            found.weights.append(word.caption_weights)
            found.has_word.append(has)


def _upper_energy(clip: np.ndarray, interval: tuple[float, float], extractor: Any) -> float:
    """Share of an event's mel power in the upper half of the mel bins."""
    part = clip[int(interval[0] * SAMPLING_RATE) : int(interval[1] * SAMPLING_RATE)]
    power = 10.0 ** (clip_spectrogram(part, SAMPLING_RATE, extractor) / 10)
    return float(power[:, power.shape[1] // 2 :].sum() / power.sum())


def summarise(found: Observations, permutations: int) -> dict[str, Any]:
    """The tests of one method; a part without observations is left out."""
    result: dict[str, Any] = {}
    if found.given:
        result["given captions"] = shuffled_maps([look for pair in found.given for look in pair], permutations)
        result["two words of a caption"] = swapped_maps(found.given, permutations)
    if found.own:
        result["own captions"] = shuffled_maps(found.own, permutations)
    if found.weights:
        result["retrieved captions"] = caption_weights(found.weights, found.has_word, permutations)
    if len(found.upper_share) > 2:
        result["bands"] = correlation(found.upper_share, found.upper_energy, permutations)
    return result


def run_benchmark(
    captioner: Any,
    sounds: str | Path,
    fold: int = 5,
    methods: tuple[str, ...] = METHODS,
    limit: int | None = None,
    permutations: int = 10_000,
) -> dict[str, Any]:
    """All tests for all methods.

    Args:
        captioner ([`Captioner`])
        sounds: folder of recordings with a `metadata.csv`.
        fold: whose recordings are mixed; the model must not have been trained on it.
        methods: of `explain_caption`.
        limit: number of sequences, from the first; default: all 150.
        permutations: shuffles of each test.
    """
    from tqdm import tqdm

    observations = {method: Observations() for method in methods}
    clips = list(sequences(sounds, fold, limit))
    for number, sequence in enumerate(tqdm(clips, unit="clip", file=sys.stderr, disable=None)):
        clip = resample(sequence.item.waveform.astype(np.float32), SAMPLING_RATE, captioner.sampling_rate)
        encoding = captioner.encode([clip])
        for method in methods:
            observe(captioner, sequence, number, method, encoding, observations[method])
    return {
        "fold": fold,
        "recordings": len(clips),
        "mixtures": mixture_hash(mixture_list(sounds, fold)),
        "methods": {method: summarise(found, permutations) for method, found in observations.items()},
    }


def format_result(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    lines = [
        f"{result['recordings']} sequences of two events, fold {result['fold']} (mixtures {result['mixtures']})",
        "",
        "| method | captions | looks | on their event [95 %] | maps shuffled | difference | Cohen's h | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, tests in result["methods"].items():
        for name in ("given captions", "own captions"):
            test = tests.get(name)
            if test:
                low, high = test["interval"]
                lines.append(
                    f"| {method} | {name.split()[0]} | {test['looks']} | {test['rate']:.3f} [{low:.3f}, {high:.3f}] | "
                    f"{test['shuffled']:.3f} | {test['difference']:+.3f} | {test['cohens_h']:.2f} | {test['p']:.4f} |"
                )
    lines += [
        "",
        "| method | two words the right way round | Cohen's d | p | weight on captions with the word | shuffled | p | "
        "upper band: rho | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, tests in result["methods"].items():
        cells = [method]
        for name, keys in (
            ("two words of a caption", ("rate", "cohens_d", "p")),
            ("retrieved captions", ("share", "shuffled", "p")),
            ("bands", ("rho", "p")),
        ):
            test = tests.get(name)
            cells += ["" if test is None else f"{test[key]:.{4 if key == 'p' else 3}f}" for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explanations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sounds", metavar="DIR", required=True, help="folder of recordings with a metadata.csv")
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the embedded recap-tiny)")
    parser.add_argument("--fold", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--limit", type=int, help="number of sequences, from the first (default: all 150)")
    parser.add_argument("--permutations", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; its own choice by default")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    args = parser.parse_args(argv)
    import torch

    from recap_hf import Captioner

    if args.threads:
        torch.set_num_threads(args.threads)
    captioner = Captioner.from_pretrained(args.model, device="cpu")
    methods = tuple(args.methods)
    result = run_benchmark(captioner, args.sounds, args.fold, methods, args.limit, args.permutations)
    print(json.dumps(result, indent=1) if args.format == "json" else format_result(result))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("python -m benchmarks.explanations", main))
