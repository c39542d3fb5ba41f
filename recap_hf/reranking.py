"""What reranking is worth: captions with and without it on the project's fixed mixtures.

    python -m recap_hf.reranking --sounds DIR [--fold 5] [--model DIR] [--candidates 3 10]

Every row captions the same recordings with the same prompts. "one of the candidates" draws a candidate at random: what
a larger choice does by itself. Differences are paired, with 95 % bootstrap intervals over recordings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.cli.status import exit_status
from recap_hf.tiny.evaluation_sets import Item, mixture_hash, mixture_list, mixtures, singles
from recap_hf.tiny.naming import NamingRules, bootstrap, figures, outcome

_BATCH = 16
_BASELINE = "no reranking"


def encode(model: Any, processor: Any, items: Sequence[Item]) -> list[tuple[Any, Any]]:
    """Encodings and prompts of recordings, in batches: what every row of the comparison shares."""
    import torch

    rate = processor.feature_extractor.sampling_rate
    batches = []
    for start in range(0, len(items), _BATCH):
        clips = [item.waveform.astype(np.float32) for item in items[start : start + _BATCH]]
        with torch.no_grad():
            encoding = model.encode_audio(**processor(audio=clips, sampling_rate=rate, return_tensors="pt"))
        batches.append((encoding, processor.build_prompts(encoding.audio_embeds)))
        print(f"  {start + len(clips)} of {len(items)} recordings encoded", file=sys.stderr, flush=True)
    return batches


def candidate_captions(
    model: Any, processor: Any, batches: Sequence[tuple[Any, Any]], num_candidates: int, do_sample: bool, seed: int = 0
) -> tuple[list[list[str]], np.ndarray]:
    """Candidates of each recording in the order of the search, and their CLAP similarities.

    Args:
        batches: what `encode` returned.
        num_candidates: captions a recording.
        do_sample: samples instead of beams.
        seed: of the samples.

    Returns:
        `tuple`: `num_candidates` captions for each recording, and `np.ndarray` of shape
        `(recordings, num_candidates)`.
    """
    import torch

    from recap_hf.modeling.reranking_recap import candidate_options, caption_similarities

    torch.manual_seed(seed)
    options = candidate_options(num_candidates, {"do_sample": do_sample}, model.generation_config)
    captions, similarities = [], []
    for encoding, prompts in batches:
        with torch.no_grad():
            sequences = model.generate(encoder_outputs=encoding, **prompts, **options)
        found = processor.batch_decode(sequences)
        embeds = encoding.audio_embeds.repeat_interleave(num_candidates, dim=0)
        similarities.append(caption_similarities(model, processor, found, embeds).reshape(-1, num_candidates))
        captions += [found[row : row + num_candidates] for row in range(0, len(found), num_candidates)]
    print(f"  {num_candidates} {'samples' if do_sample else 'beams'} done", file=sys.stderr, flush=True)
    return captions, np.concatenate(similarities)


def compare(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    candidates: Sequence[int] = (3, 10),
    rules: NamingRules | None = None,
) -> dict[str, Any]:
    """Figures of naming with and without reranking.

    Args:
        model, processor: the captioner.
        items: recordings and their events.
        candidates: numbers of candidates to try, as beams and as samples.
        rules: what counts as naming; the project's own by default.

    Returns:
        `dict`: for each row its `figures`, `interval`s, and `difference` of F1 and recall to no reranking with
        intervals, and how often another caption than without was chosen (`changed`).
    """
    rules = rules or NamingRules.ours()
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {}
    batches = encode(model, processor, items)
    plain, _ = candidate_captions(model, processor, batches, 1, do_sample=False)
    rows[_BASELINE] = [captions[0] for captions in plain]
    for count in candidates:
        for kind in ("beams", "samples"):
            found, similarities = candidate_captions(model, processor, batches, count, do_sample=kind == "samples")
            best = similarities.argmax(axis=1)
            rows[f"nearest of {count} {kind}"] = [row[pick] for row, pick in zip(found, best, strict=True)]
            drawn = rng.integers(count, size=len(found))
            rows[f"one of the {count} {kind}"] = [row[pick] for row, pick in zip(found, drawn, strict=True)]
    outcomes = {
        name: [outcome(text, set(item.events), rules) for text, item in zip(captions, items, strict=True)]
        for name, captions in rows.items()
    }
    result: dict[str, Any] = {}
    for name, values in outcomes.items():
        result[name] = {"figures": figures(values), "interval": bootstrap(values)}
        if name != _BASELINE:
            own, reference = figures(values), figures(outcomes[_BASELINE])
            intervals = bootstrap(values, outcomes[_BASELINE])
            result[name]["difference"] = {
                key: {"value": own[key] - reference[key], "interval": intervals[key]} for key in own
            }
            result[name]["changed"] = float(
                np.mean([a != b for a, b in zip(rows[name], rows[_BASELINE], strict=True)])
            )
    return result


def format_comparison(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| captions | precision | recall | F1 [95 %] | exact set | F1 - no reranking [95 %] | "
        "recall - no reranking [95 %] | changed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result.items():
        value, (low, high) = row["figures"], row["interval"]["f1"]
        differences, changed = ["", ""], ""
        if "difference" in row:
            gains = [row["difference"][name] for name in ("f1", "recall")]
            differences = [
                f"{gain['value']:+.3f} [{gain['interval'][0]:+.3f}, {gain['interval'][1]:+.3f}]" for gain in gains
            ]
            changed = f"{row['changed']:.2f}"
        shares = f"{value['precision']:.3f} | {value['recall']:.3f} | {value['f1']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | {shares} | {value['exact_set']:.3f} | {' | '.join(differences)} | {changed} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and prints its tables."""
    parser = argparse.ArgumentParser(prog="python -m recap_hf.reranking", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sounds", metavar="DIR", required=True, help="folder of recordings with a metadata.csv")
    parser.add_argument("--model", metavar="DIR", help="captioner (default: the embedded recap-tiny)")
    parser.add_argument("--fold", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--set", choices=("mixtures", "singles"), default="mixtures", help="default: %(default)s")
    parser.add_argument("--candidates", nargs="+", type=int, default=(3, 10), help="default: 3 10")
    parser.add_argument("--limit", type=int, help="so many recordings, evenly spread over the set (default: all)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    args = parser.parse_args(argv)
    from recap_hf.loading import load_pair

    model, processor = load_pair(args.model, "cpu")
    items, heading = _items(args)
    result = compare(model, processor, items, args.candidates)
    if args.format == "json":
        print(json.dumps({"set": heading, "rows": result}, indent=1))
    else:
        print(f"{heading}\n\n{format_comparison(result)}")
    return 0


def _items(args: argparse.Namespace) -> tuple[list[Item], str]:
    def spread(entries: list) -> list:
        if args.limit is None or args.limit >= len(entries):
            return entries
        return [entries[index] for index in np.linspace(0, len(entries) - 1, args.limit).round().astype(int)]

    if args.set == "singles":
        items = spread(singles(Path(args.sounds), args.fold))
        return items, f"{len(items)} single recordings, fold {args.fold}"
    entries = mixture_list(args.sounds, args.fold)
    items = mixtures(args.sounds, spread(entries))
    return items, f"{len(items)} mixtures, fold {args.fold} (list {mixture_hash(entries)})"


if __name__ == "__main__":
    sys.exit(exit_status("python -m recap_hf.reranking", main))
