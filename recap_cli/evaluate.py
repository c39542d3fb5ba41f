"""`recap evaluate`: caption a split, score it, and compare the captioner with its baselines."""

import argparse
import sys
from typing import Any

from recap_cli.numbers import count, positive
from recap_cli.options import add_caption_options, add_threads, caption_values, set_threads
from recap_cli.score import add_metric_arguments, scoring_options, scoring_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("captioner").add_argument
    add("--model", metavar="NAME", help="checkpoint folder or Hub id (default: the embedded one)")
    add("--datastore", metavar="NAME", help="folder, Hub id or file of captions, or none")
    add("--exclude-references", action="store_true", help="never retrieve a text equal to a reference")
    add("--batch-size", type=positive, default=16, help="clips captioned together (default 16)")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    add("--seed", type=int, default=0, help="of random captions and bootstraps (default 0)")
    add = parser.add_argument_group("clips").add_argument
    add("--dataset", required=True, help="clotho, audiocaps, recap, wavcaps, audiofolder or a Hub id")
    add("--data-dir", metavar="DIR", help="folder of the dataset")
    add("--audio-dir", metavar="DIR", help="folder of the audio, if it is not that of the captions")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="columns under other names")
    add("--split", default="test", help="default: test")
    add("--allow-missing", action="store_true", help="leave out clips without a recording")
    add("--clip-list", metavar="FILE", help="only the clips that this text or CSV file names")
    add("--youtube-ids", action="store_true", help="compare clip names by YouTube id alone")
    add("--max-clips", type=count, default=0, metavar="N", help="only the first N clips")
    text = "predictions and scores; resumed if present"
    parser.add_argument("--output-dir", required=True, metavar="DIR", help=text)
    parser.add_argument("--overwrite", action="store_true", help="delete predictions of another run in the folder")
    text = "recap, no_captions, random_captions, no_audio, audio_only, first_retrieved (default: these), untrained, "
    text += "tag_template"
    parser.add_argument("--systems", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--no-scores", action="store_true", help="caption only")
    parser.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap (default 2000)")
    add_metric_arguments(parser)
    parser.add_argument("--clap-score-model", metavar="NAME", help="CLAPScore by this CLAP, not the captioner's own")
    add_threads(parser)
    add_caption_options(parser)


def run(args: argparse.Namespace) -> int:
    """Captions, scores, prints the tables."""
    from recap_hf.data.schema import column_mapping
    from recap_hf.evaluation import Systems, load_captioner, load_test_clips, result_tables
    from recap_hf.evaluation.runner import caption_clips, score_folder
    from recap_hf.files import write_text
    from recap_hf.modeling.options_recap import CaptionOptions

    # Whatever would fail after hours of captioning fails now.
    scoring = None if args.no_scores else scoring_options(args)
    with scoring_tools(args) as tools:
        if scoring:
            tools.check()
        selection = ("split", "audio_dir", "allow_missing", "clip_list", "youtube_ids", "max_clips")
        chosen = {name: getattr(args, name) for name in selection}
        clips = load_test_clips(args.dataset, args.data_dir, columns=column_mapping(args.columns), **chosen)
        options = CaptionOptions(**caption_values(args))
        captioner = load_captioner(args.model, args.datastore, options, device=args.device, dtype=args.dtype)
        set_threads(args, captioner.model)
        clap_score = _clap_scorer(args, captioner) if scoring else None
        systems = Systems(captioner, args.seed, args.exclude_references)
        sources = {"model": args.model or "embedded default", "datastore": args.datastore or "the checkpoint's"}
        how = {"names": args.systems, "batch_size": args.batch_size, "overwrite": args.overwrite}
        folder = caption_clips(systems, clips, args.output_dir, sources=sources, progress=_report_progress, **how)
        if scoring:
            notes = clips.notes + ([f"CLAPScore by {args.clap_score_model}"] if clap_score else [])
            given = clap_score(clips, folder) if clap_score else None
            draws = {"resamples": args.resamples, "seed": args.seed}
            result = score_folder(folder, clips.name, **draws, notes=notes, tools=tools, given=given, **scoring)
            tables = result_tables(result)
            print(tables, end="")
            write_text(folder.path / "tables.md", tables)
    print(f"wrote {folder.path}", file=sys.stderr)
    return 0


def _report_progress(done: int, total: int) -> None:
    # One line, rewritten on a terminal.
    end = "\n" if done == total or not sys.stderr.isatty() else "\r"
    print(f"captioned {done} of {total} clips", end=end, file=sys.stderr, flush=True)


def _clap_scorer(args: argparse.Namespace, captioner: Any) -> Any:
    """From clips and predictions to CLAPScore by system, or None."""
    if not args.clap_score_model:
        return None
    from recap_hf.evaluation.clap_score import ClapScorer, clap_scores
    from recap_hf.evaluation.runner import read_predictions

    scorer = ClapScorer(args.clap_score_model, args.device)
    scorer.refuse_own(captioner)

    def score(clips: Any, folder: Any) -> dict[str, dict[str, Any]]:
        rows = {name: read_predictions(folder.path, name) for name in folder.systems}
        captions = {name: [row["prediction"] for row in own] for name, own in rows.items()}
        scores = clap_scores(scorer, clips, captions, args.batch_size)
        return {name: {"clap_score": values} for name, values in scores.items()}

    return score
