"""`recap bench`: how fast captions come, beside the straightforward way, and what their time is spent on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recap_cli.numbers import count, positive

PARTS = ("speed", "mel", "default", "costs", "startup", "steady")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap bench`."""
    parser.add_argument(
        "part",
        nargs="?",
        choices=PARTS,
        default="speed",
        help="speed (default): clips a second against the reference path; mel: the features alone; default: captions "
        "of the embedded default in every dtype on real recordings; costs: against batch, length, beams, k and "
        "datastore; startup: the first caption; steady: memory and speed over many clips",
    )
    parser.add_argument(
        "--model", help="folder or Hub id; 'default' is the embedded one (default: the paper's sizes, random weights)"
    )
    parser.add_argument(
        "--audio", nargs="+", default=[], metavar="FILE|FOLDER", help="recordings (default: made-up waveforms)"
    )
    parser.add_argument("--captions", metavar="FILE", help="captions of the datastore (default: the model's)")
    parser.add_argument("--datastore-size", type=count, default=0, help="rows of the datastore (default: as it is)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8], help="clips a pass (default: 1 8)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="of our side (default: all that the device has)",
    )
    parser.add_argument("--clips", type=positive, help="clips a round (default: 8; for 'steady' 20000)")
    parser.add_argument("--num-beams", type=positive, default=3, help="default: %(default)s")
    parser.add_argument(
        "--new-tokens", type=count, default=20, help="of every caption; 0: as the model ends them (default: 20)"
    )
    parser.add_argument("--max-minutes", type=float, default=10.0, help="time to measure in (default: 10)")
    parser.add_argument("--threads", type=positive, help="of torch (default: one for each core)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=count, default=0, help="of weights and waveforms (default: 0)")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="default: %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write the JSON here as well")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 if float32 gave other captions than the reference path."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    report, lines = _PARTS[args.part](args)
    text = json.dumps(report, indent=2)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(text if args.format == "json" else "\n".join(lines))
    if report.get("identical_captions") is False:
        print("recap bench: float32 gave other captions than the reference path.", file=sys.stderr)
        return 1
    return 0


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options(args: argparse.Namespace) -> Any:
    import torch

    from recap_hf.assets import default_model_path
    from recap_hf.captioning import expand_inputs
    from recap_hf.speed.workload import BenchmarkOptions

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = torch.device(device).type == "cpu"
    audio = expand_inputs(args.audio)
    return BenchmarkOptions(
        model=str(default_model_path()) if args.model == "default" else args.model,
        audio=tuple(audio[: args.clips] if args.clips else audio),
        captions=args.captions,
        datastore_size=args.datastore_size,
        batch_sizes=tuple(dict.fromkeys(args.batch_sizes)),
        dtypes=tuple(dict.fromkeys(args.dtypes or ("float32", "bfloat16", "int8" if on_cpu else "float16"))),
        clips=args.clips or max(8, *args.batch_sizes),
        num_beams=args.num_beams,
        new_tokens=args.new_tokens,
        max_minutes=args.max_minutes,
        device=device,
        seed=args.seed,
    )


def _speed(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from recap_hf.speed.benchmark import run_benchmark
    from recap_hf.speed.tables import format_benchmark

    report = run_benchmark(_options(args), _note)
    return report, format_benchmark(report)


def _default(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from dataclasses import replace

    from recap_hf.assets import default_model_path
    from recap_hf.speed.default_model import run_default
    from recap_hf.speed.tables import format_rows

    options = _options(args)
    report = run_default(replace(options, model=options.model or str(default_model_path())), _note)
    title = f"{report['clips']} recordings, {report['num_beams']} beams; captions against the reference path's"
    return report, format_rows(report["settings"], title)


def _of_default(args: argparse.Namespace, name: str, title: str) -> tuple[dict[str, Any], list[str]]:
    """A part that measures the embedded default unless another model is named."""
    from dataclasses import replace

    from recap_hf.assets import default_model_path
    from recap_hf.speed import parts
    from recap_hf.speed.tables import format_rows

    options = _options(args)
    options = replace(options, model=options.model or str(default_model_path()))
    report = getattr(parts, f"run_{name}")(options, _note)
    return report, format_rows(report["settings"], title)


def _mel(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    return _of_default(args, "mel", "features, milliseconds a clip: ClapFeatureExtractor and ours")


def _costs(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    title = "milliseconds a clip; batch 8 (or --batch-sizes), 10 s, 3 beams, one reading, k = 4 but for"
    return _of_default(args, "costs", title)


def _steady(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    args.clips = args.clips or 20_000
    report, lines = _of_default(args, "steady", "clips of one second, a row for every 500")
    summary = f"memory from the second row to the last: {report['memory_growth_mb']:+.1f} MB"
    return report, [*lines, summary]


def _startup(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from recap_hf.assets import examples_path
    from recap_hf.speed.parts import run_startup
    from recap_hf.speed.tables import format_rows

    report = run_startup(args.audio[0] if args.audio else str(examples_path() / "sea.flac"))
    title = (
        f"recap caption of one recording: {report['seconds']:.2f} s; with plain imports and from_pretrained: "
        f"{report['usual_seconds']:.2f} s"
    )
    return report, format_rows(report["settings"], title)


_PARTS = {
    "speed": _speed,
    "mel": _mel,
    "default": _default,
    "costs": _costs,
    "startup": _startup,
    "steady": _steady,
}
