"""Batch work that is killed: `recap caption --resume`, and captions written into recordings.

    python -m benchmarks.batch_work resume RECORDINGS --kills 3
    python -m benchmarks.batch_work metadata --files 200 --kills 20

`resume` captions a folder in one run and in a run that is killed (SIGKILL) and resumed, and compares the files.
`metadata` makes recordings of all formats, writes metadata into them again and again, kills that process at random
moments, and lets ffmpeg decode and hash every file after each. ffprobe reads the captions of a last run that is not
killed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.fuzzing_mutants import write_recording

FORMATS = ("wav", "flac", "ogg", "opus", "mp3", "aiff", "m4a")
_RATE = 48_000
_WRITER = """
import sys
from pathlib import Path
from recap_hf.audio.metadata import SoundDescription, write_metadata
print("ready", flush=True)
for turn in range(int(sys.argv[2])):
    for path in sorted(Path(sys.argv[1]).iterdir()):
        if not path.name.startswith("."):
            text = f"caption {turn} of {path.name}"
            write_metadata(path, SoundDescription(text, ("Rain", "Dog"), "recap_hf"), overwrite=True)
"""


def resume(folder: str, kills: int, options: list[str]) -> dict:
    """The same bytes with and without kills?"""
    with tempfile.TemporaryDirectory() as work:
        whole, output = Path(work, "whole.jsonl"), Path(work, "killed.jsonl")
        command = [sys.executable, "-m", "recap_cli", "caption", folder, "--quiet", *options, "--output"]
        began = time.monotonic()
        subprocess.run([*command, str(whole)], check=False)
        took, rows = time.monotonic() - began, len(whole.read_text().splitlines())
        journal, done = Path(f"{output}.resume"), []
        for kill in range(1, kills + 1):
            process = subprocess.Popen([*command, str(output), "--resume"])
            while process.poll() is None and (not journal.exists() or _done(journal) < kill * rows / (kills + 1)):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            done.append(_done(journal))
        again = time.monotonic()
        status = subprocess.run([*command, str(output), "--resume"], check=False).returncode
        return {
            "recordings": rows,
            "one_run_s": took,
            "done_when_killed": done,
            "last_run_s": time.monotonic() - again,
            "status": status,
            "same_bytes": output.read_bytes() == whole.read_bytes(),
        }


def _done(journal: Path) -> int:
    lines = journal.read_text(encoding="ascii").splitlines(keepends=True)[1:]
    return sum(len(json.loads(line)["results"]) for line in lines if line.endswith("\n"))


def metadata(files: int, kills: int, seed: int = 0) -> dict:
    """What ffmpeg says of every file after each kill."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        paths = [_make(folder / f"{number:03}.{FORMATS[number % len(FORMATS)]}", number) for number in range(files)]
        hashes = {path: _ffmpeg(path) for path in paths}
        broken: list[str] = []
        moments = []
        for kill in range(kills + 1):
            turns = "1000000" if kill < kills else "1"
            process = subprocess.Popen([sys.executable, "-c", _WRITER, work, turns], stdout=subprocess.PIPE)
            process.stdout.readline()
            if kill < kills:
                moments.append(rng.uniform(0, 2))
                time.sleep(moments[-1])
                process.kill()
            process.wait()
            broken += [path.name for path in paths if hashes[path] is None or _ffmpeg(path) != hashes[path]]
        left = len(list(folder.glob(".*")))
        tags = Counter(path.suffix for path in paths if _has_caption(path))
        return {
            "files": Counter(path.suffix for path in paths),
            "captions_read_by_ffprobe": tags,
            "kills_at_s": [round(moment, 2) for moment in moments],
            "broken": broken,
            "temporary_files_left": left,
        }


def _make(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    sound = 0.1 * rng.standard_normal((1 + seed % 2, int(_RATE * rng.uniform(0.5, 3)))).astype(np.float32)
    form = path.suffix[1:]
    write_recording(path, {"wav": "16.wav", "ogg": "vorbis.ogg"}.get(form, form), sound, _RATE)
    return path


def _ffmpeg(path: Path) -> str | None:
    """Hashes of the encoded and of the decoded sound; `None` if ffmpeg fails or complains."""
    hashes = ["-map", "0:a", "-c", "copy", "-f", "hash", "-", "-map", "0:a", "-f", "hash", "-"]
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(path), *hashes], capture_output=True, text=True, check=False
    )
    return None if done.returncode or done.stderr else done.stdout


def _has_caption(path: Path) -> bool:
    command = ["ffprobe", "-v", "error", "-show_format", "-show_streams", "-of", "json", str(path)]
    return f"of {path.name}" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("resume")
    one.add_argument("folder")
    one.add_argument("--kills", type=int, default=3)
    other = commands.add_parser("metadata")
    other.add_argument("--files", type=int, default=200)
    other.add_argument("--kills", type=int, default=20)
    args, options = parser.parse_known_args(argv)
    report = (
        metadata(args.files, args.kills) if args.command == "metadata" else resume(args.folder, args.kills, options)
    )
    print(json.dumps(report, indent=1))
    good = not report["broken"] if args.command == "metadata" else report["same_bytes"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
