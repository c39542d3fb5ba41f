"""The card of recap-tiny, from what its evaluation measured: `python -m recap_hf.tiny.card MODEL EVALUATION.json`.

Writes `card_facts.json` into the checkpoint, from which `recap push` renders, and with `--output` the card itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_hf.cli.status import exit_status

from .lending import format_lent, lend
from .lexicon import HEARD, other_sounds
from .transfer import format_transfer

if TYPE_CHECKING:
    from recap_hf.hub import CardFacts, DataSource, Result, Section

__all__ = ["tiny_card_facts"]

LICENCE = "Apache-2.0"
REPOSITORY = "user/recap-tiny"
RECORDINGS = "RECORDINGS.csv"
URLS = {
    "ESC-10": "https://github.com/karolpiczak/ESC-50",
    "FSDKaggle2018": "https://zenodo.org/records/2552860",
    "FSDD": "https://github.com/Jakobovski/free-spoken-digit-dataset",
}
TEXT_PROMPTS = {
    "not_instruments_macro": "text prompts, the eleven that are no instruments",
    "all_macro": "text prompts, all 21",
}
METRICS = {"precision": "event precision", "recall": "event recall", "f1": "event F1", "exact_set": "exact event set"}
LIMITS = (
    "It has heard 21 kinds of sounds, listed above. Of anything else it can only say that it does not recognise it, "
    "or mistake it for one of these.",
    "The voices that it has heard say single digits, recorded at 8 kHz: it may miss other speech.",
    "The recordings of an instrument come from few packs: its figures vary more from instrument to instrument than "
    "the intervals show.",
    "Of two sounds at once it names 1.8 on average, and one caption of mixtures in eleven names the same sound twice. "
    "Of single sounds its encoder alone, choosing among 21 names, and its own listening without any captions are "
    "right more often than its captions (F1 0.83 and 0.81 against 0.79): about a sound that the ear knows, a prompt "
    "that names one too many does more harm than good. On mixtures its captions are better than every other row, but "
    "not by more than chance could make it against the vote of the captions and against its own listening alone, for "
    "which CLAP chooses as well.",
    "It lets no prompt mislead it much: with captions drawn at random single sounds lose 0.01 of F1, and mixtures "
    "0.05. Hiding the sound costs 0.06 and 0.17. Through a codec of low bit rate single sounds lose 0.05.",
    "With a datastore of your own it takes its words from there, and does not listen apart from them: what none of "
    "its captions says, it says only where its ear is sure (rain, in the table above). `promptless_weight=0.4` brings "
    "more of its own words back.",
    "The settings of this checkpoint were chosen on fold 4 with models of folds 1 to 3, those of its decoding with a "
    "shorter training of the encoder. Fold 5 was read for twelve captioners and settings of earlier versions, and "
    "twice for this decoding: with the shares 0.25 and 0.25, length penalty 0.5 and 4 times CLAP's cosine (F1 0.767 "
    "and 0.670), then with its own; the held-out groups with and without listening apart from the captions. Since "
    "then it was read for what was made again and for the names that nothing had met, and nothing was changed. As "
    "published, with one reading and nothing chosen by CLAP, the same weights come to 0.769 and 0.660, and the "
    "captioners of the held-out groups to a recall of 0.68, 0.55, 0.47 and 0.29.",
    "Held out of its captioner's training, sounds of three groups are named as well as by the language model alone, "
    "which believes every prompt; those of the last are not (the table above). Of the first group's sounds it says so "
    "in 11 % of other recordings, too: their captions are what is retrieved there.",
    "It copies words that its language model has met. Of a name that neither a language model nor its tokenizer ever "
    "met (the second table of held-out sounds) the pieces are copied, and the thread is often lost: 'the bark of a "
    "dog', but 'a roolle' of a rooster and 'a drumar playing' of a snare drum. That language model, trained for "
    "3,600 steps instead of 5,100, does a little better alone than with its captioner. With a tokenizer that had a "
    "token for each name it was worse (a recall of 0.12, 0, 0 and 0, as published): what was in no text has an "
    "embedding that was never trained.",
    "Made again from the folder of sounds (the table above), precision, recall, F1 and exact set lie within the "
    "intervals of this checkpoint, on single sounds and on mixtures; its text prompts come out lower. Random prompts "
    "cost it 0.04 and 0.09, hiding the sound 0.08 and 0.19, a codec 0.03. This checkpoint's encoder was made by "
    "earlier code in parts. An earlier one that was made again, its language model too, came out better than this "
    "one (as published, F1 0.778 on single sounds and 0.679 on mixtures against 0.772 and 0.656; text prompts 0.94 "
    "and 0.84): encoders differ by chance. Of three others, two had an encoder that heard 64 recordings a step to "
    "its end (as published, 0.738 and 0.751 on single sounds, 0.648 and 0.658 on mixtures), and one an encoder that "
    "heard 32 from its beginning (0.727 and 0.531).",
    "A datastore in other words than the grammar's works as far as its text tower reads them, and the captioner often "
    "garbles a word of it ('A dog barking ins.'): decoded as published, with 400 short captions of AudioCaps, 66 of "
    "the 154 captions of fold 5 held a word that is none; with its own datastore, none did.",
    "Its captions follow one small grammar. They are right or wrong, never elegant.",
    "A datastore about other sounds lends it words that it cannot hear: it repeats them by their likeness in an "
    "embedding that was made for 21 sounds.",
)

# Of the run whose evaluation is given as `--again`, as `LIMITS` are those of the shipped checkpoint.
AGAIN_NOTE = (
    "Tokenizers, CLAP and captioner were made again; the language model, whose stage hears no sound, is this "
    "checkpoint's."
)


def tiny_card_facts(
    evaluation: Mapping[str, Any],
    recordings: Sequence[Mapping[str, str]] = (),
    transfer: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    lent: Sequence[Mapping[str, Any]] = (),
    again: Mapping[str, Any] | None = None,
) -> CardFacts:
    """What the card of recap-tiny says.

    Args:
        evaluation: what `recap tiny evaluate --format json` wrote.
        recordings: rows of the checkpoint's `RECORDINGS.csv`.
        transfer: what `recap tiny transfer --format json` wrote, by the language model that it was run with.
        lent: what [`lend`] returned.
        again: `evaluation` of a checkpoint that the same commands made again.
    """
    from recap_hf.hub import CardFacts

    return CardFacts(
        title="recap-tiny",
        summary=(
            "The captioner that ships inside recap_hf, trained from scratch on recordings of 21 kinds of sounds. It "
            "is there so that retrieval-augmented captioning can be tried, tested and looked into anywhere within "
            'seconds: after `pip install recap-hf` and `import recap_hf`, `pipeline("audio-captioning")` is it. It '
            "really listens, and it is small: for real work train a captioner on Clotho or AudioCaps."
        ),
        licence=LICENCE,
        training_data=training_data(recordings),
        training={
            "method": "a CLAP (contrastive) and a GPT-2 (prompts and captions), both frozen, then the cross-attention",
            "captions": "written by the project's own grammar about mixtures of one to three recordings",
            "test": f"fold {evaluation['fold']} of the recordings, which no training has seen",
        }
        | ({"recordings": f"each with its source and licence in `{RECORDINGS}`"} if recordings else {}),
        results=results(evaluation),
        result_notes=notes(evaluation),
        sections=sections(evaluation, transfer, lent) + ([made_again(evaluation, again)] if again else []),
        limits=list(LIMITS),
        tags=["tiny", "sound-events"],
    )


def training_data(recordings: Sequence[Mapping[str, str]]) -> list[DataSource]:
    """The sources of the recordings, one entry per licence."""
    from recap_hf.hub import DataSource

    counts = Counter((row["source"], row["licence"]) for row in recordings)
    return [
        DataSource(source, licence or None, clips=number, url=URLS.get(source), use="all three stages")
        for (source, licence), number in counts.items()
    ]


def results(evaluation: Mapping[str, Any]) -> list[Result]:
    """The tables of the evaluation, controls and all."""
    from recap_hf.hub import Result
    from recap_hf.version import __version__

    found = []
    for key, name in (("singles", "single sounds"), ("mixtures", "mixtures of two sounds")):
        table = evaluation.get(key)
        if table is None:
            continue
        for row, values in table["rows"].items():
            for figure, metric in METRICS.items():
                low, high = values["interval"].get(figure, (None, None))
                found.append(
                    Result(
                        metric,
                        values["figures"][figure],
                        f"Sound events, fold {evaluation['fold']}: {name}",
                        f"`recap tiny evaluate` of recap_hf {__version__}",
                        clips=table["clips"],
                        clip_list=table.get("hash"),
                        low=low,
                        high=high,
                        system=None if row == "RECAP" else row,
                    )
                )
    return found


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables should know."""
    accuracy, first = evaluation["text_prompt_accuracy"], evaluation["first_caption"]
    lines = [
        "A caption names an event if a word of that event's list is in it; precision and recall are over all clips.",
        f"The encoder alone, choosing among 21 text prompts: accuracy {accuracy['not_instruments_macro']:.2f} over "
        f"the eleven sounds that are no instruments, {accuracy['all_macro']:.2f} over all 21 (macro-averaged).",
        f"The first retrieved caption names exactly what is there in {first['exact']:.0%} of the single sounds, and "
        f"that with more besides in {first['superset']:.0%}.",
    ]
    if "mixtures" in evaluation:
        mixed, order = evaluation["mixtures"], evaluation["mixtures"]["order"]
        lines.append(
            f"F1 on overlapping pairs {mixed['overlap']['f1']:.2f}, on pairs in sequence "
            f"{mixed['sequence']['f1']:.2f}; where both sounds of a sequence are named ({order['named_both']} clips), "
            f"their order is right in {order['share']:.0%}."
        )
    return lines


