"""What the default does beyond naming single sounds and mixtures, one figure a line:

    python -m benchmarks.default_model --data DATA [--model NAME] [--parts tags own edges levels captions]

tags: label prompts as in `recap tag`, ESC-50 fold 4. own: two users' captions, each of ten kinds, on 40 recordings of
them and on 40 of the other user's. edges: silence, noise and tones that are named as anything else. levels: fold 5
of the events louder, quieter, through a low-pass and a codec. captions: 500 recordings and mixtures that no fold
trains (unlabelled ones of the validation split, and fold 5 of the events), checked by rules. The last two parts hold
for a model that trained on all four folds of ESC-50; for the first two, it must not have read fold 4.
`DATA` holds `recordings/`, `sound_events/`, `keywords.json` and `keywords_esc50.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_cli.options import add_captioner_arguments, load_captioner

PARTS = ("tags", "own", "edges", "levels", "captions")
# A user's file: what somebody might write who knows what is in the recordings, and nothing of the default's captions.
OWN_CAPTIONS = {
    "brushing_teeth": "Somebody is brushing their teeth in the bathroom",
    "church_bells": "The bells of the village church",
    "cow": "One of our cows calling from the pasture",
    "door_knock": "A visitor knocks at the front door",
    "glass_breaking": "A drinking glass falls and breaks",
    "keyboard_typing": "Me typing on the keyboard at my desk",
    "siren": "Police car passing with its siren on",
    "snoring": "Grandpa snores on the sofa",
    "toilet_flush": "The toilet being flushed",
    "vacuum_cleaner": "Vacuuming the living room carpet",
}
# Another user's, of ten other kinds: neither file describes what the other does.
OTHER_CAPTIONS = {
    "can_opening": "Opening a can of soda in the garden",
    "cat": "Our kitten wants to be fed",
    "clapping": "The guests applaud after the speech",
    "coughing": "My son has a bad cough",
    "crow": "A crow in the tree outside",
    "fireworks": "New Year's fireworks over the town",
    "frog": "Frogs at the pond behind our house",
    "hand_saw": "Dad sawing a plank in the shed",
    "laughing": "The girls laughing at a joke",
    "sheep": "Sheep on the hillside",
}
_CAPTIONS = 500
# Classes of AudioSet, the first ones of lexicon and head.
_AUDIOSET = 521
# Last words that no sentence ends with. "A train passes by" is one, "music followed by" is none.
_UNFINISHED = re.compile(
    r"\b(a|an|and|as|at|for|from|in|into|of|on|or|the|then|to|while|with|is|are|(followed|played|accompanied) by)$"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of recordings and keywords")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", metavar="FILE", help="captions of the parts as JSON")
    add_captioner_arguments(parser)
    args = parser.parse_args(argv)
    captioner, data = load_captioner(args), Path(args.data)
    report = {}
    for part in args.parts:
        report[part] = _PARTS[part](captioner, data)
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def figure(name: str, right: int, of: int) -> None:
    """Prints a share with its 95 % interval (Wilson)."""
    share, z = right / of, 1.96
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    print(f"{name}: {share:.3f} [{centre - half:.3f}, {centre + half:.3f}] ({right} of {of})", flush=True)


def validation_rows(data: Path) -> list[dict[str, str]]:
    """Labelled recordings of the validation split (ESC-50 fold 4), `path` and `label` of each."""
    from benchmarks.sound_events import read_metadata

    rows = [row for row in read_metadata(data / "recordings") if row["fold"] == "4"]
    return [{**row, "path": str(data / "recordings" / row["file_name"])} for row in rows]


def rules_of(data: Path) -> Any:
    """The naming rules of ESC-50's kinds."""
    from benchmarks.naming import NamingRules

    return NamingRules.read(data / "keywords_esc50.json")


def captions_of(captioner: Any, sources: Sequence[Any]) -> list[Any]:
    """A `CaptionResult` of each recording."""
    return [result for _, result in captioner.caption_stream(sources)]


def tags(captioner: Any, data: Path) -> dict[str, Any]:
    """The label among the first, and among the first five, of 40 label prompts."""
    rows = validation_rows(data)
    labels = sorted({row["label"] for row in rows})
    texts = captioner.model.embed_captions([label.replace("_", " ") for label in labels], captioner.processor)
    ranks = []
    for row in rows:
        embeds = captioner.encode([captioner.read(row["path"])]).audio_embeds[0].cpu().numpy()
        order = np.argsort(-(texts @ embeds.mean(axis=0)))
        ranks.append([labels[number] for number in order].index(row["label"]))
    figure("tags, top 1 of 40", sum(rank == 0 for rank in ranks), len(ranks))
    figure("tags, top 5 of 40", sum(rank < 5 for rank in ranks), len(ranks))
    return {row["file_name"]: rank for row, rank in zip(rows, ranks, strict=True)}


def own(captioner: Any, data: Path) -> dict[str, Any]:
    """The captioner with a user's captions: what they describe, and what they do not; and with another user's."""
    rules, rows = rules_of(data), validation_rows(data)
    files = {"own captions": OWN_CAPTIONS, "other own captions": OTHER_CAPTIONS}
    four_each = {
        name: [row for kind in file for row in [row for row in rows if row["label"] == kind][:4]]
        for name, file in files.items()
    }
    report = {}
    for name, other in (tuple(files), tuple(reversed(files))):
        users = captioner.with_datastore(list(files[name].values()))
        described, others = four_each[name], four_each[other]
        found, strangers = (captions_of(users, [row["path"] for row in part]) for part in (described, others))
        right = [row["label"] in rules.named(result.caption) for row, result in zip(described, found, strict=True)]
        figure(f"{name}, named right", sum(right), len(right))
        figure(f"{name}, none fits though one does", sum(result.fits is False for result in found), len(found))
        figure(f"{name}, none fits where none does", sum(r.fits is False for r in strangers), len(strangers))
        pairs = zip(described + others, found + strangers, strict=True)
        report[name] = {row["file_name"]: result.to_dict() for row, result in pairs}
    return report


