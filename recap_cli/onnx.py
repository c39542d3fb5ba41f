"""`recap onnx`: captions from an exported model; torch need not be installed."""

import argparse
import json
import sys

from recap_cli.options import add_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="what `recap export onnx` made")
    parser.add_argument("files", metavar="FILE", nargs="+", help="recordings")
    parser.add_argument("--datastore", help="folder of another datastore (default: the exported one)")
    parser.add_argument("--k", type=int, help="captions in the prompt (default: the model's)")
    parser.add_argument("--num-beams", type=int, help="beams; 1 is greedy search (default: the model's)")
    parser.add_argument("--max-new-tokens", type=int, help="longest caption in tokens (default: the model's)")
    add_threads(parser)
    parser.add_argument("--format", choices=("text", "jsonl"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    from recap_hf.onnx_runtime import OnnxCaptioner

    captioner = OnnxCaptioner(args.folder, datastore=args.datastore, num_threads=args.threads)
    failed = 0
    for file in args.files:
        try:
            result = captioner(file, k=args.k, num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
        except (ValueError, OSError, ImportError) as error:
            failed += 1
            print(f"recap onnx: {file}: {error}", file=sys.stderr)
            continue
        if args.format == "jsonl":
            print(json.dumps({"file": file, **result}, ensure_ascii=False), flush=True)
        else:
            print(f"{file}\t{result['caption']}" if len(args.files) > 1 else result["caption"], flush=True)
    return 1 if failed else 0