def sections(
    evaluation: Mapping[str, Any],
    transfer: Mapping[str, Sequence[Mapping[str, Any]]] | None,
    lent: Sequence[Mapping[str, Any]],
) -> list[Section]:
    """What it hears and what only its vocabulary knows, and the tables that are no results of a test set."""
    from recap_hf.hub import Section

    per_event = evaluation["text_prompt_accuracy"]["per_event"]
    heard = [
        f"{forms[0]} ({per_event[event]:.2f})" if event in per_event else forms[0] for event, forms in HEARD.items()
    ]
    found = [
        Section(
            "What it hears, and what only its vocabulary knows",
            f"It was trained to hear: {', '.join(heard)}. In brackets: the share of test recordings that its encoder "
            "tells from the other twenty by text prompts.\n\nIts tokenizers, its language model and its text tower "
            f"have also read the names of {len(other_sounds())} other sounds. It can read a datastore about these and "
            "copy their words; its ear has never heard them. `recap tiny sounds` lists both, and with "
            "`--datastore FILE` it tells them apart in captions of your own.",
        )
    ]
    if "no_events" in evaluation:
        lines = ["| what was played | clips | named an event that is not there |", "| --- | ---: | ---: |"]
        lines += [
            f"| {kind} | {values['clips']} | {values['false_naming']:.0%} |"
            for kind, values in evaluation["no_events"].items()
        ]
        found.append(Section("Sounds that are none of these", "\n".join(lines)))
    if "degraded" in evaluation:
        clean = evaluation["singles"]["rows"]["RECAP"]["figures"]["f1"]
        lines = ["| single sounds | event F1 |", "| --- | ---: |", f"| as they are | {clean:.3f} |"]
        lines += [f"| {kind} | {values['f1']:.3f} |" for kind, values in evaluation["degraded"].items()]
        found.append(Section("Quiet, loud and coarse recordings", "\n".join(lines)))
    if lent:
        text = (
            "Without training, it takes its words from the datastore that it is given. In brackets: the similarity of "
            "the nearest caption. A low one says that nothing in the datastore fits; it is repeated all the same.\n\n"
        )
        found.append(Section("Datastores of your own", text + format_lent(lent)))
    if transfer:
        text = (
            "Each group of sounds was held out of every caption that the captioner was trained on, then given back in "
            "the datastore alone. CLAP had met them."
        )
        for name, results in transfer.items():
            text += f"\n\nWith {name}:\n\n{format_transfer(list(results))}"
        found.append(Section("Another domain without training", text))
    return found


