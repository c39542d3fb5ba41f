"""Recordings, mixtures and captions for the trainings: `python -m recipes.recap_tiny.prepare DATA OUT --teacher DIR`.

Writes `OUT/train/metadata.jsonl` (an `audiofolder` with captions, classes and class scores), `OUT/pairs/` (the same
with more captions, for the CLAP), `OUT/audio/` (mixtures and degraded recordings), `OUT/caption_classes.csv`,
`OUT/corpus.txt` (captions of AudioCaps) and `OUT/datastore.txt` (captions of ours). What is there already is not made
again.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recap_hf.training.tasks.caption_classes import CaptionClasses, agreement

from . import lexicon
from .circumstances import with_circumstance
from .grammar import Sound, describe, repeated_words
from .recordings import (
    RATE,
    Recording,
    course,
    degrade,
    labelled_recordings,
    plan_mixtures,
    read,
    render,
    teacher_scores,
)

# A class that the teacher gives less than this is not told.
_MIN_SCORE = 0.1
# The teacher's other classes of a labelled recording count half: where it disagrees with a label it is often wrong.
_BESIDE_LABEL = 0.5
# An unlabelled recording takes part in mixtures if the teacher is this sure of a class that can be described.
_SURE = 0.6
_OWN_CAPTIONS, _CORPUS_CAPTIONS, _CORPUS_POOL, _MIN_FIT = 8, 12, 120, 0.3
# Rarer words of a corpus are often misspelled; shorter captions say less than can be heard.
_WORD_CAPTIONS, _MIN_WORDS = 5, 5
# The most frequent slip: one such caption fits every recording of music, and the language model learns it.
_WRONG_ARTICLE = re.compile(r"\ba music (is|plays|being|playing|played)\b")
# Copies of a labelled recording through other microphones and codecs, and at other levels.
_DEGRADED = 2
# Clips whose fit is computed at once.
_BLOCK = 64
_VAGUE = frozenset({"music", "scene", "quality", "silence"})


@dataclass
class Example:
    """A row of the table.

    Args:
        clip_id, path, source, licence: of the audio.
        classes: names and scores.
        captions: the texts, those by the grammar last.
        own: how many of them are by the grammar.
        pairs: the texts for the CLAP.
    """

    clip_id: str
    path: str
    source: str
    licence: str
    classes: dict[str, float]
    captions: list[str] = field(default_factory=list)
    own: int = 0
    pairs: list[str] = field(default_factory=list)

    def row(self, captions: Sequence[str]) -> dict[str, object]:
        """The line of `metadata.jsonl` with these captions."""
        names = sorted(self.classes, key=self.classes.get, reverse=True)
        return {
            "file_name": self.path,
            "clip_id": self.clip_id,
            "captions": list(captions),
            "classes": names,
            "class_scores": [round(self.classes[name], 3) for name in names],
            "source": self.source,
            "licence": self.licence,
        }


def caption_classes() -> CaptionClasses:
    """The lexicon's classes for `recap pretrain clap --caption-classes`."""
    entries = lexicon.classes()
    parents = [[entries[number].name for number in entry.parents] for entry in entries]
    return CaptionClasses([entry.name for entry in entries], [entry.words.pattern for entry in entries], parents)


