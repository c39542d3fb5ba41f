"""`recap evaluate`: caption a split, score it, and compare the captioner with its baselines."""

from __future__ import annotations

import argparse
import sys

from recap_cli.options import add_caption_options
from recap_cli.score import add_metric_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap evaluate`."""
    _add_model_arguments(parser)
    _add_data_arguments(parser)
    add_caption_options(parser)
    parser.add_argument(
        "--output-dir", required=True, metavar="DIR", help="predictions and scores; goes on where it was"
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh in a folder with other predictions")
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="recap, no_retrieval, random_captions, audio_hidden, audio_only, first_retrieved (default: all)",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--no-scores", action="store_true", help="caption only")
    scoring.add_argument("--metrics", nargs="+", metavar="METRIC", help="bleu, meteor, rouge_l, cider_d, spice, fense")
    scoring.add_argument("--training-captions", metavar="FILE", help="to report the share of novel captions")
    scoring.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap (default 2000)")
    add_metric_model_arguments(scoring)
    scoring.add_argument("--clap-score-model", metavar="NAME", help="CLAPScore by this CLAP, not the captioner's own")
    scoring.set_defaults(pretokenized=False)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("captioner")
    model.add_argument("--model", metavar="NAME", help="checkpoint folder or Hub id (default: the embedded one)")
    model.add_argument("--datastore", metavar="NAME", help="folder, Hub id or file of captions, or none")
    model.add_argument("--exclude-references", action="store_true", help="never retrieve a text equal to a reference")
    model.add_argument("--batch-size", type=int, default=16, help="clips captioned together (default 16)")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")
    model.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    model.add_argument("--seed", type=int, default=0, help="of random captions and bootstraps (default 0)")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("clips")
    data.add_argument("--dataset", required=True, help="clotho, audiocaps, recap, wavcaps, audiofolder or a Hub id")
    data.add_argument("--data-dir", metavar="DIR", help="folder of the dataset")
    data.add_argument("--audio-dir", metavar="DIR", help="folder of the audio, where it is apart from the captions")
    data.add_argument("--columns", nargs="+", metavar="OURS=THEIRS", help="columns under other names")
    data.add_argument("--split", default="test", help="default: test")
    data.add_argument("--allow-missing", action="store_true", help="go on without clips that have no recording")
    data.add_argument("--clip-list", metavar="FILE", help="only the clips named in this text or CSV file")
    data.add_argument("--youtube-ids", action="store_true", help="compare clip names by YouTube id alone")
    data.add_argument("--max-clips", type=int, default=0, metavar="N", help="only the first N clips")


def run(args: argparse.Namespace) -> int:
    """Captions, scores, prints the tables."""
    from recap_cli.score import scoring_options
    from recap_hf.evaluation import caption_clips, load_captioner, load_test_clips, result_tables, score_folder
    from recap_hf.evaluation.run import report_progress
    from recap_hf.modeling.options_recap import CaptionOptions

    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; expected at least 1")
    # What would fail after hours of captioning fails before.
    scoring = None if args.no_scores else scoring_options(args)
    if scoring:
        _check_scoring(scoring)
    clips = load_test_clips(
        args.dataset,
        args.data_dir,
        split=args.split,
        audio_dir=args.audio_dir,
        columns=_columns(args.columns),
        allow_missing=args.allow_missing,
        clip_list=args.clip_list,
        youtube_ids=args.youtube_ids,
        max_clips=args.max_clips,
    )
    options = CaptionOptions.from_args(args)
    captioner = load_captioner(
        args.model,
        args.datastore,
        device=args.device,
        dtype=args.dtype,
        k=options.k,
        generation={name: value for name, value in options.to_dict().items() if name != "k"},
        seed=args.seed,
        exclude_references=args.exclude_references,
    )
    scorer = _load_clap_scorer(args, captioner) if scoring else None
    folder = caption_clips(
        captioner,
        clips,
        args.output_dir,
        systems=args.systems,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        names={"model": args.model or "embedded default", "datastore": args.datastore or "the checkpoint's"},
        progress=report_progress,
    )
    if scoring is None:
        print(f"wrote {folder.path}", file=sys.stderr)
        return 0
    extra = _clap_scores(scorer, clips, folder, args.batch_size) if scorer else None
    result = score_folder(
        folder, clips.name, resamples=args.resamples, seed=args.seed, notes=clips.notes, extra_scores=extra, **scoring
    )
    tables = result_tables(result)
    print(tables, end="")
    (folder.path / "tables.md").write_text(tables, encoding="utf-8")
    print(f"wrote {folder.path}", file=sys.stderr)
    return 0


def _load_clap_scorer(args: argparse.Namespace, captioner):
    if not args.clap_score_model:
        return None
    from recap_hf.evaluation.clap_score import ClapScorer

    scorer = ClapScorer(args.clap_score_model, args.device)
    scorer.refuse_own(captioner)
    return scorer


def _clap_scores(scorer, clips, folder, batch_size: int) -> dict:
    from recap_hf.evaluation.clap_score import clap_scores
    from recap_hf.scoring import read_predictions

    captions = {name: read_predictions(folder.predictions_file(name)).predictions for name in folder.systems}
    return {name: {"clap_score": values} for name, values in clap_scores(scorer, clips, captions, batch_size).items()}


def _check_scoring(options: dict) -> None:
    from recap_hf.scoring.java import find_java, require_pycocoevalcap

    require_pycocoevalcap()
    find_java(options["java"])


def _columns(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    wrong = next((pair for pair in pairs if "=" not in pair), None)
    if wrong is not None:
        raise ValueError(f"--columns takes pairs such as caption=text; got {wrong!r}")
    return dict(pair.split("=", 1) for pair in pairs)
