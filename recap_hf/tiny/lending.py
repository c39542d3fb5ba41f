"""Datastores of one's own lent to recap-tiny: `python -m recap_hf.tiny.lending [MODEL]` prints what it says then.

Three text files, as for `recap caption CLIP --datastore FILE.txt`, and three of the example recordings. What can be
had without training is shown beside what cannot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recap_hf.cli.status import exit_status

if TYPE_CHECKING:
    from recap_hf import RecapForConditionalGeneration, RecapProcessor

__all__ = ["DATASTORES", "RECORDINGS", "format_lent", "lend"]

DATASTORES: dict[str, tuple[str, ...]] = {
    "the sounds that it knows, in other words": (
        "Rain drums on the roof of the shed.",
        "A flute plays a slow melody in the park.",
        "Somebody thumps the bass drum of the marching band.",
        "Waves wash up on the sand.",
        "A man sneezes in the next room.",
    ),
    "some of the sounds that it knows": (
        "a flute playing",
        "a clarinet playing",
        "a cello playing",
        "a snare drum",
        "a bass drum",
    ),
    "sounds that it has never heard": (
        "a cat meowing",
        "a cow mooing",
        "a train passing",
        "a church bell tolling",
        "wind howling",
        "A large crowd cheers in a stadium.",
    ),
}
RECORDINGS = ("rain", "flute", "bass_drum")


def lend(model: RecapForConditionalGeneration, processor: RecapProcessor) -> list[dict[str, Any]]:
    """Captions of the recordings with the own datastore and with each of `DATASTORES`; the processor keeps its own.

    Returns:
        One dict a datastore: `datastore`, its name, and per recording {"caption", "score"}, the score that of the
        most similar caption.
    """
    from recap_hf import AudioCaptioningPipeline, CaptionDatastore, examples_path

    own = processor.datastore
    rows = []
    try:
        for name, captions in {"its own": (), **DATASTORES}.items():
            processor.datastore = CaptionDatastore.from_captions(list(captions), model, processor) if captions else own
            captioner = AudioCaptioningPipeline(model=model, processor=processor)
            row: dict[str, Any] = {"datastore": name}
            for recording in RECORDINGS:
                result = captioner(str(examples_path() / f"{recording}.flac"))
                row[recording] = {"caption": result["caption"], "score": result["retrieved"][0]["score"]}
            rows.append(row)
    finally:
        processor.datastore = own
    return rows


def format_lent(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what `lend` returns: caption and highest similarity."""
    lines = [
        "| datastore | " + " | ".join(f"{name}.flac" for name in RECORDINGS) + " |",
        "| --- |" + " --- |" * len(RECORDINGS),
    ]
    for row in rows:
        cells = [f"{row[name]['caption']} ({row[name]['score']:.2f})" for name in RECORDINGS]
        lines.append(f"| {row['datastore']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a checkpoint, the embedded default if none is named."""
    from recap_hf.loading import load_pair

    parser = argparse.ArgumentParser(prog="python -m recap_hf.tiny.lending", description=__doc__)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint; the embedded default if not given")
    args = parser.parse_args(argv)
    print(format_lent(lend(*load_pair(args.model, "cpu", quiet=True))))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("python -m recap_hf.tiny.lending", main))
