"""A folder of single sounds as a dataset in Clotho's layout: real audio, five captions a clip, to try training on.

`python -m benchmarks.clotho_stand_in SOUNDS OUT` writes the CSVs of the three splits beside folders of audio.
The captions are those of `recap-tiny`'s grammar; splits are made of folds, which never share a recording.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SPLITS = {"development": (1, 2, 3), "validation": (4,), "evaluation": (5,)}
_CAPTIONS = 5
_RATE = 48_000


def make_clotho_stand_in(
    sounds: str | Path,
    output: str | Path,
    splits: Mapping[str, Sequence[int]] = SPLITS,
    mixtures: int = 0,
    seed: int = 0,
) -> Path:
    """Writes the dataset; returns its folder.

    Args:
        sounds: folder of single sounds with `metadata.csv` (`file_name, event, fold, source`).
        output: where to write.
        splits: folds of each split.
        mixtures: mixtures of two sounds in the development split, half as many in the others.
        seed: of the captions and mixtures.

    Raises:
        FileNotFoundError, ValueError: if `sounds` is no such folder, or a split has no sound.
    """
    from benchmarks.sound_events import read_metadata

    rows, output = read_metadata(sounds), Path(output)
    for number, (split, folds) in enumerate(splits.items()):
        chosen = [row for row in rows if int(row["fold"]) in folds]
        if not chosen:
            raise ValueError(f"{sounds} has no sound in the folds {', '.join(map(str, folds))} ({split})")
        count = mixtures if split == "development" else mixtures // 2
        _write_split(Path(sounds), output, split, chosen, count, np.random.default_rng([seed, number]))
    return output


def _write_split(
    sounds: Path, output: Path, split: str, rows: list[dict[str, str]], mixtures: int, rng: np.random.Generator
) -> None:
    import soundfile

    from benchmarks.grid_stand_ins import mix
    from benchmarks.sound_events import load_mono
    from recipes.recap_tiny.grammar import Sound, describe

    folder = output / split
    folder.mkdir(parents=True, exist_ok=True)
    with open(output / f"clotho_captions_{split}.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["file_name", *(f"caption_{number}" for number in range(1, _CAPTIONS + 1))])
        # In random order: the first clips are a sample of all events.
        for row in (rows[place] for place in rng.permutation(len(rows))):
            name = row["file_name"].replace("/", "-")
            shutil.copyfile(sounds / row["file_name"], folder / name)
            writer.writerow([name, *(describe([Sound(row["event"])], rng, "overlap") for _ in range(_CAPTIONS))])
        for number in range(mixtures):
            first = rows[rng.integers(len(rows))]
            others = [row for row in rows if row["event"] != first["event"]]
            pair = (first, others[rng.integers(len(others))])
            relation = ("overlap", "sequence")[number % 2]
            waveform = mix(*(load_mono(sounds / row["file_name"]) for row in pair), relation)
            name = f"mixture-{number:04d}.flac"
            soundfile.write(folder / name, waveform.clip(-1, 1), _RATE, subtype="PCM_16")
            scene = [Sound(row["event"]) for row in pair]
            writer.writerow([name, *(describe(scene, rng, relation) for _ in range(_CAPTIONS))])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the stand-in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clotho_stand_in", description=__doc__)
    parser.add_argument("sounds", help="folder of single sounds with metadata.csv")
    parser.add_argument("output", help="folder to write")
    for split, folds in SPLITS.items():
        default = ",".join(map(str, folds))
        parser.add_argument(f"--{split}", default=default, metavar="FOLDS", help=f"folds of it (default {default})")
    parser.add_argument("--mixtures", type=int, default=0, help="mixtures of two in the development split (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and mixtures (default 0)")
    args = parser.parse_args(argv)
    try:
        splits = {split: [int(fold) for fold in getattr(args, split).split(",")] for split in SPLITS}
        print(make_clotho_stand_in(args.sounds, args.output, splits, args.mixtures, args.seed))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