def edges(captioner: Any, data: Path) -> dict[str, Any]:
    """Silence, noises and tones that are described as something else."""
    from recipes.recap_tiny import lexicon, synthetic
    from recipes.recap_tiny.recordings import RATE

    plain = {"quality", "silence", "scene"}
    beside = {"Sine wave", "Chirp tone", "Harmonic", "Beep, bleep", "Buzz", "Hiss", "Dial tone", "Busy signal"}
    captions, wrong = {}, 0
    for place, kind in enumerate(synthetic.KINDS):
        for number in range(10):
            waveform = synthetic.make(kind, np.random.default_rng([77, place, number]))
            result = captions_of(captioner, [{"array": waveform, "sampling_rate": RATE}])[0]
            named = [lexicon.classes()[index] for index in lexicon.caption_classes(result.caption)]
            false = [entry.name for entry in named if entry.kind not in plain and entry.name not in beside]
            captions[f"{kind} {number}"] = {"caption": result.caption, "false": false}
            wrong += bool(false)
    figure("silence, noise and tones named as a sound", wrong, len(captions))
    return captions


def levels(captioner: Any, data: Path) -> dict[str, Any]:
    """Fold 5 of the events as it is, at other levels, through a low-pass of 3 kHz and through Vorbis."""
    from benchmarks.naming import NamingRules
    from benchmarks.sound_events import read_metadata
    from recipes.recap_tiny.recordings import band, codec

    rules = NamingRules.read(data / "keywords.json")
    rows = [row for row in read_metadata(data / "sound_events") if row["fold"] == "5"]
    rows = [{"path": str(data / "sound_events" / row["file_name"]), "label": row["event"]} for row in rows]
    waveforms = [captioner.read(row["path"]) for row in rows]
    rate = captioner.sampling_rate
    changes: dict[str, Callable[[np.ndarray], Any]] = {
        "as it is": lambda wave: wave,
        "-30 dB": lambda wave: wave * 10 ** (-30 / 20),
        "-20 dB": lambda wave: wave * 10 ** (-20 / 20),
        "+10 dB, clipped": lambda wave: np.clip(wave * 10 ** (10 / 20), -1, 1),
        "low-pass 3 kHz": lambda wave: band(wave, 0.0, 3_000.0, rate),
        "Vorbis at its lowest quality": lambda wave: codec(wave, rate),
    }
    found = {}
    for name, change in changes.items():
        results = captions_of(captioner, [change(wave).astype(np.float32) for wave in waveforms])
        right = [row["label"] in rules.named(result.caption) for row, result in zip(rows, results, strict=True)]
        figure(f"21 events, fold 5, {name}", sum(right), len(right))
        found[name] = [result.caption for result in results]
    return found


def captions(captioner: Any, data: Path) -> dict[str, Any]:
    """500 captions of audio that no fold trains, by rules: repeated words, unfinished sentences, persons, length."""
    from benchmarks.sound_events import SAMPLING_RATE, mixture_list, mixtures
    from recap_hf.modeling.audio_recap import resample
    from recipes.recap_tiny import grammar, lexicon
    from recipes.recap_tiny.recordings import RATE, labelled_recordings, read, teacher_scores

    waveforms = {found.clip_id: read(found.path) for found in labelled_recordings(data, [5], "validation")}
    entries = mixture_list(data / "sound_events", 5)
    spread = np.linspace(0, len(entries) - 1, max(_CAPTIONS - len(waveforms), 0)).astype(int)
    for item in mixtures(data / "sound_events", [entries[number] for number in spread]):
        waveforms[item.name] = resample(item.waveform.astype(np.float32), SAMPLING_RATE, RATE)
    results = captions_of(captioner, list(waveforms.values()))
    texts = [result.caption for result in results]
    repeated = [bool(grammar.repeated_words(text)) for text in texts]
    broken = [(" " not in text and text != "silence") or bool(_UNFINISHED.search(text)) for text in texts]
    voices = [n for n, entry in enumerate(lexicon.classes()) if entry.kind in ("voice", "person")]
    voices = [number for number in voices if number < _AUDIOSET]
    # By the captioner's own classification head, which started from the tagger's.
    heard = teacher_scores(captioner.model.clap, captioner.processor.feature_extractor, waveforms.values())
    persons = [
        bool(lexicon.names_person(text) and scores[voices].max() < 0.1)
        for text, scores in zip(texts, heard, strict=True)
    ]
    for name, flags in (("repeated sounds", repeated), ("broken sentences", broken), ("unsupported persons", persons)):
        figure(name, sum(flags), len(flags))
    lengths = [len(text.split()) for text in texts]
    print(f"median length: {statistics.median(lengths)} words; {len(set(texts))} different captions")
    return {
        name: {"caption": text, "repeated": one, "broken": two, "person": three}
        for name, text, one, two, three in zip(waveforms, texts, repeated, broken, persons, strict=True)
    }


_PARTS = {"tags": tags, "own": own, "edges": edges, "levels": levels, "captions": captions}

if __name__ == "__main__":
    raise SystemExit(main())
