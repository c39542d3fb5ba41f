"""The delay of live captions, and whether sound is lost.

    python -m benchmarks.live RECORDING --seconds 120

It plays a recording into `recap live` in real time, a tenth of a second at a time, and reads the captions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from recap_cli.status import exit_status
from recap_hf import AudioStream

_RATE = 48_000
_PORTION_S = 0.1


def measure_live(
    recording: str, seconds: float, interval_s: float = 5.0, options: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Plays a recording into `recap live`.

    Args:
        recording (`str`): what [`AudioStream`] reads.
        seconds (`float`): how much of it is played.
        interval_s (`float`, *optional*, defaults to 5): `--interval`.
        options (`tuple[str, ...]`, *optional*): further options of `recap live`.

    Returns:
        `dict`: `seconds_played`, `seconds_captioned`, `gaps` between segments, `captions`, and of those that came
        after the model was loaded the `delay_s` (median, largest) from the moment in which the last sample of a
        segment was written to that in which its line was read; `first_caption_s` after the start.

    Raises:
        `RuntimeError`: if the command fails. Of a recording that cannot be read, what `AudioStream` raises.
    """
    blocks = iter(AudioStream(recording, _RATE, _PORTION_S))
    # What cannot be read is said here, not in the thread that plays.
    blocks = itertools.chain([next(blocks)], blocks)
    command = [sys.executable, "-m", "recap_cli", "live", "--rate", str(_RATE), "--format", "jsonl"]
    command += ["--interval", str(interval_s), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    began = time.monotonic()
    ready: list[float] = []
    listener = threading.Thread(target=_await_ready, args=(process, ready, began), daemon=True)
    listener.start()
    played: list[float] = []
    player = threading.Thread(target=_play, args=(blocks, seconds, process, began, played), daemon=True)
    player.start()
    segments, delays = [], []
    for line in process.stdout:
        now = time.monotonic() - began
        segments.append(json.loads(line))
        delays.append((now, now - segments[-1]["end"]))
    player.join()
    listener.join()
    if process.wait() != 0:
        raise RuntimeError(f"`{' '.join(command)}` ended with the status {process.returncode}.")
    loaded = ready[0] if ready else 0.0
    # What came in while the model was being loaded is late by that.
    settled = [delay for (_, delay), segment in zip(delays, segments, strict=True) if segment["start"] >= loaded]
    ends = [0.0, *(segment["end"] for segment in segments)]
    return {
        "seconds_played": round(played[0], 3),
        "seconds_captioned": ends[-1],
        "gaps": sum(start["start"] != end for start, end in zip(segments, ends[:-1], strict=True)),
        "captions": len(segments),
        "interval_s": interval_s,
        "model_ready_s": round(loaded, 1),
        "first_caption_s": round(delays[0][0], 1) if delays else None,
        "delay_s": {"median": round(float(np.median(settled)), 2), "largest": round(max(settled), 2)}
        if settled
        else None,
    }


def _await_ready(process: subprocess.Popen, ready: list[float], began: float) -> None:
    for line in process.stderr:
        if b"listening" in line and not ready:
            ready.append(time.monotonic() - began)


def _play(
    blocks: Iterator[np.ndarray], seconds: float, process: subprocess.Popen, began: float, played: list[float]
) -> None:
    """Writes portions at the moments in which a sound card would have them."""
    count, limit = 0, round(seconds * _RATE)
    with process.stdin as pipe:
        for block in blocks:
            block = block[: limit - count]
            if not len(block):
                break
            count += len(block)
            time.sleep(max(0.0, began + count / _RATE - time.monotonic()))
            pipe.write((np.clip(block, -1, 1) * 32767).astype("<i2").tobytes())
            pipe.flush()
    played.append(count / _RATE)


def main(argv: list[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("recording", help="what is played")
    parser.add_argument("--seconds", type=float, default=120.0, help="how much of it (default: 120)")
    parser.add_argument("--interval", type=float, default=5.0, help="of `recap live` (default: 5)")
    parser.add_argument("options", nargs="*", help="further options of `recap live`, after --")
    args = parser.parse_args(argv)
    print(json.dumps(measure_live(args.recording, args.seconds, args.interval, tuple(args.options)), indent=2))


if __name__ == "__main__":
    sys.exit(exit_status("python -m benchmarks.live", main))
