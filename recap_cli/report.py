"""`recap report`: one HTML page about an evaluation or a grid."""

import argparse
from pathlib import Path

from recap_cli.files import check_output
from recap_cli.numbers import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what recap evaluate or recap grid wrote")
    parser.add_argument("--output", metavar="FILE.html", help="default: DIR/report.html")
    parser.add_argument("--audio-dir", metavar="DIR", help="folder of the recordings, for players in the page")
    text = "best and worst clips to show (default 8)"
    parser.add_argument("--clips", type=positive, default=8, metavar="N", help=text)
    parser.add_argument("--title", default="Evaluation of a RECAP captioner", help="title of the page")


def run(args: argparse.Namespace) -> int:
    from recap_hf.evaluation.report import write_report

    inputs = [path for path in Path(args.folder).rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    check_output(args.output, *inputs, suffix=".html")
    output = args.output or Path(args.folder) / "report.html"
    print(write_report(args.folder, output, audio_dir=args.audio_dir, num_clips=args.clips, title=args.title))
    return 0
