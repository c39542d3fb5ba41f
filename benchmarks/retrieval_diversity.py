"""What diverse retrieval and a score threshold bring: coverage and precision on mixtures of known sounds.

    python -m benchmarks.retrieval_diversity --sounds DIR --fold 5 --captions

Two sounds are mixed, overlapping or one after the other; of the captions that each mixture retrieves, `coverage` is
the share of its two sounds that any of them names, `precision` the share of the sounds that they name that are in it.
With `--captions` the captioner is prompted with them, and the same is said of the one caption that it makes of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from recap_cli.status import exit_status

__all__ = ["SETTINGS", "coverage_and_precision", "run", "table"]

SETTINGS: dict[str, dict[str, float]] = {
    "nearest 4": {},
    **{f"diversity {value}": {"diversity": value} for value in (0.1, 0.2, 0.3, 0.5)},
    **{f"score threshold {value}": {"score_threshold": value} for value in (0.3, 0.5, 0.7)},
    "diversity 0.2, score threshold 0.5": {"diversity": 0.2, "score_threshold": 0.5},
}


def coverage_and_precision(
    retrieved: Sequence[Sequence[str]], truths: Sequence[set[str]], named: Any
) -> dict[str, float]:
    """Means over mixtures.

    Args:
        retrieved: captions of each mixture.
        truths: the sounds in it.
        named: function from a caption to the sounds that it names.

    Returns:
        `coverage`, `precision` (over mixtures whose captions name any sound) and `captions`, the mean number of them.
    """
    coverage, precision = [], []
    for captions, truth in zip(retrieved, truths, strict=True):
        found = set().union(*(named(caption) for caption in captions))
        coverage.append(len(found & truth) / len(truth))
        if found:
            precision.append(len(found & truth) / len(found))
    return {
        "coverage": round(float(np.mean(coverage)), 4),
        "precision": round(float(np.mean(precision)), 4) if precision else 0.0,
        "captions": round(float(np.mean([len(captions) for captions in retrieved])), 2),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Coverage and precision of every setting, for each kind of mixture and for all."""
    from benchmarks.naming import NamingRules
    from benchmarks.sound_events import mixture_list, mixtures
    from recap_hf import Captioner, CaptionOptions

    captioner = Captioner.from_pretrained(args.model, device=args.device)
    store = captioner.datastore
    if store is None:
        raise ValueError("the captioner has no datastore to retrieve from")
    entries = mixture_list(args.sounds, args.fold, args.mixtures)
    items = mixtures(args.sounds, entries)
    waveforms = [item.waveform.astype(np.float32) for item in items]
    embeds = [captioner.encode([waveform]).audio_embeds.float().cpu().numpy()[0] for waveform in waveforms]
    rules = NamingRules.ours()
    kinds = {
        "all": list(range(len(items))),
        "overlap": [n for n, entry in enumerate(entries) if entry["kind"] == "overlap"],
        "sequence": [n for n, entry in enumerate(entries) if entry["kind"] == "sequence"],
    }
    result: dict[str, Any] = {"mixtures": len(items), "captions": len(store), "settings": {}}
    for name, options in SETTINGS.items():
        texts = [[hit["caption"] for hit in store.search(each[None], args.k, **options)[0]] for each in embeds]
        result["settings"][name] = {
            kind: coverage_and_precision([texts[n] for n in rows], [set(items[n].events) for n in rows], rules.named)
            for kind, rows in kinds.items()
        }
        if args.captions:
            chosen = CaptionOptions(k=args.k, **{f"retrieval_{key}": value for key, value in options.items()})
            made = [result.caption for result in captioner.with_options(chosen).caption(waveforms, batch_size=8)]
            truths = [set(item.events) for item in items]
            found = coverage_and_precision([[caption] for caption in made], truths, rules.named)
            result["settings"][name]["generated"] = found
    return result


def table(result: dict[str, Any]) -> str:
    """The settings as a table in Markdown."""
    columns = ["setting", "captions", "coverage / precision", "overlapping", "in sequence"]
    if any("generated" in found for found in result["settings"].values()):
        columns.append("of the generated caption")
    lines = [f"| {' | '.join(columns)} |", "| " + " | ".join("---" for _ in columns) + " |"]
    for name, found in result["settings"].items():
        cells = [f"{found[kind]['coverage']:.3f} / {found[kind]['precision']:.3f}" for kind in found]
        lines.append(f"| {name} | {found['all']['captions']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, or with `--format json` all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_diversity", description=__doc__)
    parser.add_argument("--sounds", required=True, metavar="DIR", help="recordings of the events, with metadata.csv")
    parser.add_argument("--fold", type=int, default=5, help="default: %(default)s, never trained on")
    parser.add_argument("--mixtures", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the embedded recap-tiny)")
    parser.add_argument("--device", help="of the model")
    parser.add_argument("--k", type=int, default=4, help="captions at most (default: %(default)s)")
    parser.add_argument(
        "--captions", action="store_true", help="caption the mixtures too, prompted with what was found"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    args = parser.parse_args(argv)
    result = run(args)
    print(json.dumps(result, indent=1) if args.format == "json" else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("python -m benchmarks.retrieval_diversity", main))
