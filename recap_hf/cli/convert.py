"""`recap convert`: weights of other layouts into this package's, and back."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    laion = _kind(kinds, "laion-clap", "a LAION-CLAP .pt file into a folder that ClapModel.from_pretrained loads")
    laion.add_argument("source", metavar="FILE", help="LAION-CLAP checkpoint: HTSAT audio branch, RoBERTa text branch")
    laion.add_argument("out", metavar="OUT", help="folder to make")
    laion.add_argument("--tokenizer", help="folder or Hub id of RoBERTa's tokenizer (roberta-base), saved along")


def _kind(kinds: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    return parser


def run(args: argparse.Namespace) -> int:
    report = _KINDS[args.kind](args)
    print(json.dumps({"out": args.out, **report}, indent=2))
    return 0


def _laion_clap(args: argparse.Namespace) -> dict:
    from recap_hf.conversion import convert_laion_clap

    report = convert_laion_clap(args.source, args.out, tokenizer=args.tokenizer, overwrite=args.overwrite)
    reasons: dict[str, int] = {}
    for reason in report.pop("unused").values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        print(f"{count} tensors left behind ({reason})", file=sys.stderr)
    if args.tokenizer is None:
        print("no tokenizer saved: pass --tokenizer roberta-base to get a whole ClapProcessor", file=sys.stderr)
    return report


_KINDS = {"laion-clap": _laion_clap}
