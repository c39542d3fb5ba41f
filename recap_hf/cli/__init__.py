"""The `recap` command: one table of sub-commands, each imported only when it is called.

`recap --help` must answer at once, so nothing here imports torch or transformers; a sub-command's module does so
inside its `run`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from recap_hf.cli.status import EXIT_USAGE, exit_status
from recap_hf.version import __version__

# name: (module with `add_arguments(parser)` and `run(args) -> int`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "caption": ("recap_hf.cli.caption", "describe recordings in a sentence"),
    "live": ("recap_hf.cli.live", "describe sound while it comes in, from a pipe or a microphone"),
    "explain": ("recap_hf.cli.explain", "show where in a recording each word of its caption comes from"),
    "datastore": ("recap_hf.cli.datastore", "build, search and edit the captions to retrieve from"),
    "train": ("recap_hf.cli.train", "train a captioner on recordings and captions"),
    "pretrain": ("recap_hf.cli.pretrain", "train the bases of a captioner: a CLAP, a GPT-2"),
    "bench": ("recap_hf.cli.bench", "time captions beside the straightforward way, stage by stage"),
    "bench-training": ("recap_hf.cli.bench_training", "time the training step beside the authors' way"),
    "score": ("recap_hf.cli.score", "score predicted captions against their references"),
    "compare": ("recap_hf.cli.compare", "compare two systems on the clips that both captioned"),
    "evaluate": ("recap_hf.cli.evaluate", "caption a test split and score it beside its baselines"),
    "grid": ("recap_hf.cli.grid", "the paper's tables: train, evaluate and print them in one go"),
    "report": ("recap_hf.cli.report", "a page about an evaluation: tables, plots, clips to listen to"),
    "convert": ("recap_hf.cli.convert", "bring weights of other layouts in, and back"),
    "export": ("recap_hf.cli.export", "write a captioner as ONNX graphs"),
    "onnx": ("recap_hf.cli.onnx", "describe recordings with an exported captioner, without torch"),
    "push": ("recap_hf.cli.push", "push a checkpoint or a datastore to the Hugging Face Hub"),
    "demo": ("recap_hf.cli.demo", "a page to play with: record or upload, and change what is looked up"),
    "tiny": ("recap_hf.cli.tiny", "make and evaluate the embedded default, recap-tiny"),
}


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that also accepts `--snake_case` spellings of its `--kebab-case` flags."""

    def parse_known_args(self, args=None, namespace=None):
        args = [self._kebab(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    @staticmethod
    def _kebab(arg: str) -> str:
        if not arg.startswith("--") or arg == "--":
            return arg
        flag, equals, value = arg.partition("=")
        return flag.replace("_", "-") + equals + value


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of `recap`. Only `command`'s own module is imported; the others show their line of help."""
    parser = _Parser(
        prog="recap", description="Describe any sound in a sentence: retrieval-augmented audio captioning."
    )
    parser.add_argument("--version", action="version", version=f"recap_hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            loaded = importlib.import_module(module)
            loaded.add_arguments(subparser)
            subparser.set_defaults(run=loaded.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `recap` with `argv` (default: the process's own) and returns the exit status.

    0: everything worked; 1: the command failed, or part of its inputs did; 2: it was called wrongly.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((arg for arg in argv if not arg.startswith("-")), None)
    parser = build_parser(command)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return EXIT_USAGE
    return exit_status(f"recap {args.command}", lambda: args.run(args))
