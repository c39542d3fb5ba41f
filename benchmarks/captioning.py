"""Speed of captioning beside stock transformers, and where the time is spent.

    python -m benchmarks.captioning [speed|default|beside|mel|costs|startup|steady] [--help]

speed (default): clips a second of the paper's sizes with random weights, or of --model. default: the embedded default
on --audio. beside: --model beside --beside on --audio, each as it ships: clips a second, and the first caption in a
fresh process. mel: features alone. costs: milliseconds a clip by batch, length, beams, k and datastore. startup: the
first caption in a fresh process. steady: memory and speed over many clips.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recap_cli.numbers import count, positive
from recap_cli.options import DTYPES

PARTS = ("speed", "default", "beside", "mel", "costs", "startup", "steady")
_TITLES = {
    "mel": "features, milliseconds a clip",
    "costs": "milliseconds a clip",
    "beside": "medians of rounds in turn",
    "startup": "seconds",
    "steady": "clips of one second",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, default="speed")
    parser.add_argument("--model", help="folder or Hub id; 'default': the embedded one")
    parser.add_argument("--beside", metavar="MODEL", help="a second captioner, for 'beside'")
    parser.add_argument("--audio", nargs="+", default=[], metavar="FILE|FOLDER", help="recordings (default: sweeps)")
    parser.add_argument("--captions", metavar="FILE", help="captions of the datastore (default: the model's)")
    parser.add_argument("--datastore-size", type=count, default=0, help="rows of the datastore (default: as it is)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32"], help="default: float32")
    parser.add_argument("--clips", type=positive, help="default: 8, or all of --audio; for 'steady' 20000")
    parser.add_argument("--num-beams", type=positive, default=3, help="default: %(default)s")
    parser.add_argument(
        "--new-tokens", type=count, default=20, help="of a caption; 0: the model ends it (default: 20)"
    )
    parser.add_argument("--max-minutes", type=float, default=10.0, help="time for rounds to begin in (default: 10)")
    parser.add_argument("--threads", type=positive, help="of torch (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=count, default=0, help="of weights and waveforms (default: 0)")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="default: %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if float32 gave other captions than stock transformers."""
    args = build_parser().parse_args(argv)
    import torch
    from transformers.utils import logging

    from benchmarks import captioning_parts

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    measure = getattr(captioning_parts, f"run_{args.part}")
    report = measure(_options(args), lambda text: print(text, file=sys.stderr, flush=True))
    text = json.dumps(report, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(text if args.format == "json" else format_report(args.part, report))
    return int(report.get("identical_captions") is False)


def _options(args: argparse.Namespace) -> Any:
    import torch

    from benchmarks.captioning_workload import BenchmarkOptions
    from recap_hf.recordings import expand_inputs

    audio = expand_inputs(args.audio)
    return BenchmarkOptions(
        model=args.model,
        beside=args.beside,
        audio=tuple(audio[: args.clips] if args.clips else audio),
        captions=args.captions,
        datastore_size=args.datastore_size,
        batch_sizes=tuple(dict.fromkeys(args.batch_sizes)),
        dtypes=tuple(dict.fromkeys(args.dtypes)),
        clips=args.clips or (20_000 if args.part == "steady" else max(8, *args.batch_sizes)),
        num_beams=args.num_beams,
        new_tokens=args.new_tokens,
        max_minutes=args.max_minutes,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        seed=args.seed,
    )


def format_report(part: str, report: dict[str, Any]) -> str:
    """A report as lines for a terminal."""
    from benchmarks.machine import format_rows

    machine = report["machine"]
    lines = [f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"]
    if "reference" in report:
        same = {True: "identical captions", False: "OTHER CAPTIONS", None: "not measured"}
        lines += [
            f"stock transformers: {report['reference']:.3f} clips/s; {report['rounds']} rounds; ratio "
            f"{report['ratio']:.2f}; float32: {same[report['identical_captions']]}",
            format_rows(report["rows"]),
            format_rows(report["stages"], "milliseconds a clip"),
        ]
    else:
        lines.append(format_rows(report["rows"], _TITLES[part]))
    if "ratios" in report:
        lines += [f"{name}, times as fast as --beside: {ratio:.2f}" for name, ratio in report["ratios"].items()]
    if "memory_growth_mb" in report:
        lines.append(f"memory from the second row to the last: {report['memory_growth_mb']:+.1f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
