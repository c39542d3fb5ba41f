"""The console script `recap`: one table of commands, each imported only when it is called.

It is a package of its own, beside recap_hf: arguments are parsed before `import recap_hf` imports torch and
transformers, which takes seconds. So nothing here or at the head of a command's module imports them; `run` does.
"""

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Sequence
from importlib import metadata

from recap_cli.status import EXIT_USAGE, exit_status

# The line of help of each command. Its module `recap_cli.NAME` has `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "caption": "generate a caption for each recording",
    "tag": "name the sounds in each recording, with probabilities and times",
    "index": "make or update the sound index of folders of recordings",
    "search": "find recordings and places in them by words or by sound, and near-duplicates",
    "timeline": "caption what happens when, in recordings of any length",
    "live": "caption sound as it arrives, from a pipe or a microphone",
    "explain": "show which regions of a recording each word of its caption depends on",
    "datastore": "build, search and edit the captions to retrieve from",
    "assemble": "put a CLAP, a GPT-2 and captions together: a captioner without training",
    "train": "train a captioner on recordings and captions, or on captions alone",
    "pretrain": "train the parts of a captioner: a CLAP, a GPT-2",
    "score": "score predicted captions against their references",
    "compare": "compare two systems on the clips that both captioned",
    "evaluate": "caption a test split and score it beside its baselines",
    "grid": "the paper's tables: train, evaluate and print them in one run",
    "report": "write an evaluation as a web page: tables, plots, clips to listen to",
    "convert": "convert weights of other layouts, and back",
    "export": "write a captioner as ONNX graphs",
    "onnx": "caption recordings with an exported captioner, without torch",
    "push": "push a checkpoint or a datastore to the Hugging Face Hub",
    "serve": "answer other programs over HTTP: captions, tags, search",
    "demo": "serve a web page: record or upload a sound, change the captions to retrieve from",
}


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that also accepts `--snake_case` spellings of its `--kebab-case` flags."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        # After a bare `--` come no flags, but names.
        end = args.index("--") if "--" in args else len(args)
        args = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), arg) for arg in args[:end]] + args[end:]
        return super().parse_known_args(args, namespace)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of `recap`. Only `command`'s own module is imported; the others show their line of help."""
    parser = _Parser(prog="recap", description="Retrieval-augmented audio captioning.")
    parser.add_argument("--version", action="version", version=f"recap_hf {metadata.version('recap-hf')}")
    # Room for the longest flags beside their help.
    room = functools.partial(argparse.HelpFormatter, max_help_position=34)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, text in COMMANDS.items():
        about = text[0].upper() + text[1:] + "."
        subparser = subparsers.add_parser(name, help=text, description=about, formatter_class=room)
        if name == command:
            loaded = importlib.import_module(f"recap_cli.{name}")
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
    # What a command starts again in other processes.
    args.argv = argv
    return exit_status(f"recap {args.command}", lambda: args.run(args))
