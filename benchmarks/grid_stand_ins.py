"""Two small domains with different events, from a folder of single sounds: the paper's grid without its data.

Usage: `python -m benchmarks.grid_stand_ins SOUNDS OUT`. Writes two datasets in the `audiofolder` layout with single
sounds and mixtures of two, captions from a grammar, the number of events of each clip, and a `grid.yaml` for
`recap grid`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import yaml

from benchmarks.sound_events import load_mono, read_metadata
from recipes.recap_tiny.grammar import Sound, describe

DOMAINS = {
    "outdoors": ("dog_bark", "rain", "sea_waves", "helicopter", "chainsaw", "rooster", "fire_crackling"),
    "indoors": ("baby_cry", "clock_tick", "person_sneeze", "man_speaking", "violin", "snare_drum", "acoustic_guitar"),
}
FOLDS = {"train": ("1", "2", "3"), "validation": ("4",), "test": ("5",)}
_RATE = 48_000
_SPLIT_SHARES = {"train": 1.0, "validation": 0.5, "test": 1.0}


@dataclass(frozen=True)
class Recipe:
    """How many clips a domain has.

    Args:
        mixtures: mixtures of two events in the training and in the test split, half as many in the validation split.
        captions: references of a clip.
        seed: of the draws.
    """

    mixtures: int = 60
    captions: int = 5
    seed: int = 0


def make_stand_ins(sounds: str | Path, output: str | Path, recipe: Recipe | None = None) -> Path:
    """Writes both domains and the grid; returns the path of `grid.yaml`.

    Args:
        sounds: folder of single sounds with `metadata.csv` (`file_name, event, fold, source, licence`).
        output: where to write.
        recipe: sizes.

    Raises:
        FileNotFoundError, ValueError: if `sounds` is no such folder, or a domain has no sound in a split.
    """
    recipe = recipe or Recipe()
    output = Path(output)
    rows = read_metadata(sounds)
    for number, (name, events) in enumerate(DOMAINS.items()):
        generator = np.random.default_rng([recipe.seed, number])
        writer = _DomainWriter(Path(sounds), output / name, recipe, generator)
        for split, folds in FOLDS.items():
            chosen = [row for row in rows if row["event"] in events and str(row["fold"]) in folds]
            if len({row["event"] for row in chosen}) < 2:
                raise ValueError(
                    f"{sounds} has sounds of fewer than two {name} events in the folds {', '.join(folds)}"
                )
            writer.write_split(split, chosen)
        writer.close()
    path = output / "grid.yaml"
    path.write_text(_grid_yaml(output), encoding="utf-8")
    return path


class _DomainWriter:
    def __init__(self, sounds: Path, folder: Path, recipe: Recipe, generator: np.random.Generator) -> None:
        self.sounds, self.folder, self.recipe, self.generator = sounds, folder, recipe, generator
        folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[list[str]] = []
        self._events: list[list[str]] = []

    def write_split(self, split: str, rows: list[dict[str, str]]) -> None:
        for row in rows:
            name = f"{split}-{Path(row['file_name']).stem}"
            self._add(name, split, load_mono(self.sounds / row["file_name"]), [row], "overlap")
        for number in range(int(self.recipe.mixtures * _SPLIT_SHARES[split])):
            pair = self._draw_pair(rows)
            relation = ("overlap", "sequence")[number % 2]
            waveforms = [load_mono(self.sounds / row["file_name"]) for row in pair]
            self._add(f"{split}-mixture-{number:03d}", split, mix(*waveforms, relation), pair, relation)

    def _draw_pair(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        first = rows[self.generator.integers(len(rows))]
        others = [row for row in rows if row["event"] != first["event"]]
        return [first, others[self.generator.integers(len(others))]]

    def _add(self, name: str, split: str, waveform: np.ndarray, rows: Sequence[dict[str, str]], relation: str) -> None:
        soundfile.write(self.folder / f"{name}.flac", waveform.clip(-1, 1), _RATE, subtype="PCM_16")
        scene = [Sound(row["event"]) for row in rows]
        captions = [describe(scene, self.generator, relation) for _ in range(self.recipe.captions)]
        source = " + ".join(dict.fromkeys(row["source"] for row in rows))
        licence = " + ".join(dict.fromkeys(row.get("licence") or "not stated" for row in rows))
        self._rows.append([f"{name}.flac", *captions, split, source, licence])
        self._events.append([name, str(len(rows))])

    def close(self) -> None:
        columns = [f"caption_{number}" for number in range(1, self.recipe.captions + 1)]
        _write_csv(self.folder / "metadata.csv", ["file_name", *columns, "split", "source", "licence"], self._rows)
        _write_csv(self.folder / "events.csv", ["clip_id", "events"], self._events)


def mix(first: np.ndarray, second: np.ndarray, relation: str) -> np.ndarray:
    """Two sounds of equal loudness, at most 10 s: at once, or one after the other with half a second between them.

    Args:
        first, second: mono at 48 kHz.
        relation: `overlap` or `sequence`.
    """
    limit = 10 * _RATE
    if relation == "sequence":
        half = (limit - _RATE // 2) // 2
        first, second = _level(first[:half]), _level(second[:half])
        return np.concatenate([first, np.zeros(_RATE // 2), second])
    length = min(limit, max(len(first), len(second)))
    # A short sound is repeated, as CLAP's feature extractor repeats short clips.
    return 0.5 * (_level(np.resize(first, length)) + _level(np.resize(second, length)))


def _level(waveform: np.ndarray) -> np.ndarray:
    """`waveform` at an effective level of 0.1, its peaks at most 1."""
    level = np.sqrt(np.mean(waveform**2)) or 1.0
    scaled = waveform * (0.1 / level)
    return scaled / max(1.0, np.abs(scaled).max())


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _grid_yaml(output: Path) -> str:
    domains = {
        name: {
            "dataset": "audiofolder",
            "data_dir": str(output / name),
            "events": str(output / name / "events.csv"),
        }
        for name in DOMAINS
    }
    grid = {
        "domains": domains,
        "large": {"files": []},
        "seeds": [42],
        "k": [4, 1, 2, 8],
        # A prefix is trained from scratch and needs a larger learning rate than cross-attention.
        "related_methods": {"prefix": {"learning_rate": 1e-3}, "audio_to_audio": {}},
        "shares": [0.03, 0.1, 0.3],
        "indexes": ["ivf_flat", "ivf_pq", "hnsw"],
        "training": {"num_train_epochs": 4, "batch_size": 16, "learning_rate": 3e-4, "device": "cpu"},
        "evaluation": {"batch_size": 16, "device": "cpu"},
    }
    note = "# `training` starts from the embedded default; give it a model, or clap and decoder, for others.\n"
    return note + yaml.safe_dump(grid, sort_keys=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the stand-ins."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid_stand_ins", description=__doc__)
    parser.add_argument("sounds", help="folder of single sounds with metadata.csv")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--mixtures", type=int, default=Recipe.mixtures, help="mixtures of two in a split (default 60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    args = parser.parse_args(argv)
    try:
        print(make_stand_ins(args.sounds, args.output, Recipe(mixtures=args.mixtures, seed=args.seed)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
