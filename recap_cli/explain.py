"""`recap explain`: where in a recording each word of its caption comes from, and from which retrieved captions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recap_cli.options import add_captioner_arguments, load_captioner

METHODS = ("gradient", "insertion", "occlusion", "attention")
PICTURE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_TOP_CELLS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap explain`."""
    parser.add_argument("input", metavar="FILE|URL|-", help="a recording; - reads it from standard input")
    parser.add_argument("--output", metavar="PICTURE", help=f"draw it there ({', '.join(PICTURE_SUFFIXES)})")
    parser.add_argument("--caption", help="explain this caption instead of the model's own")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="gradient",
        help="how weights are measured: see docs/explanations.md (default: %(default)s)",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the explanation as text or JSON, and draws it if asked to."""
    suffix = Path(args.output).suffix.lower() if args.output else None
    if suffix is not None and suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"--output is a picture ({', '.join(PICTURE_SUFFIXES)}), got {args.output!r}.")
    if suffix is not None and not Path(args.output).parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {Path(args.output).parent}; make it first.")
    from recap_hf.modeling.audio_recap import is_silent, load_audio

    if suffix is not None:
        # Before the work: a missing extra is to be told at once.
        from recap_hf.explanation.picture import draw_explanation, require_matplotlib

        require_matplotlib()
    waveform, rate = load_audio(sys.stdin.buffer.read() if args.input == "-" else args.input)
    if is_silent(waveform):
        raise ValueError(f"{args.input} holds no sound: it is captioned as silence without asking the model.")
    captioner = load_captioner(args)
    explanation = captioner.model.explain(
        waveform,
        captioner.processor,
        rate,
        caption=args.caption,
        method=args.method,
        **captioner.options.to_dict(),
    )
    if args.format == "json":
        print(json.dumps({"file": args.input, **explanation.to_dict()}, ensure_ascii=False))
    else:
        print(format_explanation(args.input, explanation))
    if args.output:
        figure = draw_explanation(explanation, waveform, captioner.processor.feature_extractor, rate)
        figure.savefig(args.output)
        print(f"recap explain: drew {args.output}", file=sys.stderr)
    return 0


def format_explanation(name: str, explanation: Any) -> str:
    """An explanation as a few lines: each word with its strongest places, each caption with its weight."""
    lines = [f"{name}: {explanation.caption}"]
    if explanation.words:
        width = max(len(word.text) for word in explanation.words)
        lines.append(f"    {'':{width}}  audio  captions  strongest places (s, band in kHz)")
    for word in explanation.words:
        places = ", ".join(_places(word, explanation)) or "none in the audio"
        lines.append(f"    {word.text:{width}}  {word.audio_effect:+5.1f}  {word.captions_effect:+8.1f}  {places}")
    lines += [f"    {hit['weight']:.2f}  {' '.join(hit['caption'].split())}" for hit in explanation.retrieved]
    return "\n".join(lines)


def _places(word: Any, explanation: Any) -> list[str]:
    order = word.audio_map.ravel().argsort()[::-1][:_TOP_CELLS]
    bins = word.audio_map.shape[1]
    times, bands = explanation.time_edges_s, explanation.band_edges_hz
    places = []
    for index in order:
        band, cell = divmod(int(index), bins)
        share = word.audio_map[band, cell]
        if share > 0:
            low, high = bands[band] / 1000, bands[band + 1] / 1000
            places.append(f"{times[cell]:.1f}-{times[cell + 1]:.1f} s {low:.1f}-{high:.1f} kHz {share:.0%}")
    return places
