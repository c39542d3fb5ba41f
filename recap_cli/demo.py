"""`recap demo`: a page to play with."""

import argparse
import os
import signal
import sys
import tempfile

from recap_cli.numbers import positive
from recap_cli.options import add_threads, load_captioner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the embedded recap-tiny)")
    text = "further captions to choose from: a datastore's folder or Hub id, or a file of captions; repeatable"
    repeatable = {"action": "append", "default": [], "metavar": "NAME=FOLDER"}
    parser.add_argument("--datastore", dest="datastores", **repeatable, help=text)
    parser.set_defaults(datastore=None, dtype="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add_threads(parser)
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 for all (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="ask Gradio's servers for a public address")
    parser.add_argument("--max-seconds", type=positive, default=120, help="longest recording (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=positive, default=25, help="largest upload (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted.

    Raises:
        `ValueError`: for a `--datastore` that is not NAME=FOLDER.
    """
    pairs = [text.partition("=") for text in args.datastores]
    if not all(name and source for name, _, source in pairs):
        raise ValueError(f"--datastore expects NAME=FOLDER with a name for the page, got {args.datastores}.")
    # Uploads that Gradio has not yet deleted are deleted at the end, also when SIGTERM stops the process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="recap-demo-") as folder:
        # Before Gradio is imported.
        os.environ["GRADIO_TEMP_DIR"] = folder
        from recap_hf.demo import DemoSettings, launch

        datastores = {name: source for name, _, source in pairs}
        settings = DemoSettings(args.model, datastores, args.device, args.max_seconds, args.max_megabytes)
        print("Loading the captioner ...", file=sys.stderr)
        launch(settings, args.host, args.port, args.share, load_captioner(args))
    return 0
