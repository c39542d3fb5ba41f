"""`recap grid`: the paper's tables in one command."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="FILE.yaml", nargs="?", help="the grid; --print-example shows the paper's")
    parser.add_argument("--output-dir", metavar="DIR", help="models, datastores, runs and tables; resumed if present")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    text = "print the tables of the finished runs, run nothing"
    parser.add_argument("--tables-only", action="store_true", help=text)
    parser.add_argument("--print-example", action="store_true", help="print the paper's grid as YAML and stop")


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates, prints the tables and the claims."""
    if args.print_example:
        from importlib.resources import files

        print(files("recap_hf.evaluation").joinpath("recipes/paper.yaml").read_text(encoding="utf-8"), end="")
        return 0
    if not args.config or not args.output_dir:
        raise ValueError("expected a grid and a folder: recap grid FILE.yaml --output-dir DIR")
    from recap_hf.evaluation.grid import Grid
    from recap_hf.evaluation.grid_config import read_grid
    from recap_hf.evaluation.grid_results import GridResults

    grid = Grid(read_grid(args.config), args.output_dir, log=lambda line: print(line, file=sys.stderr, flush=True))
    if args.dry_run:
        print(grid.plan())
        return 0
    if not args.tables_only:
        # Whatever would fail after hours of training fails now.
        grid.scoring_tools().check()
        grid.train_all()
        grid.evaluate_all()
    print(GridResults(grid).write(), end="")
    return 0
