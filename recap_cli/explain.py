"""`recap explain`: the regions of a recording and the retrieved captions that each word of its caption depends on."""

import argparse
import json
import sys
from pathlib import Path

from recap_cli.files import check_output, standard_input
from recap_cli.options import add_captioner_arguments, check_caption_options, load_captioner

# As in recap_hf.explain, which needs torch.
METHODS = ("gradient", "insertion")
PICTURE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="RECORDING", help="file or URL; - is standard input")
    parser.add_argument("--output", metavar="PICTURE", help=f"draw the explanation ({', '.join(PICTURE_SUFFIXES)})")
    parser.add_argument("--caption", help="explain this caption instead of the model's")
    text = "insertion is more accurate and slower (default: %(default)s)"
    parser.add_argument("--method", choices=METHODS, default="gradient", help=text)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the explanation as text or JSON, and draws it if asked to."""
    check_caption_options(args)
    output = Path(args.output) if args.output else None
    if output is not None and output.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--output is a picture ({', '.join(PICTURE_SUFFIXES)}), got {args.output!r}.")
    check_output(args.output, args.input)
    from recap_hf.explain import draw_explanation, explain_caption
    from recap_hf.explain.picture import require_matplotlib
    from recap_hf.files import replacing
    from recap_hf.modeling.audio_recap import is_silent, load_audio

    if output is not None:
        # A missing extra is reported before the work.
        require_matplotlib()
    waveform, rate = load_audio(standard_input() if args.input == "-" else args.input)
    if is_silent(waveform):
        raise ValueError(f"{args.input} holds no sound: its caption is silence, without the model.")
    captioner = load_captioner(args)
    explanation = explain_caption(captioner, waveform, rate, caption=args.caption, method=args.method)
    if args.format == "json":
        print(json.dumps({"file": args.input, **explanation.to_dict()}, ensure_ascii=False))
    else:
        print(f"{args.input}: {explanation.to_text()}")
    if output is not None:
        figure = draw_explanation(explanation, waveform, captioner.processor.feature_extractor, rate)
        with replacing(output) as temporary:
            figure.savefig(temporary, format=output.suffix[1:].lower())
        print(f"recap explain: drew {args.output}", file=sys.stderr)
    return 0
