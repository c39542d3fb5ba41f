"""`recap demo`: the page to play with, here or as a Space."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading

from recap_cli.numbers import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap demo`."""
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the embedded recap-tiny)")
    parser.add_argument(
        "--datastore",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="further captions to choose from, by a name of your choice: a datastore's folder or Hub id, or a .txt, "
        ".csv, .json or .jsonl file of captions; may be given several times",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 for all (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="ask Gradio's servers for a public address")
    parser.add_argument("--max-seconds", type=positive, default=120, help="longest recording (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=positive, default=25, help="largest upload (default: %(default)s)")
    parser.add_argument(
        "--max-captions", type=positive, default=500, help="most captions that a visitor pastes (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-minutes",
        type=positive,
        default=30,
        help="an idle visitor's recording leaves memory after that (default: %(default)s)",
    )
    parser.add_argument(
        "--export-space", metavar="DIR", help="serve nothing: write a Hugging Face Space with these settings"
    )


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted, or writes the Space."""
    from recap_hf.demo.settings import DemoSettings, parse_datastores

    settings = DemoSettings(
        model=args.model,
        datastores=parse_datastores(args.datastore),
        device=args.device,
        max_seconds=args.max_seconds,
        max_megabytes=args.max_megabytes,
        max_captions=args.max_captions,
        keep_minutes=args.keep_minutes,
    )
    if args.export_space:
        from recap_hf.demo.space import export_space

        print(export_space(args.export_space, settings))
        return 0
    # Set before Gradio is imported. What closed tabs left there is deleted at the end, also when SIGTERM stops it.
    with tempfile.TemporaryDirectory(prefix="recap-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        from recap_hf.demo.page import launch

        print("Loading the captioner ...", file=sys.stderr)
        launch(settings, args.host, args.port, args.share, on_ready=_announce, stop=stop)
    return 0


def _announce(address: str) -> None:
    print(address, flush=True)
    print("Stop with Ctrl-C.", file=sys.stderr)
