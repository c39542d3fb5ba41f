"""What the package does with damaged and hostile files.

    python -m benchmarks.fuzzing --audio 5000 --checkpoints 500 --datastores 500 --agreement 200

Mutants of valid recordings of every format, of a checkpoint and of its datastores are given to a process. Each must be
read or refused in one line. A finding is: a crash, a traceback, more than 10 s of processor time, more than 3 GB, or
code that was run. The status is 1 if there is one, and `--findings FOLDER` keeps its files. With `--agreement`,
recordings of all formats, whole and cut, are captioned and given to `recap timeline`, which must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzzing_mutants import (
    FORMATS,
    cut,
    linked_copy,
    mutate_checkpoint,
    mutate_datastore,
    mutate_recording,
    valid_recordings,
)
from benchmarks.fuzzing_worker import GIGABYTES, SECONDS, Worker
from recap_cli import main as recap
from recap_hf import CaptionDatastore, default_model_path
from recap_hf.audio.stream import AudioStream
from recap_hf.audio.timeline import caption_timeline
from recap_hf.datastore import index_datastore
from recap_hf.files import write_json
from recap_hf.modeling.captioning_recap import READ_ERRORS, Captioner
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.recordings import reason_of

GOOD = ("read", "read, with a warning", "refused")
BAD = ("crash", "hang", "memory", "traceback", "code run", "unclear", "disagree")
SHARES = (1.0, 0.3, 0.5, 0.9, 0.99)
# Every so many recordings are captioned, too; the others are read to the features of the model.
_CAPTIONED = 10
_PACKAGE = Path(sys.modules[CaptionDatastore.__module__].__file__).parent.parent
Outcome = tuple[str, str]


# ---------------------------------------------------------------- in a worker


class Trials:
    """What is done with a mutant, in a process of its own: each method returns the outcome and its reason."""

    def __init__(self, model: str, clip: str) -> None:
        self.model, self.clip, self.count = model, clip, 0
        self.captioner = Captioner.from_pretrained(model, device="cpu")
        # Of captions that need only be there.
        self.short = self.captioner.with_options(CaptionOptions(num_beams=1, max_new_tokens=4, rerank="none"))

    def recording(self, path: str) -> Outcome:
        """Reading as `recap caption` and as `recap timeline` do, which must agree."""
        self.count += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read, reason = _attempt(path, lambda: self._features(path))
        streamed, other = _attempt(path, lambda: sum(len(block) for block in AudioStream(path)))
        if (read, streamed).count("read") == 1 and "unclear" not in (read, streamed):
            return "disagree", f"{reason or 'read'}; as a stream: {other or 'read'}"
        if read == "read" and caught:
            return "read, with a warning", str(caught[0].message)
        return max((read, reason), (streamed, other), key=lambda one: one[0] == "unclear")

    def _features(self, path: str) -> None:
        waveform = self.captioner.read(path)
        if self.count % _CAPTIONED:
            self.captioner.processor(audio=[waveform], sampling_rate=self.captioner.sampling_rate)
        else:
            self.captioner.caption([waveform])

    def both(self, path: str) -> Outcome:
        """The caption and the timeline of a recording."""
        ((_, result),) = self.short.caption_stream([path], 1)
        timed, other = _attempt(path, lambda: list(caption_timeline(self.short, path)))
        reason = reason_of(path, result) if isinstance(result, Exception) else ""
        if bool(reason) != (timed != "read"):
            return "disagree", f"{reason or 'captioned'}; as a timeline: {other or 'captioned'}"
        return "refused" if reason else "read", reason

    def checkpoint(self, path: str) -> Outcome:
        return _command(["caption", self.clip, "--model", path, "--max-new-tokens", "4"], path)

    def datastore(self, path: str) -> Outcome:
        outcome = _command(["datastore", "info", path, "--queries", "4"], path)
        if outcome[0] != "refused":
            caption = ["caption", self.clip, "--model", self.model, "--datastore", path, "--max-new-tokens", "4"]
            outcome = _command(caption, path)
        return outcome


def _attempt(path: str, work: Callable[[], Any]) -> Outcome:
    try:
        work()
    except READ_ERRORS as error:
        # What neither the system nor the package says is a traceback in disguise.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(frame.filename).is_relative_to(_PACKAGE) and "raise" in (frame.line or "")
        known = ours or (isinstance(error, OSError) and error.strerror)
        return "refused" if known else "unclear", f"{type(error).__name__}: {reason_of(path, error)}"
    return "read", ""


def _command(arguments: list[str], path: str) -> Outcome:
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = recap(arguments)
    errors = said.getvalue().strip()
    if "Traceback" in errors:
        return "traceback", errors
    if not status:
        return ("read, with a warning" if errors else "read"), errors
    # One line that names the folder or, where there is only one, the datastore, beside what libraries warn of.
    lines = [line for line in errors.splitlines() if ": warning: " not in line]
    named = len(lines) == 1 and (path in lines[0] or "error: The datastore was made by another CLAP" in lines[0])
    return ("refused" if named else "unclear"), errors


# ------------------------------------------------------------- in the parent


class Fuzzer:
    """Gives mutants to a worker and counts what comes of them."""

    def __init__(self, model: Path, folder: Path, seed: int, findings: Path | None, seconds: float) -> None:
        self.model, self.folder, self.seed, self.findings = model, folder, seed, findings
        self.marker = folder / "code_was_run"
        self.recordings = valid_recordings(folder / "recordings", seconds)
        self.worker = Worker(Trials, str(model), str(self.recordings[0]))
        self.found: list[dict[str, Any]] = []

    def _mutants(self, kind: str, count: int) -> Iterator[tuple[str, Path]]:
        """What was done, and the path of each mutant."""
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        stores = self._stores() if kind == "datastore" else []
        for number in range(count):
            rng = random.Random(f"{self.seed} {kind} {number}")
            path = folder / "mutant"
            if kind == "recording":
                done, path = mutate_recording(self.recordings[number % len(self.recordings)], folder, rng)
            elif kind == "checkpoint":
                done = mutate_checkpoint(self.model, path, self.marker, rng)
            else:
                done = mutate_datastore(stores[number % len(stores)], path, self.marker, rng)
            yield done, path
            (shutil.rmtree if path.is_dir() else os.remove)(path)

    def _stores(self) -> list[Path]:
        """The checkpoint's datastore, and the same with an index."""
        own = self.model / "datastore"
        indexed = self.folder / "indexed"
        linked_copy(own, indexed)
        with contextlib.redirect_stderr(io.StringIO()):
            index_datastore(indexed, "hnsw", recall=0.5)
        return [own, indexed]

    def run(self, kind: str, count: int) -> dict[str, Any]:
        """Counts of the outcomes of `count` mutants, and the seconds of the slowest."""
        counts, slowest = Counter(), 0.0
        for number, (done, path) in enumerate(self._mutants(kind, count)):
            outcome, reason, seconds = self.worker.try_one(kind, path)
            if self.marker.exists():
                outcome = "code run"
                self.marker.unlink()
            counts[outcome] += 1
            slowest = max(slowest, seconds)
            if outcome in BAD:
                finding = {"kind": kind, "number": number, "mutation": done, "outcome": outcome, "reason": reason}
                self._keep(finding, path)
        outcomes = {name: counts[name] for name in (*GOOD, *BAD)}
        return {"kind": kind, "mutants": count, **outcomes, "slowest s": slowest}

    def agree(self, count: int) -> list[dict[str, Any]]:
        """For whole recordings and each share of them, how many are captioned and refused by both commands."""
        folder, rows = self.folder / "cut", []
        folder.mkdir()
        rng = random.Random(self.seed)
        shuffled = rng.sample(self.recordings, len(self.recordings))
        files = [shuffled[number % len(shuffled)] for number in range(count)]
        for share in SHARES:
            counts = Counter()
            for number, path in enumerate(files):
                # Beyond one of each recording the place varies by a few bytes.
                exact = share if number < len(self.recordings) or share == 1 else share - rng.random() / 100
                mutant = cut(path, folder, exact)
                outcome, reason, _ = self.worker.try_one("both", mutant)
                counts[outcome] += 1
                if outcome in BAD:
                    entry = {"kind": "both", "number": number, "mutation": f"cut at {exact:.4f}"}
                    self._keep({**entry, "outcome": outcome, "reason": reason}, mutant)
                mutant.unlink()
            row = {"kept": share, "files": count, "captioned": counts["read"], "refused": counts["refused"]}
            rows.append(row | {name: counts[name] for name in BAD if counts[name]})
        return rows

    def _keep(self, finding: dict[str, Any], path: Path) -> None:
        self.found.append({**finding, "file": path.name})
        print(json.dumps(self.found[-1]), file=sys.stderr, flush=True)
        if self.findings is not None:
            target = self.findings / f"{finding['kind']}-{finding['number']}-{path.name}"
            self.findings.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, 0) for name in names] for row in rows]
    texts = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *texts))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzzing", description=__doc__.partition("\n")[0])
    parser.add_argument("--audio", type=int, default=0, metavar="N", help="mutants of recordings")
    parser.add_argument("--checkpoints", type=int, default=0, metavar="N", help="mutants of a checkpoint")
    parser.add_argument("--datastores", type=int, default=0, metavar="N", help="mutants of datastores")
    parser.add_argument("--agreement", type=int, default=0, metavar="N", help="recordings, captioned in both ways")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the recordings (default: 2)")
    parser.add_argument("--model", type=Path, help="folder of a captioner with a datastore (default: the package's)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--findings", type=Path, metavar="FOLDER", help="keep the mutants that are findings there")
    parser.add_argument("--output", metavar="FILE", help="write counts and findings there as JSON")
    args = parser.parse_args(argv)
    numbers = {"recording": args.audio, "checkpoint": args.checkpoints, "datastore": args.datastores}
    with tempfile.TemporaryDirectory() as name:
        # On one file system, so that copies are links.
        model = Path(name) / "model"
        shutil.copytree(args.model or default_model_path(), model)
        fuzzer = Fuzzer(model, Path(name), args.seed, args.findings, args.seconds)
        try:
            rows = [fuzzer.run(kind, count) for kind, count in numbers.items() if count]
            agreement = fuzzer.agree(args.agreement) if args.agreement else []
        finally:
            fuzzer.worker.stop()
    print(f"{len(FORMATS)} formats, at most {SECONDS} s of processor time and {GIGABYTES} GB for a mutant")
    for part in (rows, agreement):
        if part:
            print(table(part))
    if args.output:
        write_json(args.output, {"rows": rows, "agreement": agreement, "findings": fuzzer.found})
    return 1 if fuzzer.found else 0


if __name__ == "__main__":
    sys.exit(main())
