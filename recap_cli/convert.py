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

    original = _kind(kinds, "recap-original", "a checkpoint folder of the RECAP authors' code into a RECAP folder")
    original.add_argument("source", metavar="FOLDER", help="folder with config.json and the weights")
    original.add_argument("out", metavar="OUT", help="folder to make")
    original.add_argument(
        "--clap",
        required=True,
        help="folder or Hub id of the CLAP that its training started from (laion/clap-htsat-fused, usually): its text "
        "tower and its projections, which retrieval needs, are not in the checkpoint",
    )
    original.add_argument("--tokenizer", help="folder or Hub id of the decoder's tokenizer (gpt2)")
    original.add_argument("--clap-tokenizer", help="folder or Hub id of CLAP's tokenizer (default: --clap)")

    stock = _kind(kinds, "stock", "a stock ClapModel and a stock GPT-2 into a RECAP folder, untrained in between")
    stock.add_argument("out", metavar="OUT", help="folder to make")
    stock.add_argument("--clap", required=True, help="folder or Hub id of a ClapModel")
    stock.add_argument("--decoder", required=True, help="folder or Hub id of a GPT2LMHeadModel")
    stock.add_argument("--cross-attention", metavar="FILE", help="trained layers in between, from `to-stock`")
    stock.add_argument("--reduce-factor", type=int, default=4, help="width of new layers: the decoder's by this (4)")
    stock.add_argument("--seed", type=int, default=0, help="of the new layers' random weights (0)")
    stock.add_argument("--tokenizer", help="the decoder's tokenizer (default: beside --decoder)")
    stock.add_argument("--clap-tokenizer", help="CLAP's tokenizer (default: beside --clap)")

    back = _kind(kinds, "to-stock", "a RECAP folder into clap/, decoder/ and cross_attention.safetensors")
    back.add_argument("source", metavar="FOLDER", help="folder or Hub id of a RECAP model")
    back.add_argument("out", metavar="OUT", help="folder to make")
    back.add_argument(
        "--cross-attention-inside",
        action="store_true",
        help="also write the cross-attention into decoder/, as wide as stock GPT-2 has it: same logits without this "
        "package",
    )


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


def _recap_original(args: argparse.Namespace) -> dict:
    from recap_hf.conversion import convert_recap_original

    report = convert_recap_original(
        args.source,
        args.out,
        clap=args.clap,
        tokenizer=args.tokenizer,
        clap_tokenizer=args.clap_tokenizer,
        overwrite=args.overwrite,
    )
    print("text tower and projections are those of --clap: the checkpoint has none", file=sys.stderr)
    return _tell_of_processor(report, "pass --tokenizer gpt2")


def _stock(args: argparse.Namespace) -> dict:
    from recap_hf.conversion import convert_stock

    report = convert_stock(
        args.clap,
        args.decoder,
        args.out,
        cross_attention=args.cross_attention,
        factor=args.reduce_factor,
        seed=args.seed,
        tokenizer=args.tokenizer,
        clap_tokenizer=args.clap_tokenizer,
        overwrite=args.overwrite,
    )
    if not report["trained_cross_attention"]:
        print("the cross-attention is new: train it before you caption with it", file=sys.stderr)
    return _tell_of_processor(report, "no tokenizers beside the parts; pass --tokenizer and --clap-tokenizer")


def _to_stock(args: argparse.Namespace) -> dict:
    from recap_hf.conversion import convert_to_stock

    return convert_to_stock(args.source, args.out, inside=args.cross_attention_inside, overwrite=args.overwrite)


def _tell_of_processor(report: dict, remedy: str) -> dict:
    if not report["processor"]:
        print(f"no processor saved: {remedy}", file=sys.stderr)
    return report


_KINDS = {
    "laion-clap": _laion_clap,
    "recap-original": _recap_original,
    "stock": _stock,
    "to-stock": _to_stock,
}
