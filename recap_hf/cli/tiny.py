"""`recap tiny`: make and evaluate the embedded default `recap-tiny` from a folder of sounds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .decoding import add_reading_arguments, add_rerank_arguments, decoding_options
from .numbers import positive

_STAGES = {
    "tokenizers": "train both tokenizers on the project's grammar and lexicon",
    "clap": "train the CLAP on mixtures of the sounds",
    "language-model": "train the language model on retrieval prompts of the grammar",
    "captioner": "train the cross-attention between the two, and save the checkpoint",
    "all": "all four stages in turn",
    "evaluate": "figures beside their controls on one fold",
    "transfer": "hold every event out of the captioner's training once, and give it back in the datastore",
    "examples": "synthesise the example recordings",
    "sounds": "what the ear of recap-tiny knows, and what only its vocabulary knows",
}
_STEPS = {"clap": 5600, "language-model": 5100, "captioner": 2700}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `recap tiny`."""
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, text in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == "examples":
            stage.add_argument("--output", metavar="DIR", required=True, help="folder for the recordings")
            continue
        if name == "sounds":
            stage.add_argument(
                "--datastore", metavar="FILE", help="tell it of each of these captions, as for recap caption"
            )
            _add_result_arguments(stage)
            continue
        stage.add_argument(
            "--sounds", metavar="DIR", required=name != "tokenizers", help="folder of recordings with a metadata.csv"
        )
        if name != "tokenizers":
            stage.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
        if name in ("evaluate", "transfer"):
            _add_evaluation_arguments(stage)
        if name == "evaluate":
            stage.add_argument("--model", metavar="DIR", help="checkpoint; the embedded default if not given")
            stage.add_argument("--quick", action="store_true", help="single clips alone")
            continue
        stage.add_argument("--work-dir", metavar="DIR", required=True, help="folder for checkpoints and results")
        stage.add_argument("--folds", default="1,2,3,4", help="folds to train on (default: %(default)s)")
        stage.add_argument("--steps", type=int, help=f"length of the stage; defaults: {_STEPS}")
        stage.add_argument("--learning-rate", type=float, help="peak of the schedule; the recipe's by default")
        stage.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        if name in ("tokenizers", "language-model", "transfer"):
            stage.add_argument(
                "--without-heard-words",
                action="store_true",
                help="with a language model, and its tokenizer, that never read the names of what the CLAP hears",
            )
        if name in ("clap", "all"):
            stage.add_argument(
                "--num-processes",
                type=positive,
                default=1,
                metavar="N",
                help="that share the steps of the CLAP; two of them train the same as one, sooner (default: 1)",
            )
        if name == "transfer":
            stage.add_argument("--groups", default="0,1,2,3", help="groups of events, from 0 (default: %(default)s)")
        else:
            stage.add_argument("--threads", type=int, help="threads of PyTorch; its own choice by default")
            stage.add_argument("--stop-after", type=int, metavar="STEP", help="stop there; the same command resumes")


def _add_evaluation_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--fold", type=int, default=5, help="fold to evaluate on (default: %(default)s)")
    stage.add_argument("--keywords", metavar="FILE.json", help="what counts as naming an event; our own by default")
    add_rerank_arguments(stage)
    add_reading_arguments(stage)
    _add_result_arguments(stage)
    stage.add_argument("--threads", type=int, help="threads of PyTorch; its own choice by default")


def _add_result_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    stage.add_argument("--output", metavar="FILE", help="write the result there instead of to the standard output")


