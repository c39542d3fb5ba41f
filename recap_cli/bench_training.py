"""`recap bench-training`: the training step against the authors' way of doing it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap bench-training`."""
    parser.add_argument("captions", nargs="+", metavar="FILE", help="CSV with a column for the clip and one 'caption'")
    parser.add_argument("--tokenizer", default="", help="GPT-2's tokenizer (default: one trained on the captions)")
    parser.add_argument("--batch-size", type=int, default=32, help="captions in a step (default: 32)")
    parser.add_argument("--k", type=int, default=4, help="captions in a prompt (default: 4)")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="of our side")
    parser.add_argument("--steps", type=int, default=6, help="steps of ours to time, per setting (default: 6)")
    parser.add_argument("--reference-steps", type=int, default=2, help="steps of the reference (default: 2)")
    parser.add_argument(
        "--reference-passes",
        type=int,
        default=1,
        help="accumulate the reference's step in so many passes (17 GB in one)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: 12, as GPT-2 small)")
    parser.add_argument("--width", type=int, default=768, help="of the decoder (default: 768)")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="of the result (default: table)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON here as well")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    from recap_hf.training.benchmark import BenchmarkOptions, format_table, run_benchmark

    options = BenchmarkOptions(
        captions=tuple(args.captions),
        tokenizer=args.tokenizer,
        batch_size=args.batch_size,
        k=args.k,
        dtypes=tuple(dict.fromkeys(args.dtypes)),
        steps=args.steps,
        reference_steps=args.reference_steps,
        reference_passes=args.reference_passes,
        seed=args.seed,
        device=args.device,
        width=args.width,
        layers=args.layers,
    )
    report = run_benchmark(options, note=lambda text: print(text, file=sys.stderr, flush=True))
    text = json.dumps(report, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(text if args.format == "json" else "\n".join(format_table(report)))
    return 0
