"""`recap compare`: two systems on the clips that both captioned, with paired bootstrap intervals."""

import argparse
import sys

from recap_cli import score
from recap_cli.files import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="predictions of the system to compare with")
    parser.add_argument("second", metavar="B", help="predictions of the other system; differences are B minus A")
    score.add_table_arguments(parser)
    bootstrap = parser.add_argument_group("bootstrap")
    bootstrap.add_argument("--resamples", type=int, default=10_000, help="draws of the clips (default 10000)")
    bootstrap.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    bootstrap.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the comparison")


def run(args: argparse.Namespace) -> int:
    """Prints the table of differences and writes the JSON."""
    from recap_hf.files import write_json
    from recap_hf.scoring import compare_tables

    check_output(args.output, args.first, args.second, args.clip_list, args.training_captions, suffix=".json")
    first, _, notes = score.load_rows(args, args.first)
    second, clip_list_name, further = score.load_rows(args, args.second)
    options = {name: getattr(args, name) for name in ("resamples", "confidence", "seed", "pretokenized")}
    options |= {"given": score.given_columns(args), "clip_list_name": clip_list_name, **score.scoring_options(args)}
    with score.scoring_tools(args) as tools:
        result = compare_tables(first, second, youtube=args.youtube_ids, tools=tools, **options)
    print(f"{'':10} {'A':>8} {'B':>8} {'B - A':>9}  {100 * args.confidence:g}% interval")
    for key, row in result["metrics"].items():
        verdict = "" if row["excludes_zero"] else "  (includes 0)"
        print(
            f"{key:10} {row['first']:8.4f} {row['second']:8.4f} {row['difference']:+9.4f}  "
            f"[{row['low']:+.4f}, {row['high']:+.4f}]{verdict}"
        )
    score.print_remarks(result["skipped"], list(dict.fromkeys(notes + further + result["notes"])))
    print(
        f"{result['num_clips']} clips in both (list {result['clip_list_sha256'][:12]}), {result['only_in_first']} "
        f"only in A, {result['only_in_second']} only in B; {args.resamples} resamples",
        file=sys.stderr,
    )
    if args.output:
        write_json(args.output, {"first": args.first, "second": args.second, **result})
        print(f"wrote {args.output}", file=sys.stderr)
    return 0
