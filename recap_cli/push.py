"""`recap push`: a checkpoint or a datastore to the Hugging Face Hub."""

import argparse
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a saved checkpoint or datastore")
    parser.add_argument("repo", metavar="REPO", help="repository, user/name; made if it does not exist")
    text = "push the datastore of the checkpoint to this dataset repository and refer to it (default: inside)"
    parser.add_argument("--datastore-repo", metavar="REPO", help=text)
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="propose the change as a pull request")
    parser.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    text = "JSON or YAML with facts for the card (default: FOLDER/card_facts.json)"
    parser.add_argument("--card-facts", metavar="FILE", help=text)
    text = "figures for the card, from `recap evaluate` (scores.json) or `recap score`; repeatable"
    parser.add_argument("--scores", action="append", default=[], metavar="[DATASET=]FILE", help=text)
    text = "replace the README.md that the repository has (default: keep it)"
    parser.add_argument("--overwrite-card", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    from recap_hf.hub import PushOptions, push_folder

    names = ("revision", "create_pr", "commit_message", "overwrite_card")
    options = PushOptions(private=args.private or None, **{name: getattr(args, name) for name in names})
    for result in push_folder(args.folder, args.repo, options, args.datastore_repo, read_facts(args)):
        if result.card_kept:
            print(f"{result.repo_id}: kept its README.md; --overwrite-card replaces it", file=sys.stderr)
        print(result.commit.pr_url or result.commit.commit_url)
    return 0


def read_facts(args: argparse.Namespace) -> Any:
    """The facts for the card: those of the file or the folder, and the figures of `--scores`."""
    from pathlib import Path

    from recap_hf.hub import CardFacts, read_scores
    from recap_hf.hub.prepare import read_facts as facts_of

    facts = CardFacts.from_file(args.card_facts) if args.card_facts else facts_of(Path(args.folder))
    for each in args.scores:
        dataset, _, file = each.rpartition("=")
        results, notes = read_scores(file, dataset or None)
        facts.results += results
        facts.result_notes += notes
    return facts