def write_caption_classes(path: Path) -> None:
    """The same as a CSV file."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("name", "words", "parents"))
        for entry in lexicon.classes():
            parents = ";".join(lexicon.classes()[number].name for number in entry.parents)
            writer.writerow((entry.name, entry.words.pattern, parents))


def class_scores(scores: np.ndarray, label: str) -> dict[str, float]:
    """Names and scores of what a recording holds: the teacher's, and its label's classes with 1."""
    names = [entry.name for entry in lexicon.classes()]
    found = {names[number]: float(scores[number]) for number in np.flatnonzero(scores >= _MIN_SCORE)}
    if label:
        head, *others = lexicon.labels()[label].classes
        found = {name: score * _BESIDE_LABEL for name, score in found.items()}
        found[names[head]] = 1.0
        for number in lexicon.implied(head):
            found[names[number]] = 1.0
        # The label's further classes are often there as well, and never wrong.
        for number in others:
            found[names[number]] = max(found.get(names[number], 0.0), 0.5)
    return found


def sound_of(scores: np.ndarray, label: str) -> str | int | None:
    """What a recording is described as: its label, or the specific class that the teacher is surest of."""
    if label:
        return label
    entries = lexicon.classes()
    order = [int(number) for number in np.argsort(-scores) if scores[number] >= _SURE]
    candidates = [number for number in order if entries[number].kind not in _VAGUE and entries[number].phrases]
    vaguer = set().union(*(lexicon.implied(number) for number in candidates)) if candidates else set()
    return next((number for number in candidates if number not in vaguer), None)


class Corpus:
    """Captions of a corpus, found by the classes that they name.

    Args:
        classes: the classes.
        captions: the texts.
    """

    def __init__(self, classes: CaptionClasses, captions: Sequence[str]) -> None:
        self._classes, self.captions = classes, list(captions)
        self._named, self._covered = (array.astype(np.float32) for array in classes.named(self.captions))

    def fitting(
        self, clips: Sequence[Mapping[str, float]], count: int, seeds: Sequence[Sequence[int]]
    ) -> list[list[str]]:
        """For each clip at most `count` captions that fit its classes, drawn from the best.

        Args:
            clips: names and scores of classes.
            count: captions for each.
            seeds: of the draws, one for each clip.
        """
        found = []
        for start in range(0, len(clips), _BLOCK):
            scores = self._classes.scores(clips[start : start + _BLOCK])
            for fit in agreement(scores, self._named, self._covered):
                best = np.argpartition(-fit, _CORPUS_POOL)[:_CORPUS_POOL]
                best = np.sort(best[fit[best] >= _MIN_FIT])
                rng = np.random.default_rng(seeds[len(found)])
                chosen = rng.choice(best, size=min(count, len(best)), replace=False)
                found.append([self.captions[int(number)] for number in chosen])
        return found


def silenced(captions: Sequence[str], without: Sequence[str]) -> list[str]:
    """The captions that name none of some labels: neither their classes nor what implies these."""
    heads = {number for label in without for number in lexicon.labels()[label].classes}
    names = {entry.index for entry in lexicon.classes() if heads & {entry.index, *lexicon.implied(entry.index)}}
    if not names:
        return list(captions)
    return [text for text in captions if not names & set(lexicon.caption_classes(text).tolist())]


def read_corpus(path: Path) -> list[str]:
    """The different captions of a CSV file with the column `caption`."""
    with open(path, encoding="utf-8", newline="") as handle:
        return list(dict.fromkeys(row["caption"].strip() for row in csv.DictReader(handle)))


def well_written(texts: Sequence[str]) -> list[str]:
    """Captions to learn writing from: without those that say a word twice ("a man speaks as a man speaks"), have a
    rare word, the wrong article ("a music is played"), or fewer than five words."""
    words = [set(re.findall(r"[a-z']+", text.lower())) for text in texts]
    counts = collections.Counter(word for found in words for word in found)
    return [
        text
        for text, found in zip(texts, words, strict=True)
        if len(text.split()) >= _MIN_WORDS
        and all(counts[word] >= _WORD_CAPTIONS for word in found)
        and not repeated_words(text)
        and not _WRONG_ARTICLE.search(text.lower())
    ]


def load_scores(
    recordings: Sequence[Recording], waveforms: Sequence[np.ndarray], teacher: str, cache: Path
) -> np.ndarray:
    """The teacher's scores, `(recordings, 521)`; kept in `cache`."""
    ids = np.array([recording.clip_id for recording in recordings])
    if cache.exists():
        stored = np.load(cache)
        if np.array_equal(stored["ids"], ids):
            return stored["scores"]
    from recap_hf import RecapFeatureExtractor
    from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel

    model, extractor = (
        MobileNetClapModel.from_pretrained(teacher).eval(),
        RecapFeatureExtractor.from_pretrained(teacher),
    )
    scores = np.stack(list(teacher_scores(model, extractor, waveforms)))
    np.savez(cache, ids=ids, scores=scores)
    return scores


def _union(*clips: Mapping[str, float]) -> dict[str, float]:
    """Classes of what several clips hold together."""
    return {
        name: max(clip.get(name, 0.0) for clip in clips) for name in dict.fromkeys(n for clip in clips for n in clip)
    }


def attributes(rng: np.random.Generator, gain_db: float) -> dict[str, str]:
    """What is known of a part that is `gain_db` below the other, as attributes of a `Sound`."""
    if gain_db < -4.0:
        return {"distance": "far" if rng.random() < 0.5 else "background"}
    return {}


