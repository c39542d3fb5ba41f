"""`recap tag`: the sounds in recordings, with probabilities and times."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recap_cli.numbers import positive
from recap_cli.options import add_threads, be_quiet, set_threads
from recap_cli.results import Groups, Results, add_result_arguments, sources_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap tag`."""
    add_result_arguments(parser)
    parser.add_argument("--model", help="folder or Hub id of a captioner or a CLAP (default: the one in the package)")
    text = "labels to choose from, one a line (default: the classes of the CLAP's classification head)"
    parser.add_argument("--labels", metavar="FILE", help=text)
    text = "prompt around each label, such as 'the sound of {}' (default: the label)"
    parser.add_argument("--template", default="{}", help=text)
    text = "add the category of each class: AudioSet's, or UCS, the Universal Category System of sound designers"
    parser.add_argument("--categories", choices=("audioset", "ucs"), help=text)
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="tags of a recording (default: 10)")
    text = "smallest probability of a tag and of its times, 0 to 1 (default: 0.1)"
    parser.add_argument("--threshold", type=_share, default=0.1, metavar="X", help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every recording was tagged, 1 if some could not be, 2 if nothing was found to tag."""
    return _TagResults(args, "tag", "tagged").run()


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to 1, got {text!r}")
    return value


class _TagResults(Results):
    def check(self) -> None:
        args = self.args
        if args.template != "{}" and args.labels is None:
            raise ValueError("--template is a prompt around labels: give --labels FILE, too")
        if "{}" not in args.template:
            raise ValueError(f"--template must hold {{}}, the place of the label, got {args.template!r}")
        if args.categories is not None and args.labels is not None:
            raise ValueError("--categories are those of the model's classes, not of --labels: leave one of them out")
        if args.labels is not None and not Path(args.labels).is_file():
            raise ValueError(f"--labels {args.labels}: no such file; expected one with a label in each line")

    def groups(self, names: list[str]) -> Groups:
        from recap_hf.tagging import Tagger, tag_categories

        args, labels = self.args, None
        be_quiet()
        if args.labels is not None:
            try:
                lines = Path(args.labels).read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{args.labels}: expected labels in UTF-8, one a line: {error}") from error
            labels = [line.strip() for line in lines if line.strip()]
        tagger = Tagger.from_pretrained(args.model, device=args.device, labels=labels, template=args.template)
        set_threads(args, tagger.clap)
        categories = tag_categories(args.categories) if args.categories else {}
        results = tagger.tag_stream(sources_of(names), args.top, args.threshold)
        for name, (_, result) in zip(names, results, strict=True):
            yield [(name, result if isinstance(result, Exception) else _Tags(result, categories))]


@dataclass(frozen=True)
class _Tags:
    tags: list[Any]
    categories: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        return {"tags": [tag.to_dict() | self.categories.get(tag.name, {}) for tag in self.tags]}
