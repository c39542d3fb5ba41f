"""Boundaries and names of a timeline of a recording whose events are known, and its time and memory.

    python -m benchmarks.timeline --sounds FOLDER --output-dir DIR

It synthesises the recording, captions it with `recap timeline` in another process whose memory is watched, and
compares.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.naming import NamingRules
from benchmarks.timeline_recordings import plan_recording, render_recording, write_plan
from benchmarks.timeline_scores import boundary_figures, naming_figures
from recap_cli.files import open_output
from recap_cli.formats import TIMELINE_WRITERS
from recap_cli.status import exit_status

_EQUAL_S = 0.0011


def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one recording; they are written to `benchmark.json` in the output folder too."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recording = folder / "recording.flac"
    events = plan_recording(args.sounds, args.fold, args.minutes, args.seed)
    write_plan(events, folder / "events.json")
    render_recording(args.sounds, events, args.minutes, recording, args.seed)
    command = [sys.executable, "-m", "recap_cli", "timeline", str(recording), "--format", "jsonl"]
    command += ["--output-dir", str(folder), *(["--model", args.model] if args.model else []), *args.options]
    print(" ".join(command), file=sys.stderr, flush=True)
    cost = measure_memory(command, folder / "recording.jsonl", args.minutes * 60)
    lines = (folder / "recording.jsonl").read_text(encoding="utf-8").splitlines()
    segments = [json.loads(line) for line in lines]
    for kind in _READERS:
        with open_output(folder / f"recording{TIMELINE_WRITERS[kind].suffix}") as file:
            writer = TIMELINE_WRITERS[kind](file)
            writer.begin(recording.name)
            for segment in segments:
                writer.write(segment)
            writer.end(None)
            writer.close()
    rules = NamingRules.read(args.rules) if args.rules else NamingRules.ours()
    result = {
        "fold": args.fold,
        "minutes": args.minutes,
        "seed": args.seed,
        "segments": len(segments),
        "cost": cost,
        "boundaries": boundary_figures(segments, events),
        "naming": naming_figures(segments, events, rules.named),
        "formats": compare_formats(folder / "recording", segments),
    }
    (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def measure_memory(command: list[str], progress: Path, seconds: float) -> dict[str, Any]:
    """Runs a command and watches its memory while the segments that it writes come along.

    Args:
        command (`list[str]`): `recap timeline ...`.
        progress (`Path`): its JSONL, which tells how far it is.
        seconds (`float`): length of the recording.

    Returns:
        `dict`: `wall_s`, `real_time_factor` (of the whole command, loading included), and `rss_mib`: the resident
        memory by the minute of the recording that was reached, the highest value while it was the last.

    Raises:
        `RuntimeError`: if the command fails.
    """
    import psutil

    progress.unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(command)
    watched = psutil.Process(process.pid)
    by_minute: dict[int, float] = {}
    while process.poll() is None:
        try:
            resident = watched.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            break
        minute = int(_reached(progress) // 60)
        by_minute[minute] = max(by_minute.get(minute, 0.0), resident)
        time.sleep(0.1)
    if process.wait() != 0:
        raise RuntimeError(f"`{' '.join(command)}` ended with the status {process.returncode}.")
    wall = time.monotonic() - started
    return {
        "wall_s": round(wall, 1),
        "real_time_factor": round(wall / seconds, 3),
        "rss_mib": {str(minute): round(value) for minute, value in sorted(by_minute.items())},
    }


def _reached(progress: Path) -> float:
    """End of the last segment that is complete in a JSONL file; it has another name until the end."""
    lines: list[bytes] = []
    for path in (progress.with_name(f"{progress.name}.partial"), progress):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 20_000))
            lines = file.read().split(b"\n")[:-1]
            break
    return float(json.loads(lines[-1])["end"]) if lines and lines[-1].startswith(b"{") else 0.0


def compare_formats(stem: Path, segments: list[dict[str, Any]]) -> dict[str, str]:
    """What independent readers find in the subtitles and labels, beside the JSONL: `equal`, or what differs.

    SubRip is read by pysubs2, WebVTT by webvtt-py, the label track by pandas. A reader that
    is not installed is named.
    """
    expected = [(segment["start"], segment["end"], " ".join(segment["caption"].split())) for segment in segments]
    results = {}
    for name, read in _READERS.items():
        try:
            found = read(stem)
        except ImportError as error:
            results[name] = f"not compared: {error}"
            continue
        results[name] = _difference(found, expected)
    return results


def _difference(found: list[tuple[float, float, str]], expected: list[tuple[float, float, str]]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} cues, expected {len(expected)}"
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if abs(one[0] - other[0]) > _EQUAL_S or abs(one[1] - other[1]) > _EQUAL_S or one[2] != other[2]:
            return f"cue {index}: {one}, expected {other}"
    return "equal"


def _read_srt(stem: Path) -> list[tuple[float, float, str]]:
    import pysubs2

    return [(line.start / 1000, line.end / 1000, line.plaintext) for line in pysubs2.load(f"{stem}.srt")]


def _read_vtt(stem: Path) -> list[tuple[float, float, str]]:
    import html

    import webvtt

    def seconds(text: str) -> float:
        # Its own `start_in_seconds` are whole ones.
        hours, minutes, rest = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(rest)

    return [(seconds(cue.start), seconds(cue.end), html.unescape(cue.text)) for cue in webvtt.read(f"{stem}.vtt")]


def _read_labels(stem: Path) -> list[tuple[float, float, str]]:
    import pandas

    table = pandas.read_csv(f"{stem}.labels.txt", sep="\t", header=None, quoting=3, keep_default_na=False)
    return list(table.itertuples(index=False, name=None))


_READERS = {"srt": _read_srt, "vtt": _read_vtt, "audacity": _read_labels}


def main(argv: list[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=__doc__)
    parser.add_argument("--sounds", required=True, help="folder of recordings with a metadata.csv")
    parser.add_argument("--output-dir", required=True, help="for the recording, the timeline and the figures")
    parser.add_argument("--fold", type=int, default=5, help="whose recordings are used (default: 5, the test's)")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the recording (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of order, gaps and levels (default: 0)")
    parser.add_argument("--model", help="folder or Hub id of a captioner (default: the embedded recap-tiny)")
    parser.add_argument("--rules", help="a file of naming rules (default: the project's own)")
    parser.add_argument("options", nargs="*", help="further options of `recap timeline`, after --")
    result = run_benchmark(parser.parse_args(argv))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(exit_status("python -m benchmarks.timeline", main))