def own_captions(sounds: Sequence[Sound], relation: str, count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` different captions by the grammar, of five words or more where there are such."""
    found = list({describe(sounds, rng, relation, detail=0.9): None for _ in range(3 * count)})
    return sorted(found, key=lambda text: len(text.split()) < _MIN_WORDS)[:count]


def describable(first: str | int, second: str | int) -> bool:
    """Whether a caption can name both: neither names the other as well."""
    heads = [lexicon.labels()[part].classes[0] if isinstance(part, str) else part for part in (first, second)]
    return heads[0] != heads[1] and not any(
        one in lexicon.implied(other) for one, other in (tuple(heads), tuple(reversed(heads)))
    )


def build(arguments: argparse.Namespace) -> list[Example]:
    """All examples; renders audio that is not there yet."""
    from .synthetic import synthetic_examples

    out = Path(arguments.out)
    audio = out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    recordings = labelled_recordings(Path(arguments.data), arguments.folds, "train", arguments.hidden)
    waveforms = [read(recording.path) for recording in recordings]
    scores = load_scores(recordings, waveforms, arguments.teacher, out / "teacher.npz")
    texts = read_corpus(Path(arguments.data) / "captions" / "audiocaps_train.csv")
    to_write = silenced(well_written(texts), arguments.without)
    write_lines(out / "corpus.txt", to_write)
    corpus = Corpus(caption_classes(), to_write)
    heard = [class_scores(row, recording.label) for row, recording in zip(scores, recordings, strict=True)]
    sounds = [sound_of(row, recording.label) for row, recording in zip(scores, recordings, strict=True)]
    seeds = [[arguments.seed, 5, number] for number in range(len(recordings))]
    fitting = corpus.fitting(heard, _CORPUS_CAPTIONS, seeds)
    examples = []
    for number, recording in enumerate(recordings):
        rng, own = np.random.default_rng([arguments.seed, 2, number]), []
        if sounds[number] is not None:
            sound = Sound(sounds[number], **course(waveforms[number]))
            own = own_captions([sound], "overlap", _OWN_CAPTIONS, rng)
        captions = fitting[number] + own
        if not captions:
            continue
        same = (recording.source, recording.licence, heard[number], captions, len(own))
        examples.append(Example(recording.clip_id, str(Path(recording.path).resolve()), *same))
        for copy in range(_DEGRADED if recording.label else 0):
            path = audio / f"degraded-{copy}-{number:05d}.flac"
            changed = np.random.default_rng([arguments.seed, 7, number, copy])
            write_once(path, lambda rng=changed, number=number: degrade(waveforms[number], rng))
            examples.append(Example(f"degraded/{copy}/{recording.clip_id}", str(path.resolve()), *same))
    # Labelled recordings take part three times as often.
    usable = [
        number for number, sound in enumerate(sounds) if sound is not None and len(waveforms[number]) >= RATE // 3
    ]
    usable += 2 * [number for number in usable if recordings[number].label]
    durations = [len(waveform) / RATE for waveform in waveforms]
    planned = plan_mixtures(recordings, durations, usable, 2 * arguments.mixtures, arguments.seed)
    planned = [mixture for mixture in planned if describable(*(sounds[part] for part in mixture.parts))]
    planned = planned[: arguments.mixtures]
    together = [_union(*(heard[part] for part in mixture.parts)) for mixture in planned]
    seeds = [[arguments.seed, 6, number] for number in range(len(planned))]
    fitting = corpus.fitting(together, _CORPUS_CAPTIONS // 3, seeds)
    for number, mixture in enumerate(planned):
        rng = np.random.default_rng([arguments.seed, 3, number])
        path = audio / f"{mixture.clip_id}.flac"
        # Also where the file is there: the captions go on with its generator.
        mixed = render(mixture, waveforms, rng)
        write_once(path, lambda mixed=mixed: mixed)
        parts = [
            Sound(sounds[part], **attributes(rng, gain - max(mixture.gains)), **course(waveforms[part][: 5 * RATE]))
            for part, gain in zip(mixture.parts, mixture.gains, strict=True)
        ]
        own = own_captions(parts, "sequence" if mixture.in_sequence else "overlap", _OWN_CAPTIONS, rng)
        # A caption of the corpus says little of an order, and that may be the wrong one.
        captions = ([] if mixture.in_sequence else fitting[number]) + own
        sources = " + ".join(dict.fromkeys(recordings[part].source for part in mixture.parts))
        licences = " + ".join(dict.fromkeys(recordings[part].licence for part in mixture.parts))
        known = (mixture.clip_id, str(path.resolve()), sources, licences, together[number], captions, len(own))
        examples.append(Example(*known))
    examples += synthetic_examples(audio, arguments.seed)
    pair(examples, Corpus(caption_classes(), texts), arguments.seed)
    return examples


def write_tables(examples: Sequence[Example], out: Path, without: Sequence[str]) -> int:
    """Writes `train/` and `pairs/`; returns the number of different captions in the first.

    Captions that name one of the labels `without` are in the second alone: the CLAP must know a sound to find
    captions of it, which a user's datastore brings.
    """
    told = [(example, silenced(example.captions, without)) for example in examples]
    for name, rows in (("train", told), ("pairs", [(example, example.pairs) for example in examples])):
        (out / name).mkdir(exist_ok=True)
        lines = [json.dumps(example.row(texts)) for example, texts in rows if texts]
        write_lines(out / name / "metadata.jsonl", lines)
    return len({text for _, texts in told for text in texts})


def pair(examples: Sequence[Example], corpus: Corpus, seed: int) -> None:
    """Gives examples their texts for the CLAP: as many captions of the corpus as they have, drawn for each copy of a
    recording anew and from all, also short ones and with rare words; those by the grammar, some with circumstances.

    Args:
        examples: to complete.
        corpus: all captions.
        seed: of the draws.
    """
    seeds = [[seed, 8, number] for number in range(len(examples))]
    fitting = corpus.fitting([example.classes for example in examples], _CORPUS_CAPTIONS, seeds)
    for number, (example, found) in enumerate(zip(examples, fitting, strict=True)):
        rng, others = np.random.default_rng([seed, 9, number]), len(example.captions) - example.own
        example.pairs = found[:others] + [with_circumstance(text, rng) for text in example.captions[others:]]


def write_lines(path: Path, texts: Sequence[str]) -> None:
    """One text a line."""
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def write_datastore(path: Path, corpora: Path, without: Sequence[str]) -> int:
    """Our captions, one a line, without copies of a corpus; returns their number."""
    from .datastore import captions, corpus_captions, special_captions, without_copies

    texts = without_copies(captions(), corpus_captions(corpora))
    texts += [text for group in special_captions().values() for text in group]
    texts = silenced(texts, without)
    write_lines(path, texts)
    return len(texts)


def write_once(path: Path, make: Callable[[], np.ndarray]) -> None:
    """Write what `make` returns as 16 kHz FLAC, unless it is there."""
    if path.exists():
        return
    import soundfile

    scratch = path.with_suffix(".part")
    soundfile.write(scratch, make(), RATE, format="FLAC")
    scratch.rename(path)


def keep_plan(out: Path, arguments: argparse.Namespace) -> None:
    """Write the arguments to `out`. Raises `ValueError` if it holds those of other ones."""
    plan = {name: value for name, value in vars(arguments).items() if name != "out"}
    path = out / "plan.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != plan:
        raise ValueError(f"{path} is of other arguments: give another folder, or delete it with all it holds")
    path.write_text(json.dumps(plan) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with recordings/, sound_events/ and captions/")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--teacher", required=True, help="folder of `recap convert yamnet`")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help="of the labelled collections (1 2 3)")
    parser.add_argument("--hidden", nargs="*", default=[], help="labels that are not told")
    parser.add_argument("--without", nargs="*", default=[], help="labels that GPT-2 and the captioner never read of")
    parser.add_argument("--mixtures", type=int, default=5000, help="mixtures of two recordings (5000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    try:
        keep_plan(out, arguments)
    except ValueError as error:
        parser.error(str(error))
    examples = build(arguments)
    count = write_tables(examples, out, arguments.without)
    write_caption_classes(out / "caption_classes.csv")
    corpora = Path(arguments.data) / "captions"
    print(f"{write_datastore(out / 'datastore.txt', corpora, arguments.without)} captions in the datastore")
    print(f"{len(examples)} recordings and mixtures with {count} different captions in {out}")


if __name__ == "__main__":
    main()
