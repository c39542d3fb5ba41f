"""`recap export`: a captioner for other runtimes."""

import argparse
import json
import logging
import warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    text = "ONNX graphs of audio tower and decoder, for `recap onnx` and `OnnxCaptioner`"
    onnx = formats.add_parser("onnx", help=text, description=text + ".")
    onnx.add_argument("source", metavar="FOLDER", help="folder or Hub id of a RECAP model with its processor")
    onnx.add_argument("out", metavar="OUT", help="folder to make")
    onnx.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")


def run(args: argparse.Namespace) -> int:
    from recap_hf.conversion.onnx_export import export_onnx

    # The exporter's notes on its own internals are nothing to act on; its graphs are compared with PyTorch afterwards.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    report = export_onnx(args.source, args.out, overwrite=args.overwrite)
    print(json.dumps({"out": args.out, **report}, indent=2))
    return 0
