"""`recap convert`: weights of other layouts to this package's, and back."""

import argparse
import json
import sys
from collections import Counter
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The kinds of conversion. Their arguments have the names of the parameters of the function that converts."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(name: str, text: str, function: str, *, source: str | None = None) -> Any:
        added = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(function=function)
        if source:
            added.add_argument("source", metavar="FILE" if name in ("laion-clap", "yamnet") else "FOLDER", help=source)
        added.add_argument("out", metavar="OUT", help="folder to make")
        added.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
        return added.add_argument

    text = "a LAION-CLAP .pt file to a folder that ClapModel.from_pretrained loads"
    source = "LAION-CLAP checkpoint: HTSAT audio branch, RoBERTa text branch"
    add = kind("laion-clap", text, "convert_laion_clap", source=source)
    add("--tokenizer", help="folder or Hub id of RoBERTa's tokenizer (roberta-base), saved with the model")

    text = "YAMNet's TFLite file to a small CLAP whose text tower is untrained, for `recap pretrain clap --clap`"
    add = kind("yamnet", text, "convert_yamnet", source="TFLite file of YAMNet for classification")
    text = "recordings of anything, on which the file and the folder must agree"
    add("--recordings", nargs="+", metavar="FILE", required=True, help=text)

    text = "a checkpoint folder of the RECAP authors' code to a RECAP folder"
    add = kind("recap-original", text, "convert_recap_original", source="folder with config.json and the weights")
    add(
        "--clap",
        required=True,
        help="folder or Hub id of the CLAP that its training started from (usually laion/clap-htsat-fused): its text "
        "tower and its projections, which retrieval needs, are not in the checkpoint",
    )
    add("--tokenizer", help="folder or Hub id of the decoder's tokenizer (gpt2)")
    add("--clap-tokenizer", help="folder or Hub id of CLAP's tokenizer (default: --clap)")

    add = kind("stock", "a stock ClapModel and a stock GPT-2 to a RECAP folder, not trained yet", "convert_stock")
    add("--clap", required=True, help="folder or Hub id of a ClapModel")
    add("--decoder", required=True, help="folder or Hub id of a GPT2LMHeadModel")
    add("--cross-attention", metavar="FILE", help="trained cross-attention, from `to-stock`")
    add("--reduce-factor", dest="factor", type=int, default=4, help="new layers: the decoder's width over this (4)")
    add("--seed", type=int, default=0, help="of the new layers' random weights (0)")
    add("--tokenizer", help="the decoder's tokenizer (default: beside --decoder)")
    add("--clap-tokenizer", help="CLAP's tokenizer (default: beside --clap)")

    text = "a RECAP folder to clap/, decoder/ and cross_attention.safetensors"
    add = kind("to-stock", text, "convert_to_stock", source="folder or Hub id of a RECAP model")
    add(
        "--cross-attention-inside",
        dest="inside",
        action="store_true",
        help="also write the cross-attention into decoder/, as wide as stock GPT-2 has it: same logits without this "
        "package",
    )


def run(args: argparse.Namespace) -> int:
    """Converts, and prints what was done as JSON."""
    from recap_hf import conversion

    own = ("argv", "command", "run", "kind", "function")
    given = {name: value for name, value in vars(args).items() if name not in own}
    report = getattr(conversion, args.function)(**given)
    for reason, count in Counter(report.pop("unused", {}).values()).items():
        print(f"{count} tensors are not used ({reason})", file=sys.stderr)
    if args.kind == "laion-clap" and args.tokenizer is None:
        print("no tokenizer saved: pass --tokenizer roberta-base to get a whole ClapProcessor", file=sys.stderr)
    if args.kind == "recap-original":
        print("text tower and projections are those of --clap: the checkpoint has none", file=sys.stderr)
    if report.get("trained_cross_attention") is False:
        print("the cross-attention is new: train it before you caption with it", file=sys.stderr)
    if report.get("processor") is False:
        print("no processor saved: there is no tokenizer; pass --tokenizer (and --clap-tokenizer)", file=sys.stderr)
    print(json.dumps({"out": args.out, **report}, indent=2))
    return 0
