"""How well a sound index finds: by words, by sound, places in long recordings, near-duplicates; its time and memory.

    python -m benchmarks.archive search|places|duplicates|scale|kill --data DIR [--work DIR]

DIR holds `sound_events/`, `recordings/` and `captions/`. `search`: mean average precision of a plain query for each
kind over the recordings of sound events and over ESC-50's fold 4, and of 50 sentences of AudioCaps over both; whether
the nearest recording is of the same kind. `places`: the events of a recording of 30 minutes. `duplicates`: 100 copies
(louder, encoded, cut, resampled) among 2,000 recordings. `scale`: 20,000 files of one second. `kill`: an update that
is killed 20 times.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.measuring import single_query_ms
from benchmarks.naming import NamingRules
from benchmarks.sound_events import read_metadata
from benchmarks.timeline_recordings import plan_recording, render_recording
from recap_hf.archive import SoundEncoder, SoundIndex, updating
from recap_hf.modeling.audio_recap import load_audio, resample, to_mono

# What a person would type for a kind whose name, with "a" or "an" before it, would not do.
QUERIES = {
    "dog_bark": "a dog barking",
    "rain": "rain",
    "sea_waves": "sea waves",
    "baby_cry": "a baby crying",
    "clock_tick": "a clock ticking",
    "person_sneeze": "a person sneezing",
    "rooster": "a rooster crowing",
    "fire_crackling": "a crackling fire",
    "hi_hat": "a hi-hat",
    "man_speaking": "a man speaking",
    "breathing": "breathing",
    "brushing_teeth": "brushing teeth",
    "can_opening": "opening a can",
    "chirping_birds": "birds chirping",
    "church_bells": "church bells ringing",
    "clapping": "people clapping",
    "clock_alarm": "an alarm clock",
    "coughing": "a person coughing",
    "crickets": "crickets",
    "door_knock": "a knock on the door",
    "door_wood_creaks": "a wooden door creaking",
    "drinking_sipping": "someone drinking",
    "fireworks": "fireworks",
    "footsteps": "footsteps",
    "glass_breaking": "glass breaking",
    "insects": "insects",
    "insects_flying": "insects flying",
    "keyboard_typing": "typing on a keyboard",
    "laughing": "people laughing",
    "pouring_water": "pouring water",
    "snoring": "snoring",
    "toilet_flush": "a toilet flushing",
    "water_drops": "water drops",
    "wind": "wind",
}
_SENTENCES, _SEED = 50, 0
_CLOSE_S = 2.0
_RECORDINGS, _COPIES = 2000, 100
_FILES, _FILE_S = 20_000, 1.0
# Saved each second, so that a kill may hit the saving.
_KILLED_FILES, _KILLS, _LONGEST_S, _SAVED_EVERY_S = 1500, 20, 5.0, 1.0


def query_of(kind: str) -> str:
    """Plain words for a kind."""
    words = kind.replace("_", " ")
    return QUERIES.get(kind) or f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def average_precision(ranked: Sequence[bool]) -> float:
    """The mean over the relevant results of the precision down to each; all relevant ones are ranked."""
    relevant = np.asarray(ranked, dtype=bool)
    return float((np.cumsum(relevant) / np.arange(1, len(relevant) + 1))[relevant].mean())


class Sounds:
    """Recordings with known kinds in a folder of links, and their index."""

    def __init__(self, folder: Path, recordings: dict[str, tuple[Path, str]], encoder: SoundEncoder) -> None:
        self.kinds = {name: kind for name, (_, kind) in recordings.items()}
        for name, (path, _) in recordings.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path.resolve())
        self.folder, self.index = folder, SoundIndex.update(folder, encoder)

    def ranked(self, names: Sequence[str], **query: Any) -> list[str]:
        """The kinds of some recordings, best first; those of which nothing was encoded come last."""
        results = self.index.search(**query, top=len(self.kinds))
        found = [Path(result["path"]).relative_to(self.folder).as_posix() for result in results]
        known, left = set(names), sorted(set(names) - set(found))
        return [self.kinds[name] for name in [*(name for name in found if name in known), *left]]


def sound_events(data: Path) -> dict[str, tuple[Path, str]]:
    """Path and kind of the recordings of sound events, by name."""
    folder = data / "sound_events"
    rows = read_metadata(folder)
    return {f"sound_events/{row['file_name']}": (folder / row["file_name"], row["event"]) for row in rows}


def esc50(data: Path, fold: int = 4) -> dict[str, tuple[Path, str]]:
    """Path and kind of the recordings of a fold of ESC-50, by name."""
    rows = [row for row in read_metadata(data / "recordings") if row["file_name"].startswith("esc50/")]
    own = [row for row in rows if int(row["fold"]) == fold]
    return {row["file_name"]: (data / "recordings" / row["file_name"], row["event"]) for row in own}


def measure_search(args: argparse.Namespace, work: Path, encoder: SoundEncoder) -> dict[str, Any]:
    """Mean average precision of plain queries and of sentences, and the kind of the nearest recording."""
    sets = {"sound_events": sound_events(args.data), "esc50_fold4": esc50(args.data)}
    sounds = Sounds(work / "sounds", sets["sound_events"] | sets["esc50_fold4"], encoder)
    found: dict[str, Any] = {}
    for name, recordings in sets.items():
        names, truth = list(recordings), [kind for _, kind in recordings.values()]
        each = {}
        for kind in sorted(set(truth)):
            each[kind] = average_precision([one == kind for one in sounds.ranked(names, text=query_of(kind))])
        nearest = [sounds.ranked([one for one in names if one != own], audio=sounds.folder / own)[0] for own in names]
        found[name] = {
            "recordings": len(names),
            "mean_average_precision": np.mean(list(each.values())),
            "by_chance": np.mean([truth.count(kind) / len(truth) for kind in each]),
            "nearest_of_the_same_kind": np.mean([a == b for a, b in zip(nearest, truth, strict=True)]),
            "average_precisions": each,
        }
    precisions, shares = [], []
    for sentence, kinds in sentences(args.data, set(sounds.kinds.values())):
        ranked = [one in kinds for one in sounds.ranked(list(sounds.kinds), text=sentence)]
        precisions.append(average_precision(ranked))
        shares.append(np.mean(ranked))
    chance = np.mean(shares)
    found["audiocaps"] = {"sentences": len(precisions), "mean": np.mean(precisions), "by_chance": chance}
    return found


def sentences(data: Path, kinds: set[str]) -> list[tuple[str, set[str]]]:
    """50 sentences of AudioCaps' test split that name one or two of the kinds, drawn at random, with these kinds."""
    rules = [NamingRules.read(data / f"keywords{name}.json") for name in ("", "_esc50")]
    with open(data / "captions" / "audiocaps_test.csv", encoding="utf-8", newline="") as file:
        captions = sorted({row["caption"] for row in csv.DictReader(file)})
    named = [(caption, set().union(*(rule.named(caption) for rule in rules)) & kinds) for caption in captions]
    known = [(caption, found) for caption, found in named if 1 <= len(found) <= 2]
    rows = np.random.default_rng(_SEED).choice(len(known), _SENTENCES, replace=False)
    return [known[row] for row in rows]


