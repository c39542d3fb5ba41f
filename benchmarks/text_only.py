"""Captioners without paired audio beside one with it, on the same CLAP and GPT-2: which sound events they name.

    python -m benchmarks.text_only --data DATA --datastore captions.txt --work DIR [--parts train evaluate transfer]

train: on text alone without and with noise, and the latter on 200 recordings (with captions by rules) as well; a run
that is there is continued or kept. evaluate: named events of single sounds, of ESC-50 fold 4 and of mixtures, with
95 % intervals (bootstrap over clips), each without audio as well, beside the untrained assembly, the nearest caption
and tags in a sentence. transfer: instruments, with captions of other sounds alone and with those of instruments alone.
`DATA` holds `recordings/`, `sound_events/`, `captions/audiocaps_train.csv` and `keywords_esc50.json`; the captioner
with audio is the embedded default, whose CLAP and GPT-2 all others have.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("train", "evaluate", "transfer")
INSTRUMENTS = ("violin", "flute", "cello", "clarinet", "saxophone", "double_bass", "acoustic_guitar")
# Of the captioner with audio (recipes/recap_tiny/make.sh), where it applies.
RECIPE = {
    "num_retrieved": 5,
    "draw_from": 8,
    "vary_num_retrieved": True,
    "retrieval_diversity": 0.7,
    "audio_dropout": 0.1,
    "prompt_dropout": 0.1,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "resume": True,
    "save_steps": 100,
    "device": "cpu",
}
RECORDINGS, PAIRS = 200, 60


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--datastore", required=True, metavar="FILE", help="captions to retrieve from")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="trained captioners and figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="of a training on text (default: 1500)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of a training on text (default: 64)")
    parser.add_argument("--max-captions", type=int, default=0, metavar="N", help="to train on (default: all)")
    parser.add_argument("--temperature", type=float, default=0.05, metavar="X", help="of the projection (0.05)")
    parser.add_argument("--mixtures", type=int, default=300, metavar="N", help="of two sounds (default: 300)")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        {"train": train_all, "evaluate": evaluate_all, "transfer": transfer}[part](args)
    return 0


def write_recordings(data: Path, folder: Path, count: int) -> None:
    """An `audiofolder` of labelled recordings of the training folds, with captions by the recipe's grammar."""
    from recipes.recap_tiny.grammar import describe
    from recipes.recap_tiny.recordings import labelled_recordings

    rows = [row for row in labelled_recordings(data, (1, 2, 3)) if row.label]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "clip_id", "caption_1", "caption_2"))
        for number in rng.permutation(len(rows))[:count]:
            captions = [describe([rows[number].label], rng) for _ in range(2)]
            table.writerow((str(Path(rows[number].path).resolve()), rows[number].clip_id, *captions))


def train_all(args: argparse.Namespace) -> None:
    """Trains what is not trained yet."""
    from recap_hf.training.run import train
    from recap_hf.training.tasks.captioner import CaptionerTrainingConfig

    def run(name: str, **changes: Any) -> None:
        folder = args.work / name
        if (folder / "report.json").exists():
            return
        shared = {"output_dir": str(folder), "feature_cache": str(args.work / "cache"), "validation_split": "none"}
        report = train(CaptionerTrainingConfig(**RECIPE | shared | changes).validate())
        print(f"{name}: {report['steps']} steps, {report['seconds']['training']} s", flush=True)

    for name, count in (("recordings", RECORDINGS), ("pairs", PAIRS)):
        write_recordings(args.data, args.work / name, count)
    text = {"text_only": [args.datastore, str(args.data / "captions" / "audiocaps_train.csv")]}
    text |= {"datastore": [args.datastore], "max_train_clips": args.max_captions}
    text |= {"batch_size": args.batch_size, "max_steps": args.steps}
    run("no-noise", **text, embedding_noise=0.0)
    run("noise", **text, gap_pairs=str(args.work / "pairs"))
    few = {"dataset": ["audiofolder"], "data_dir": [str(args.work / "recordings")], "datastore": [args.datastore]}
    run("fine-tuned", **few, model=str(args.work / "noise"), batch_size=32, num_train_epochs=8, learning_rate=3e-4)


def captioners(args: argparse.Namespace) -> dict[str, Any]:
    """The captioners that are compared, by name, all with the retrieval of the one with audio, and its decoding."""
    from recap_hf import Captioner, CaptionOptions
    from recap_hf.conversion.untrained import assemble
    from recap_hf.modeling.options_recap import DECODING, RERANKING

    with_audio = Captioner.from_pretrained(device="cpu")
    retrieval, decoding = with_audio.processor.retrieval_options, with_audio.generation_config()
    chosen = {name: getattr(decoding, name, None) for name in CaptionOptions.names(DECODING, RERANKING)}
    options = retrieval.merged_with(CaptionOptions(**chosen))
    found = {"with audio": with_audio}
    for name, folder in (
        ("text only, no noise", "no-noise"),
        ("text only", "noise"),
        ("text only and 200 recordings", "fine-tuned"),
    ):
        if (args.work / folder / "report.json").exists():
            found[name] = Captioner.from_pretrained(args.work / folder, device="cpu", options=options)
    if "text only" in found:
        projected = CaptionOptions(projection_temperature=args.temperature)
        found["text only, projected"] = found["text only"].with_options(projected)
    if not (args.work / "untrained").exists():
        assemble("embedded", "embedded", args.datastore, args.work / "untrained", k=5)
    found["untrained"] = Captioner.from_pretrained(args.work / "untrained", device="cpu", options=retrieval)
    return found


