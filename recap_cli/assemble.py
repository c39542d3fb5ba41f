"""`recap assemble`: a captioner of a CLAP, a GPT-2 and captions, without training."""

import argparse
import json
import sys

from recap_cli.numbers import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "Hub id or folder of a CLAP with its tokenizer, or of a captioner; embedded: the default's"
    parser.add_argument("--clap", required=True, metavar="NAME", help=text)
    text = "Hub id or folder of a GPT-2, or of a captioner; embedded: the default's"
    parser.add_argument("--decoder", required=True, metavar="NAME", help=text)
    text = "captions to retrieve from: a file, or a datastore that this CLAP made"
    parser.add_argument("--datastore", required=True, metavar="CAPTIONS", help=text)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--k", type=count, default=4, metavar="N", help="captions in a prompt (default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def run(args: argparse.Namespace) -> int:
    """Makes the folder, and prints what it is as JSON."""
    from recap_cli.options import be_quiet
    from recap_hf.conversion.untrained import assemble

    be_quiet()
    report = assemble(args.clap, args.decoder, args.datastore, args.output, args.k, args.overwrite)
    print(json.dumps(report, indent=2))
    hint = f"to train it without audio: recap train --model {args.output} --text-only CAPTIONS --output-dir DIR"
    print(f"untrained: CLAP chooses among retrieved and generated captions; {hint}", file=sys.stderr)
    return 0
