"""`recap serve`: captions, tags and search over HTTP."""

import argparse
import functools
import os
import socket
import sys
from pathlib import Path
from typing import Any

from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, check_caption_options, load_captioner

_LOCAL = ("127.0.0.1", "::1", "localhost")
_TOKEN_VARIABLE = "RECAP_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "recap serve [OPTIONS]"
    text = "address to listen on; 0.0.0.0 for all (default: this machine alone)"
    parser.add_argument("--host", default=_LOCAL[0], help=text)
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: a free one")
    text = f"clients must send `Authorization: Bearer TOKEN` (default: the variable {_TOKEN_VARIABLE})"
    parser.add_argument("--token", default=os.environ.get(_TOKEN_VARIABLE) or None, help=text)
    parser.add_argument("--index", metavar="FOLDER", help="folder of `recap index`, for /v1/audio/search")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="recordings at once (default: 8)")
    group = parser.add_argument_group("limits")
    text = "requests that wait or are worked on; more get 429 (default: %(default)s)"
    group.add_argument("--queue", type=positive, default=128, metavar="N", help=text)
    text = "longest time for an upload and for its answer, else 408 and 504 (default: %(default)s)"
    group.add_argument("--timeout", type=positive, default=120, metavar="S", help=text)
    text = "largest upload, else 413 (default: %(default)s)"
    group.add_argument("--max-megabytes", type=positive, default=100, metavar="MB", help=text)
    text = "longest recording, else 413 (default: %(default)s)"
    group.add_argument("--max-seconds", type=positive, default=300, metavar="S", help=text)
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted.

    Raises:
        `ValueError`, `OSError`: for a model, a datastore or an index that cannot be loaded, or a port that is taken.
        `ImportError`: without FastAPI.
    """
    check_caption_options(args)
    from recap_hf.serving.app import Limits, create_app
    from recap_hf.serving.process import WorkerProcess
    from recap_hf.serving.worker import Models

    load = functools.partial(load_captioner, args)
    models = Models(load, args.index, args.batch_size, args.max_seconds)
    limits = Limits(args.max_megabytes * 1_000_000, args.timeout, args.queue, args.token)
    if args.host not in _LOCAL and args.token is None:
        _note(f"warning: everyone who reaches {args.host} may use this service: --token TOKEN refuses others")
    # Of a batch of timed-out requests the first may be the last of the one before.
    worker = WorkerProcess(models, 2 * args.timeout, _note)
    _note("loading the model ...")
    worker.start()
    try:
        _serve(args, create_app(worker, Path(args.model or "recap-tiny").name, limits))
    finally:
        worker.stop()
    return 0


def _serve(args: argparse.Namespace, app: Any) -> None:
    import uvicorn

    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # Bound here: uvicorn would end the process where the port is taken.
    with socket.create_server((args.host, args.port), family=family, backlog=2048) as bound:
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{bound.getsockname()[1]}"
        _note(f"{address}, how to use it at {address}/docs; Ctrl-C ends")
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[bound])


def _note(message: str) -> None:
    print(f"recap serve: {message}", file=sys.stderr, flush=True)