def _order(evaluation: Mapping[str, Any]) -> str:
    order = evaluation["mixtures"]["order"]
    return f"{order['right']} of {order['named_both']}"


def made_again(evaluation: Mapping[str, Any], again: Mapping[str, Any]) -> Section:
    """The figures of this checkpoint beside those of one that the same commands made again."""
    from recap_hf.hub import Section

    lines = ["| | this checkpoint [95 %] | made again |", "| --- | ---: | ---: |"]
    for key, name in (("singles", "single sounds"), ("mixtures", "mixtures")):
        if key in evaluation and key in again:
            row, other = (table[key]["rows"]["RECAP"] for table in (evaluation, again))
            for figure, metric in METRICS.items():
                low, high = row["interval"][figure]
                lines.append(
                    f"| {name}, {metric} | {row['figures'][figure]:.3f} [{low:.3f}, {high:.3f}] "
                    f"| {other['figures'][figure]:.3f} |"
                )
    accuracy, other_accuracy = evaluation["text_prompt_accuracy"], again["text_prompt_accuracy"]
    lines += [f"| {name} | {accuracy[key]:.3f} | {other_accuracy[key]:.3f} |" for key, name in TEXT_PROMPTS.items()]
    if "mixtures" in evaluation and "mixtures" in again:
        lines.append(f"| sequences that name both, order right | {_order(evaluation)} | {_order(again)} |")
    text = (
        "What the stages of `recap tiny all --sounds DIR --work-dir WORK --num-processes 2` made from nothing but the "
        f"folder of sounds, evaluated by `recap tiny evaluate`. {AGAIN_NOTE}\n\n"
    )
    return Section("Made again from the folder of sounds", text + "\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the facts, and the card where `--output` says."""
    from recap_hf.hub.cards import render_model_card
    from recap_hf.hub.describe import describe_checkpoint, describe_datastore
    from recap_hf.hub.facts import FACTS_FILE
    from recap_hf.loading import load_pair
    from recap_hf.modeling.retrieval_recap import CaptionDatastore

    parser = argparse.ArgumentParser(prog="python -m recap_hf.tiny.card", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("evaluation", metavar="EVALUATION.json", help="of `recap tiny evaluate --format json`")
    parser.add_argument("--transfer", metavar="FILE.json", help="of `recap tiny transfer --format json`")
    parser.add_argument("--transfer-unheard", metavar="FILE.json", help="the same, with `--without-heard-words`")
    parser.add_argument("--again", metavar="FILE.json", help="the evaluation of a checkpoint that was made again")
    parser.add_argument("--output", metavar="FILE.md", help="also write the card there")
    args = parser.parse_args(argv)
    folder = Path(args.model)
    recordings: list[dict[str, str]] = []
    if (folder / RECORDINGS).is_file():
        with (folder / RECORDINGS).open(encoding="utf-8", newline="") as file:
            recordings = list(csv.DictReader(file))
    evaluation = json.loads(Path(args.evaluation).read_text(encoding="utf-8"))
    models = {
        "the language model of this checkpoint, which had met their words": args.transfer,
        "a language model and a tokenizer that never read the name of any of the 21 sounds": args.transfer_unheard,
    }
    transfer = {name: json.loads(Path(file).read_text(encoding="utf-8")) for name, file in models.items() if file}
    again = json.loads(Path(args.again).read_text(encoding="utf-8")) if args.again else None
    lent = lend(*load_pair(folder, "cpu", quiet=True))
    facts = tiny_card_facts(evaluation, recordings, transfer, lent, again)
    (folder / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.output:
        datastore = describe_datastore(CaptionDatastore.from_pretrained(folder / "datastore"))
        card = render_model_card(REPOSITORY, describe_checkpoint(folder), facts, datastore)
        Path(args.output).write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("python -m recap_hf.tiny.card", main))