def measure_places(args: argparse.Namespace, work: Path, encoder: SoundEncoder) -> dict[str, Any]:
    """Events of a recording of 30 minutes, fold 5, that are among as many places as there are events of the kind."""
    folder = work / "long"
    folder.mkdir()
    events = plan_recording(args.data / "sound_events", 5, args.minutes)
    render_recording(args.data / "sound_events", events, args.minutes, folder / "long.flac")
    started = time.perf_counter()
    index = SoundIndex.update(folder, encoder)
    seconds, close, begun, chance = time.perf_counter() - started, 0, 0, 0
    for kind in sorted({event.event for event in events}):
        own = [event for event in events if event.event == kind]
        places = index.search(text=query_of(kind), top=len(own), places=len(own))
        middles = [(place["start"] + place["end"]) / 2 for place in places]
        spread = (np.arange(len(own)) + 0.5) * args.minutes * 60 / len(own)
        for event in own:
            close += any(event.start - _CLOSE_S <= middle <= event.end + _CLOSE_S for middle in middles)
            begun += any(abs(place["start"] - event.start) <= _CLOSE_S for place in places)
            chance += bool(((event.start - _CLOSE_S <= spread) & (spread <= event.end + _CLOSE_S)).any())
    shares = {"middle_within_2_s": close, "start_within_2_s": begun, "evenly_spaced_middles": chance}
    shares = {name: count / len(events) for name, count in shares.items()}
    return {"events": len(events), "places": len(index), **shares, "index_s": seconds}


