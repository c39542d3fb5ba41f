"""`recap report`: one HTML page about an evaluation or a grid."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap report`."""
    parser.add_argument("folder", metavar="DIR", help="what recap evaluate or recap grid wrote")
    parser.add_argument("--output", metavar="FILE.html", help="default: DIR/report.html")
    parser.add_argument("--audio-dir", metavar="DIR", help="folder of the recordings, for players in the page")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="best and worst clips to show (default 8)")
    parser.add_argument("--title", default="Evaluation of a RECAP captioner", help="title of the page")


def run(args: argparse.Namespace) -> int:
    """Writes the page."""
    from pathlib import Path

    from recap_hf.evaluation.report import AudioFolder, write_report

    if args.audio_dir and not Path(args.audio_dir).is_dir():
        raise FileNotFoundError(f"no folder {args.audio_dir} (--audio-dir)")
    page = write_report(
        args.folder,
        args.output or Path(args.folder) / "report.html",
        audio=AudioFolder(args.audio_dir) if args.audio_dir else None,
        num_clips=args.clips,
        title=args.title,
    )
    print(page)
    return 0
