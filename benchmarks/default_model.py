"""What the default does beyond naming single sounds and mixtures, one figure a line:

    python -m benchmarks.default_model --data DATA [--model NAME] [--parts tags own edges levels captions]

tags: label prompts as in `recap tag`, ESC-50 fold 4. own: a user's own captions of ten kinds, on 40 recordings of them
and on 40 of others. edges: silence, noise and tones that are named as anything else. levels: ESC-50 fold 4 louder,
quieter, through a low-pass and a codec. captions: 500 recordings of the validation splits, checked by rules.
`DATA` holds `recordings/`, `sound_events/` and `keywords_esc50.json`.
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
# Kinds that none of these captions describes.
OTHER_KINDS = (
    "can_opening", "cat", "clapping", "coughing", "crow", "fireworks", "frog", "hand_saw", "laughing", "sheep"
)  # fmt: skip
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
    """The captioner with a user's captions: what they describe, and what they do not."""
    rules, rows = rules_of(data), validation_rows(data)

    def four_each(kinds: Sequence[str]) -> list[dict[str, str]]:
        return [row for kind in kinds for row in [row for row in rows if row["label"] == kind][:4]]

    described, others = four_each(tuple(OWN_CAPTIONS)), four_each(OTHER_KINDS)
    users = captioner.with_datastore(list(OWN_CAPTIONS.values()))
    found = captions_of(users, [row["path"] for row in described])
    right = [row["label"] in rules.named(result.caption) for row, result in zip(described, found, strict=True)]
    figure("own captions, named right", sum(right), len(right))
    figure("own captions, none fits though one does", sum(result.fits is False for result in found), len(found))
    strangers = captions_of(users, [row["path"] for row in others])
    figure("own captions, none fits where none does", sum(r.fits is False for r in strangers), len(strangers))
    return {
        row["file_name"]: result.to_dict() for row, result in zip(described + others, found + strangers, strict=True)
    }


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
    """ESC-50 fold 4 as it is, at other levels, through a low-pass of 3 kHz and through Vorbis."""
    from recipes.recap_tiny.recordings import band, codec

    rules, rows = rules_of(data), validation_rows(data)
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
        figure(f"ESC-50 fold 4, {name}", sum(right), len(right))
        found[name] = [result.caption for result in results]
    return found


def captions(captioner: Any, data: Path) -> dict[str, Any]:
    """500 captions of the validation splits by rules: repeated words, unfinished sentences, persons, length."""
    from recipes.recap_tiny import grammar, lexicon
    from recipes.recap_tiny.recordings import labelled_recordings, read, teacher_scores

    recordings = labelled_recordings(data, [4], "validation")
    chosen = [recordings[int(i)] for i in np.linspace(0, len(recordings) - 1, 500)]
    results = captions_of(captioner, [recording.path for recording in chosen])
    texts = [result.caption for result in results]
    repeated = [bool(grammar.repeated_words(text)) for text in texts]
    broken = [(" " not in text and text != "silence") or bool(_UNFINISHED.search(text)) for text in texts]
    voices = [n for n, entry in enumerate(lexicon.classes()) if entry.kind in ("voice", "person")]
    voices = [number for number in voices if number < _AUDIOSET]
    # By the captioner's own classification head, which started from the tagger's.
    waveforms = (read(recording.path) for recording in chosen)
    heard = teacher_scores(captioner.model.clap, captioner.processor.feature_extractor, waveforms)
    persons = [
        bool(lexicon.names_person(text) and scores[voices].max() < 0.1)
        for text, scores in zip(texts, heard, strict=True)
    ]
    for name, flags in (("repeated sounds", repeated), ("broken sentences", broken), ("unsupported persons", persons)):
        figure(name, sum(flags), len(flags))
    lengths = [len(text.split()) for text in texts]
    print(f"median length: {statistics.median(lengths)} words; {len(set(texts))} different captions")
    return {
        recording.clip_id: {"caption": text, "repeated": one, "broken": two, "person": three}
        for recording, text, one, two, three in zip(chosen, texts, repeated, broken, persons, strict=True)
    }


_PARTS = {"tags": tags, "own": own, "edges": edges, "levels": levels, "captions": captions}

if __name__ == "__main__":
    raise SystemExit(main())