def planted(path: Path, target: Path, kind: str, rng: np.random.Generator) -> Path:
    """Writes a copy of a recording: `gain`, `mp3`, `vorbis`, `opus`, `cut` or `resampled`, each at another level."""
    waveform, rate = load_audio(path)
    waveform = to_mono(waveform)
    waveform = waveform * min(10 ** (rng.uniform(-15, 6) / 20), 0.99 / max(np.abs(waveform).max(), 1e-6))
    low = {"compression_level": 0.9}
    if kind == "mp3":
        soundfile.write(target.with_suffix(".mp3"), resample(waveform, rate, 44_100), 44_100, **low)
        return target.with_suffix(".mp3")
    if kind in ("vorbis", "opus"):
        rate, waveform = (48_000, resample(waveform, rate, 48_000)) if kind == "opus" else (rate, waveform)
        soundfile.write(target.with_suffix(".ogg"), waveform, rate, format="OGG", subtype=kind.upper(), **low)
        return target.with_suffix(".ogg")
    if kind == "cut":
        start, end = rng.uniform(0.05, 0.3) * len(waveform), (1 - rng.uniform(0, 0.2)) * len(waveform)
        waveform = waveform[int(start) : int(end)]
    elif kind == "resampled":
        other = int(rng.choice([8_000, 11_025, 22_050, 44_100]))
        waveform, rate = resample(waveform, rate, other), other
    soundfile.write(target.with_suffix(".wav"), waveform, rate)
    return target.with_suffix(".wav")