def run(args: argparse.Namespace) -> int:
    """Run one stage."""
    import torch

    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    if args.stage == "evaluate":
        return _evaluate(args)
    if args.stage == "examples":
        from recap_hf.tiny.examples import write_examples

        for path in write_examples(args.output):
            print(path)
        return 0
    if args.stage == "sounds":
        return _sounds(args)
    from recap_hf.tiny.recipe import Recipe
    from recap_hf.tiny.trainer import is_main_process, own_device
    from recap_hf.training.launch import follow_parent

    follow_parent()
    heard_words, folds = not getattr(args, "without_heard_words", False), _numbers("--folds", args.folds)
    device = own_device(getattr(args, "device", None))
    recipe = Recipe(args.sounds, Path(args.work_dir), folds, args.seed, heard_words, device)
    if args.stage == "transfer":
        return _transfer(args, recipe)
    if args.stage == "all" and args.steps is not None:
        raise ValueError("--steps belongs to one stage; run the stages one by one to set the length of each")
    stages = ("tokenizers", "clap", "language-model", "captioner") if args.stage == "all" else (args.stage,)
    for stage in stages:
        if stage == "clap" and args.num_processes > 1:
            failed = _train_clap_in_processes(args)
            if failed:
                return failed
            result = recipe.folder(stage)
        else:
            steps = _STEPS.get(stage, 0) if args.steps is None else args.steps
            result = recipe.run(stage, steps, args.learning_rate, args.stop_after)
            if is_main_process():
                print(f"recap tiny {stage}: {result}", file=sys.stderr)
    if is_main_process():
        print(result)
    return 0


def _train_clap_in_processes(args: argparse.Namespace) -> int:
    """Start `recap tiny clap` as often as `--num-processes` says; the exit status."""
    import subprocess

    from recap_hf.tiny.clap import ClapRecipe
    from recap_hf.training.launch import run_processes

    batches, count, on_cpu = ClapRecipe().batches_per_step, args.num_processes, args.device == "cpu"
    if count > batches:
        raise ValueError(f"--num-processes {count}: a step has {batches} batches, one for each process at most")
    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {args.device} is one, and --num-processes {count} need one each: leave one away")
    command = ["tiny", "clap", "--sounds", args.sounds, "--work-dir", args.work_dir, "--folds", args.folds]
    command += ["--seed", str(args.seed)]
    for flag in ("steps", "learning_rate", "stop_after", "threads"):
        value = getattr(args, flag)
        command += [] if value is None else ["--" + flag.replace("_", "-"), str(value)]
    command += ["--device", "cpu"] if on_cpu else []
    return run_processes(count, command, on_cpu, args.threads or 0, stdout=subprocess.DEVNULL)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} takes numbers parted by commas, as in 1,2,3; got {text!r}") from None


def _rules(args: argparse.Namespace):
    from recap_hf.tiny.naming import NamingRules

    return NamingRules.read(args.keywords) if args.keywords else NamingRules.ours()


def _write(args: argparse.Namespace, result, as_text: str) -> int:
    text = json.dumps(result, indent=1, ensure_ascii=False) if args.format == "json" else as_text
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


def _sounds(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from recap_hf.datastore.sources import read_source
    from recap_hf.tiny.hearing import caption_knowledge, format_captions, format_sounds
    from recap_hf.tiny.lexicon import HEARD, other_sounds

    if args.datastore is None:
        lists = {"heard": {event: forms[0] for event, forms in HEARD.items()}, "only_read": list(other_sounds())}
        return _write(args, lists, format_sounds())
    captions = [record["caption"] for record in read_source(args.datastore)]
    if not captions:
        raise ValueError(f"{args.datastore} holds no captions: a .txt file has one a line")
    results = caption_knowledge(captions)
    return _write(args, [asdict(result) for result in results], format_captions(results))


def _transfer(args: argparse.Namespace, recipe) -> int:
    from recap_hf.tiny.transfer import format_transfer

    steps = _STEPS["captioner"] if args.steps is None else args.steps
    groups = _numbers("--groups", args.groups)
    result = recipe.transfer(steps, args.learning_rate, args.fold, _rules(args), groups, decoding_options(args))
    return _write(args, result, format_transfer(result))


def _evaluate(args: argparse.Namespace) -> int:
    from recap_hf.loading import load_pair
    from recap_hf.tiny.evaluation import evaluate, format_table

    # Read first: a wrong file of rules is to be told at once.
    rules = _rules(args)
    model, processor = load_pair(args.model, args.device)
    result = evaluate(
        model,
        processor,
        args.sounds,
        args.fold,
        rules,
        quick=args.quick,
        decoding=decoding_options(args),
    )
    return _write(args, result, format_table(result))
