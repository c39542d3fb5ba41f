"""`recap serve` under load, beside `recap caption` on the same recordings.

    python -m benchmarks.serving RECORDINGS --clients 64 --seconds 120

The command captions the folder before and after. Meanwhile each client sends one recording after the other and
compares each answer with the command's. Then a recording that is none and an upload that is too large are sent, and
the worker is killed while all clients wait.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

_BOUNDARY = "recap-benchmark"
_MAX_MEGABYTES = 20


def command_rate(folder: str, options: list[str]) -> tuple[float, dict[str, str]]:
    """Recordings per second of `recap caption` once the model is loaded, and the captions by name."""
    command = [sys.executable, "-m", "recap_cli", "caption", folder, "--format", "jsonl", "--quiet", *options]
    captions, times = {}, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            times.append(time.monotonic())
            row = json.loads(line)
            captions[Path(row["file"]).name] = row["caption"]
    # The first group is loaded and captioned before its first line; the others come in groups, too.
    groups = np.flatnonzero(np.diff(times) > 0.05)
    if not len(groups):
        raise SystemExit(f"{folder}: {len(times)} recordings were captioned at once: give more of them")
    first = int(groups[0]) + 1
    return (len(times) - first) / (times[-1] - times[first - 1]), captions


class Server:
    """`recap serve` in a process of its own."""

    def __init__(self, options: list[str]) -> None:
        limit = ["--max-megabytes", str(_MAX_MEGABYTES)]
        command = [sys.executable, "-m", "recap_cli", "serve", "--port", "0", *limit, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.notes: list[str] = []
        for line in self.process.stderr:
            self.notes.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        threading.Thread(target=lambda: self.notes.extend(self.process.stderr), daemon=True).start()

    def worker(self) -> int:
        """The process of the model: the one with the most memory."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return max(map(int, children), key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))

    def stop(self) -> None:
        """Ends it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def caption(self, name: str, data: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
        self.connection.request("POST", "/v1/audio/captions", body, headers)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())


def load(port: int, files: list[Path], clients: int, seconds: float, captions: dict[str, str]) -> dict[str, Any]:
    """Lets clients send recordings for some time."""
    data = {path.name: path.read_bytes() for path in files}
    names, delays, statuses = list(data), [], Counter()
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        client, place = Client(port), number
        while (began := time.monotonic()) < end:
            name = names[place % len(names)]
            status, answer = client.caption(name, data[name])
            now = time.monotonic()
            kind = f"{status}"
            if status == 200:
                if answer["file"] != name:
                    kind = "crossed"
                elif answer["caption"] != captions[name]:
                    kind = "another caption"
                elif now <= end:
                    delays.append(now - began)
                else:
                    kind = "after the end"
            statuses[kind] += 1
            place += clients

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "answers": dict(statuses),
        "per_s": len(delays) / seconds,
        "p50_s": float(np.percentile(delays, 50)),
        "p95_s": float(np.percentile(delays, 95)),
        "took_s": time.monotonic() - began,
    }


def kill_worker(server: Server, files: list[Path], clients: int, captions: dict[str, str]) -> dict[str, Any]:
    """Kills the worker while clients wait; their answers, and the time until the service is back."""
    statuses: Counter = Counter()

    def work(path: Path) -> None:
        status, _ = Client(server.port).caption(path.name, path.read_bytes())
        statuses[status] += 1

    threads = [threading.Thread(target=work, args=(files[n % len(files)],)) for n in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(server.worker(), signal.SIGKILL)
    for thread in threads:
        thread.join()
    answered = time.monotonic() - began
    path = files[0]
    while (found := Client(server.port).caption(path.name, path.read_bytes()))[0] != 200:
        time.sleep(0.1)
    back = time.monotonic() - began
    same = found[1]["caption"] == captions[path.name]
    return {"answers": dict(statuses), "all_answered_s": answered, "back_s": back, "same_caption": same}


def main(argv: list[str] | None = None) -> int:
    """Prints the figures, and writes them to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--output")
    args, options = parser.parse_known_args(argv)
    files = sorted(path for path in Path(args.folder).iterdir() if path.is_file())
    before, captions = command_rate(args.folder, options)
    server = Server(options)
    try:
        report = {"recordings": len(files), **load(server.port, files, args.clients, args.seconds, captions)}
        report["bad_upload"] = Client(server.port).caption("notes.wav", b"I am no sound. " * 100)
        try:
            report["huge_upload"] = Client(server.port).caption("huge.wav", bytes(2 * _MAX_MEGABYTES * 1_000_000))
        except (BrokenPipeError, ConnectionResetError) as error:
            # The server does not wait for the rest of it.
            report["huge_upload"] = type(error).__name__
        report["killed"] = kill_worker(server, files, args.clients, captions)
    finally:
        server.stop()
    after, again = command_rate(args.folder, options)
    report |= {"command_per_s": [before, after], "command_repeats": captions == again}
    report["of_the_command"] = report["per_s"] / np.mean([before, after])
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
