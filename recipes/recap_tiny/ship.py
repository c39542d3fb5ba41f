"""The captioner that ships: `python -m recipes.recap_tiny.ship CAPTIONER DATA OUT --threshold X [--folds ...]`.

Writes weights and embeddings in half precision, the decoding and the threshold of recap-tiny, `ATTRIBUTION.md`, and
`RECORDINGS.csv`: every recording that the training used, with its source, author and licence. The code is not written:
it is in the package.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .grammar import word_stem
from .recordings import labelled_recordings

# Five beams, reranked by CLAP beside the score of the search. Few captions of known sounds are further from their
# recordings than a retrieved one by this margin, and most of sounds that the language model never read.
DECODING = {"num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 30}
DECODING |= {"rerank": "clap", "rerank_weight": 4.0, "copy_margin": 0.05}


def ship(captioner: str, out: Path, threshold: float) -> None:
    """Writes the folder of a captioner for the package."""
    from recap_hf import CaptionDatastore, RecapForConditionalGeneration, RecapProcessor

    model = RecapForConditionalGeneration.from_pretrained(captioner, dtype="float32")
    processor = RecapProcessor.from_pretrained(captioner)
    for name, value in DECODING.items():
        setattr(model.generation_config, name, value)
    model.generation_config.no_repeat_token_groups = word_groups(processor.tokenizer)
    processor.retrieval_score_threshold = threshold
    store = processor.datastore
    half = np.asarray(store.embeddings, dtype=np.float16)
    records = [{"caption": record["caption"]} for record in store.records]
    processor.datastore = CaptionDatastore(records, half, store.fingerprint)
    # Of a captioner that was shipped there before: its files would stay beside the new ones.
    shutil.rmtree(out / "datastore", ignore_errors=True)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    # Stored in half precision, loaded in single: most CPUs compute faster in it.
    _replace(settings, "dtype", "float32")
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in [*out.glob("*_recap.py"), *out.glob("README.md")]:
        path.unlink()


def word_groups(tokenizer: Any) -> list[int]:
    """For each token the number of the word that it begins, the same for its forms; 0 for function words and the
    rest of words: a caption names no sound twice."""
    stems: dict[str, int] = {}
    groups = []
    for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        # Shorter ones begin rare words of any kind, but for the hi-hat.
        word = re.fullmatch("\u0120([A-Za-z]{3,}|[Hh]i)", token)
        stem = word_stem(word[1].lower()) if word else None
        # What two sounds may have in common, but for this: "Music plays, then music plays".
        stem = "music" if word and word[1].lower() == "music" else stem
        groups.append(0 if stem is None else stems.setdefault(stem, len(stems) + 1))
    return groups


def _replace(settings: dict, name: str, value: str) -> None:
    for key, entry in settings.items():
        if isinstance(entry, dict):
            _replace(entry, name, value)
        elif key == name:
            settings[key] = value


def write_recordings(data: Path, folds: Sequence[int], path: Path) -> int:
    """The recordings of the training as a CSV file; returns their number."""
    used = {recording.clip_id for recording in labelled_recordings(data, folds)}
    rows = []
    for folder in ("recordings", "sound_events"):
        with open(data / folder / "metadata.csv", encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                if f"{folder}/{row['file_name']}" in used:
                    author = row.get("author_or_attribution") or row.get("freesound_id") or ""
                    rows.append((f"{folder}/{row['file_name']}", row["source"], author, row["licence"]))
    with open(path, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([("recording", "source", "author", "licence"), *rows])
    return len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captioner", help="folder of `recap train`")
    parser.add_argument("data", help="folder with recordings/ and sound_events/")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--threshold", type=float, required=True, help="cosine that the nearest caption must reach")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help="that the training used (1 2 3)")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "processor_config.json").is_file():
        parser.error(f"{out} is neither empty nor a folder of a captioner: give another one")
    with torch.no_grad():
        ship(arguments.captioner, out, arguments.threshold)
    count = write_recordings(Path(arguments.data), arguments.folds, out / "RECORDINGS.csv")
    shutil.copyfile(Path(__file__).with_name("ATTRIBUTION.md"), out / "ATTRIBUTION.md")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB, trained on {count} recordings")


if __name__ == "__main__":
    main()