def distinct_recordings(data: Path) -> list[Path]:
    """One recording of each group, of at least half a second: others of a group may be cuts of the same sound."""
    found: dict[str, Path] = {}
    for folder in ("recordings", "sound_events"):
        with open(data / folder / "metadata.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if float(row["duration_s"]) >= 0.5:
                    found.setdefault(row["group"] or row["file_name"], data / folder / row["file_name"])
    return list(found.values())


def measure_duplicates(args: argparse.Namespace, work: Path, encoder: SoundEncoder) -> dict[str, Any]:
    """Precision and recall of pairs, 100 of which were planted."""
    rng = np.random.default_rng(args.seed)
    recordings = distinct_recordings(args.data)
    recordings = [recordings[row] for row in rng.permutation(len(recordings))[:_RECORDINGS]]
    folder = work / "archive"
    (folder / "copies").mkdir(parents=True)
    sources = {f"{number:04d}{path.suffix}": path for number, path in enumerate(recordings)}
    for name, path in sources.items():
        (folder / name).symlink_to(path.resolve())
    kinds = [kind for codec in ("mp3", "vorbis", "opus") for kind in ("gain", codec, "cut", "resampled")]
    truth: dict[frozenset[str], str] = {}
    for number, row in enumerate(rng.choice(len(recordings), _COPIES, replace=False)):
        kind = kinds[number % len(kinds)]
        copy = planted(recordings[row], folder / "copies" / f"{number:03d}", kind, rng)
        truth[frozenset((f"{row:04d}{recordings[row].suffix}", f"copies/{copy.name}"))] = kind
    index = SoundIndex.update(folder, encoder)
    started = time.perf_counter()
    pairs = index.duplicates(**({} if args.threshold is None else {"threshold": args.threshold}))
    seconds, own = time.perf_counter() - started, {}
    for pair in pairs:
        names = frozenset(Path(pair[key]).relative_to(folder).as_posix() for key in ("path", "other"))
        own[names] = pair["similarity"]
    there = [pair for pair in own if not any(name.startswith("copies/") for name in pair)]
    # A copy is right with its original, and with what was the same as its original before.
    originals = {name: other for pair in truth for name, other in (sorted(pair, reverse=True),)}
    as_originals = {pair: frozenset(originals.get(name, name) for name in pair) for pair in own}
    wrong = [pair for pair in own if len(as_originals[pair]) > 1 and as_originals[pair] not in there]
    right = own.keys() & truth.keys()
    return {
        "recordings": len(recordings),
        "planted": len(truth),
        "found": len(right),
        "recall": len(right) / len(truth),
        "wrong_pairs_of_copies": [sorted(pair) for pair in wrong],
        "precision_of_pairs_of_copies": len(right) / max(len(right) + len(wrong), 1),
        "precision_if_all_others_are_wrong": len(right) / max(len(own), 1),
        "missed": [(sorted(pair), kind) for pair, kind in truth.items() if pair not in own],
        "similarities_of_copies": sorted(own[pair] for pair in right),
        # The same sound in two collections, or not: to be judged by their names.
        "pairs_that_were_there": [[own[pair], *(sources[name] for name in sorted(pair))] for pair in there],
        "duplicates_s": seconds,
    }


def write_slices(data: Path, folder: Path, count: int) -> None:
    """Files of one second, cut out of recordings."""
    paths, made = sorted((data / "recordings").rglob("*.ogg")) + sorted((data / "recordings").rglob("*.opus")), 0
    rng = np.random.default_rng(_SEED)
    while made < count:
        waveform, rate = load_audio(str(paths[rng.integers(len(paths))]))
        waveform, length = to_mono(waveform), int(rate * _FILE_S)
        for _ in range(8):
            start = int(rng.integers(max(1, len(waveform) - length)))
            place = folder / f"{made // 1000:03d}"
            place.mkdir(parents=True, exist_ok=True)
            soundfile.write(place / f"{made:06d}.wav", waveform[start : start + length], rate)
            made += 1


def measure_scale(args: argparse.Namespace, work: Path, encoder: SoundEncoder) -> dict[str, Any]:
    """Two runs of `recap index` over 20,000 files, and searches."""
    folder = work / "files"
    write_slices(args.data, folder, args.files)
    found: dict[str, Any] = {"files": args.files}
    for name in ("first", "second"):
        command = [sys.executable, "-m", "recap_cli", "index", str(folder)]
        started, resident = time.perf_counter(), []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            while process.poll() is None:
                resident.append(_resident_mb(process.pid))
                time.sleep(1.0)
            found[name] = {"s": time.perf_counter() - started, "says": process.stdout.read().strip()}
        # Of a run's second half, when everything is loaded.
        quarters = [resident[int(len(resident) * share)] for share in (0.25, 0.5, 0.75, 0.95)]
        found[name]["resident_mb_at_25_50_75_95_percent"] = [round(value) for value in quarters]
    index = SoundIndex.load(folder, encoder)
    texts = np.stack([encoder.embed_text(query_of(kind)) for kind in QUERIES for _ in range(6)])
    found["second_over_first"] = found["second"]["s"] / found["first"]["s"]
    found["search_ms"] = single_query_ms(lambda query: index.nearest(query[0]), texts)
    found["index"] = index.store.index
    return found


def _resident_mb(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def measure_kill(args: argparse.Namespace, work: Path, encoder: SoundEncoder) -> dict[str, Any]:
    """An update that is killed at 20 random moments: what the index holds after each, and at the end."""
    folder, whole = work / "files", work / "whole"
    write_slices(args.data, folder, _KILLED_FILES)
    expected = _contents(SoundIndex.update(folder, encoder, index=whole))
    rng, places = np.random.default_rng(args.seed), []
    for _ in range(_KILLS):
        child = os.fork()
        if not child:
            updating._SAVED_EVERY_S = _SAVED_EVERY_S
            SoundIndex.update(folder, encoder)
            os._exit(0)
        time.sleep(rng.uniform(0.05, _LONGEST_S))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / ".recap-index" / "datastore.json").is_file():
            index = SoundIndex.load(folder, encoder)
            index.nearest(encoder.embed_text("rain"))
            places.append(len(index))
        else:
            places.append(None)
    final = SoundIndex.update(folder, encoder)
    found = {"files": _KILLED_FILES, "kills": _KILLS, "places": places, "then_encoded": final.report["encoded"]}
    return found | {"whole": _contents(final) == expected}


def _contents(index: SoundIndex) -> set[tuple[str, float, float]]:
    return {(record["caption"], record["start"], record["end"]) for record in index.store.records}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "search": measure_search,
    "places": measure_places,
    "duplicates": measure_duplicates,
    "scale": measure_scale,
    "kill": measure_kill,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="see above")
    parser.add_argument("--work", metavar="DIR", help="for archives and indexes (default: a temporary folder)")
    parser.add_argument("--model", help="folder or Hub id (default: the one in the package)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the long recording (default: 30)")
    parser.add_argument("--files", type=int, default=_FILES, help="of `scale` (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="of duplicates (default: the index's)")
    parser.add_argument("--seed", type=int, default=_SEED)
    args = parser.parse_args(argv)
    # A process that is forked for `kill` cannot use the threads of its parent.
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        found = MEASUREMENTS[args.measurement](args, work, SoundEncoder.of(args.model))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(found, indent=1, default=str, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