def test_sets(args: argparse.Namespace) -> dict[str, tuple[list[Any], Any]]:
    """Items and naming rules of each test set."""
    from benchmarks.naming import NamingRules
    from benchmarks.sound_events import mixture_list, mixtures, singles

    events, entries = args.data / "sound_events", mixture_list(args.data / "sound_events", 5, args.mixtures)
    rules = NamingRules.ours()
    esc = NamingRules.read(args.data / "keywords_esc50.json")
    return {
        "single sounds": (singles(events, 5), rules),
        "ESC-50": (singles(args.data / "recordings", 4), esc),
        "mixtures": (mixtures(events, entries), rules),
    }


def captions_of(captioner: Any, items: Sequence[Any], *systems: str) -> dict[str, list[str]]:
    """Captions of each item by systems of `benchmarks.named_events`."""
    from benchmarks.named_events import caption_items

    return caption_items(captioner, [item.waveform for item in items], 8, systems)


def tag_sentences(captioner: Any, items: Sequence[Any]) -> list[str]:
    """The tag template of `recap evaluate`."""
    from benchmarks.sound_events import SAMPLING_RATE
    from recap_hf.evaluation import Systems
    from recap_hf.modeling.audio_recap import resample

    systems, rate = Systems(captioner), captioner.sampling_rate
    names = systems.check(["tag_template"])
    waveforms = [resample(item.waveform.astype(np.float32), SAMPLING_RATE, rate) for item in items]
    found = [systems.caption([wave], [str(row)], [[]], names)["tag_template"][0] for row, wave in enumerate(waveforms)]
    return [result.caption for result in found]


def evaluate_all(args: argparse.Namespace) -> None:
    """Prints the table of F1, and what text only reaches of the captioner with audio and beyond the assembly."""
    from benchmarks.naming import naming_scores
    from recap_hf.evaluation.tables import markdown_table
    from recap_hf.scoring.bootstrap import bootstrap_intervals, paired_bootstrap

    compared, sets, scores, texts = captioners(args), test_sets(args), {}, {}
    for test, (items, rules) in sets.items():
        captions = {}
        for name, captioner in compared.items():
            found = captions_of(captioner, items, "captioner", "no audio", "first retrieved caption")
            captions |= {name: found["captioner"], f"{name}, no audio": found["no audio"]}
            if name == "with audio":
                captions["nearest caption"] = found["first retrieved caption"]
        captions["tag template"] = tag_sentences(compared["with audio"], items)
        truths = [item.events for item in items]
        scores[test] = {name: naming_scores(found, truths, rules) for name, found in captions.items()}
        texts[test] = [
            {"name": item.name, "events": item.events, **{name: found[row] for name, found in captions.items()}}
            for row, item in enumerate(items)
        ]
        print(f"{test}: {len(items)} clips", flush=True)

    def cell(test: str, name: str) -> str:
        low, high = bootstrap_intervals(scores[test][name])["F1"]
        return f"{scores[test][name]['F1'].corpus:.3f} [{low:.3f}, {high:.3f}]"

    names = list(next(iter(scores.values())))
    rows = [[name, *(cell(test, name) for test in sets)] for name in names]
    print(markdown_table(["F1 of named events", *sets], rows))
    for name in [name for name in names if name.startswith("text only") and not name.endswith("no audio")]:
        for test in sets:
            share = scores[test][name]["F1"].corpus / max(scores[test]["with audio"]["F1"].corpus, 1e-9)
            gain = paired_bootstrap(scores[test]["untrained"], scores[test][name])["F1"]
            minus = f"minus untrained {gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
            print(f"{name}, {test}: {share:.2f} of the captioner with audio; {minus}")
    (args.work / "captions.json").write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")


def transfer(args: argparse.Namespace) -> None:
    """F1 on recordings of instruments with captions of other sounds alone, and with those of instruments alone."""
    from benchmarks.naming import naming_scores
    from recap_hf import read_captions
    from recap_hf.scoring.bootstrap import bootstrap_intervals

    items, rules = test_sets(args)["single sounds"]
    items = [item for item in items if item.events[0] in INSTRUMENTS]
    lines = [record["caption"] for record in read_captions(args.datastore)]
    about = [bool(rules.named(line) & set(INSTRUMENTS)) for line in lines]
    stores = {
        "captions of other sounds": [line for line, own in zip(lines, about, strict=True) if not own],
        "captions of instruments": [line for line, own in zip(lines, about, strict=True) if own],
    }
    compared = captioners(args)
    for name in ("with audio", "text only", "text only, projected"):
        for store, captions in stores.items():
            found = captions_of(compared[name].with_datastore(captions), items, "captioner")["captioner"]
            scores = naming_scores(found, [item.events for item in items], rules)
            low, high = bootstrap_intervals(scores)["F1"]
            print(f"{name}, {len(captions)} {store}: F1 {scores['F1'].corpus:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
