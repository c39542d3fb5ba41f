"""How well captions name the sound events of single recordings and of mixtures of two.

    python -m benchmarks.named_events --sounds DIR [--keywords FILE] [--fold 5] [--events NAME ...] [--output FILE]

Beside the captioner: its first retrieved caption, the captioner without captions (k = 0), without audio (hidden states
and embeddings of zeros, after retrieval), with the prompt of another clip, and with neither audio nor captions.
Intervals: 95 %, bootstrap over clips. Of sequences that both events are named of: the share with the right order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, load_captioner

SYSTEMS = (
    "captioner",
    "first retrieved caption",
    "no captions (k=0)",
    "no audio",
    "another clip's captions",
    "no audio, another clip's captions",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", required=True, metavar="DIR", help="recordings with a metadata.csv")
    parser.add_argument("--keywords", metavar="FILE", help="naming rules as JSON (default: benchmarks.naming's)")
    parser.add_argument("--fold", type=int, default=5, metavar="N", help="of the metadata (default: 5)")
    parser.add_argument("--mixtures", type=positive, default=300, metavar="N", help="mixtures of two (default: 300)")
    parser.add_argument("--events", nargs="+", metavar="NAME", help="single recordings of these alone, no mixtures")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="clips at once (default: 8)")
    parser.add_argument("--output", metavar="FILE", help="figures and captions as JSON")
    add_captioner_arguments(parser)
    args = parser.parse_args(argv)
    captioner = load_captioner(args)

    from benchmarks.naming import NamingRules
    from benchmarks.sound_events import mixture_hash, mixture_list, mixtures, singles

    rules = NamingRules.read(args.keywords) if args.keywords else NamingRules.ours()
    sets = {"single sounds": singles(args.sounds, args.fold)}
    if args.events:
        sets = {"single sounds": [item for item in sets["single sounds"] if item.events[0] in args.events]}
        if not sets["single sounds"]:
            parser.error(f"argument --events: fold {args.fold} has no recordings of them")
    else:
        entries = mixture_list(args.sounds, args.fold, args.mixtures)
        print(f"{len(entries)} mixtures {mixture_hash(entries)}")
        sets["mixtures"] = mixtures(args.sounds, entries)
    report = {}
    for name, items in sets.items():
        # In the order of the files, the next clip has often the same sound.
        items = [items[number] for number in np.random.default_rng(0).permutation(len(items))]
        captions = caption_items(captioner, [item.waveform for item in items], args.batch_size)
        report[name] = evaluate(captions, [item.events for item in items], rules)
        print(f"\n{name}, {len(items)} clips\n\n{table(report[name])}", flush=True)
        for system, (right, both, one, clips) in orders(captions, items, rules).items():
            report.setdefault("order", {})[system] = {"right": right, "both": both, "one": one, "clips": clips}
            print(f"{system}: both named in {both}, one at least in {one} of {clips}; order right in {right}")
        report[name]["clips"] = [
            {"name": item.name, "events": item.events, **{system: captions[system][row] for system in SYSTEMS}}
            for row, item in enumerate(items)
        ]
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def caption_items(
    captioner: Any, waveforms: Sequence[np.ndarray], batch_size: int, systems: Sequence[str] = SYSTEMS
) -> dict[str, list[str]]:
    """Captions of 48 kHz waveforms by each of `systems`."""
    import torch

    from benchmarks.sound_events import SAMPLING_RATE
    from recap_hf.modeling.audio_recap import resample
    from recap_hf.modeling.options_recap import CaptionOptions

    without_captions = captioner.with_options(CaptionOptions(k=0))
    captions: dict[str, list[str]] = {system: [] for system in systems}
    for start in range(0, len(waveforms), batch_size):
        batch = [
            resample(waveform.astype(np.float32), SAMPLING_RATE, captioner.sampling_rate)
            for waveform in waveforms[start : start + batch_size]
        ]
        encoding = captioner.encode(batch)
        retrieved = captioner.retrieve(encoding)
        # Embeddings of zeros as well: reranking would choose by the audio.
        others = retrieved[1:] + retrieved[:1]
        zeros = {name: torch.zeros_like(encoding[name]) for name in ("last_hidden_state", "audio_embeds")}
        silent = type(encoding)(**{**encoding, **zeros})
        generated = {
            "captioner": (captioner, encoding, retrieved),
            "no captions (k=0)": (without_captions, encoding, [[] for _ in batch]),
            "no audio": (captioner, silent, retrieved),
            "another clip's captions": (captioner, encoding, others),
            "no audio, another clip's captions": (captioner, silent, others),
        }
        for system in systems:
            if system == "first retrieved caption":
                captions[system] += [hits[0]["caption"] if hits else "" for hits in retrieved]
            else:
                chosen, states, prompts = generated[system]
                captions[system] += [result.caption for result in chosen.generate(states, prompts)]
    return captions


def evaluate(captions: dict[str, list[str]], truths: Sequence[Sequence[str]], rules: Any) -> dict[str, Any]:
    """Of each system each figure with its interval: `[value, low, high]`."""
    from benchmarks.naming import naming_scores
    from recap_hf.scoring.bootstrap import bootstrap_intervals

    report = {}
    for system, texts in captions.items():
        scores = naming_scores(texts, truths, rules)
        intervals = bootstrap_intervals(scores)
        report[system] = {name: [score.corpus, *intervals[name]] for name, score in scores.items()}
    return report


def orders(captions: dict[str, list[str]], items: Sequence[Any], rules: Any) -> dict[str, tuple[str, ...]]:
    """Of each system, for mixtures: (order right of sequences with both named, both named, one named, mixtures)."""
    from benchmarks.naming import in_order

    found = {}
    for system, texts in captions.items():
        pairs = [(text, item) for text, item in zip(texts, items, strict=True) if len(item.events) == 2]
        named = [len(rules.named(text) & set(item.events)) for text, item in pairs]
        right = [in_order(text, item.events, rules) for text, item in pairs if item.sequence]
        right = [order for order in right if order is not None]
        if pairs:
            found[system] = (
                f"{sum(right)} of {len(right)}", sum(n == 2 for n in named), sum(n > 0 for n in named), len(pairs)
            )  # fmt: skip
    return found


def table(report: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    from benchmarks.naming import FIGURES
    from recap_hf.evaluation.tables import markdown_table

    rows = [
        [system, *(f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (figures[n] for n in FIGURES))]
        for system, figures in report.items()
    ]
    return markdown_table(["system", *FIGURES], rows)


if __name__ == "__main__":
    raise SystemExit(main())
