"""Work in parts by Ray: what it gives is what a plain run gives, also when a process is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recap_cli import main
from recap_hf.ray_engine import LOG_NAME, begun, resume, run_parts

pytest.importorskip("ray", reason="needs recap-hf[ray]")

RATE = 48_000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twenty-four recordings, one of which cannot be read."""
    import soundfile

    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for number in range(23):
        times = np.arange(RATE * 2) / RATE
        tone = np.sin(2 * np.pi * 200 * (number + 1) * times) * np.exp(-3 * times)
        soundfile.write(folder / f"{number:02d}.wav", 0.3 * tone + 0.02 * rng.standard_normal(len(times)), RATE)
    (folder / "99.wav").write_bytes(b"no recording")
    return folder


def start(arguments, log):
    """A run in a process of its own."""
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "recap_cli", *map(str, arguments)],
            stderr=file,
            stdout=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def kill_a_worker(process, log, after):
    """SIGKILL for the process that has begun the newest part, once so many are begun; returns its id."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        lines = log.read_text().splitlines() if log.is_file() else []
        if len(lines) >= after:
            worker = int(lines[-1].split("\t")[2])
            # Ray, as it is started here, sends no usage statistics.
            environment = Path(f"/proc/{worker}/environ")
            assert not environment.exists() or b"RAY_USAGE_STATS_ENABLED=0" in environment.read_bytes()
            os.kill(worker, signal.SIGKILL)
            return worker
        time.sleep(0.02)
    raise AssertionError("no worker has begun a part")


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_no_recording(recordings, tmp_path, capfd):
    plain, output, log = tmp_path / "plain.jsonl", tmp_path / "ray.jsonl", tmp_path / "ray.log"
    arguments = ["caption", recordings, "--format", "jsonl", "--batch-size", 1, "--num-beams", 2]
    arguments += ["--max-new-tokens", 12, "--device", "cpu"]
    # The broken recording is told by the status, and by a line of its own.
    assert main([*map(str, arguments), "--output", str(plain)]) == 1
    work = tmp_path / "work"
    process = start([*arguments, "--output", output, "--engine", "ray", "--part-size", 2, "--work-dir", work], log)
    killed = kill_a_worker(process, work / LOG_NAME, after=4)
    assert process.wait(timeout=500) == 1, log.read_text()
    assert output.read_text() == plain.read_text()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines) == 24
    said = log.read_text()
    assert "was begun 2 times, because a process died" in said
    assert not work.exists()
    with capfd.disabled():
        print(f"\nprocess {killed} killed; " + "; ".join(line for line in said.splitlines() if "begun" in line))
        print(f"{len(lines)} recordings, equal to the plain run: {output.read_bytes() == plain.read_bytes()}")


@pytest.mark.slow
def test_a_run_that_was_cut_off_does_what_is_left(recordings, tmp_path):
    output, log, work = tmp_path / "ray.jsonl", tmp_path / "ray.log", tmp_path / "ray.jsonl.parts"
    arguments = ["caption", recordings, "--format", "jsonl", "--batch-size", 2, "--num-beams", 1, "--device", "cpu"]
    arguments += ["--max-new-tokens", 8, "--output", output, "--engine", "ray", "--part-size", 4]
    process = start(arguments, log)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and len(list(work.glob("part-*.jsonl"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = len(list(work.glob("part-*.jsonl")))
    assert done >= 2
    again = start(arguments, log)
    assert again.wait(timeout=500) == 1
    assert "Resuming an interrupted run" in log.read_text()
    assert len(output.read_text().splitlines()) == 24


@pytest.mark.slow
def test_a_datastore_is_built_the_same(tmp_path):
    """Chunks are embedded by Ray's processes, one of which is killed; the embeddings are those of a plain build."""
    captions = tmp_path / "captions.txt"
    words = ["dog", "rain", "car", "bird", "man", "water", "wind", "bell", "horn", "train"]
    texts = [f"a {a} and a {b} near a {c}" for a in words for b in words for c in words]
    captions.write_text("\n".join(texts * 3) + "\n")
    log = tmp_path / "log"
    assert main(["datastore", "build", str(captions), "--output", str(tmp_path / "plain"), "--device", "cpu"]) == 0
    arguments = ["datastore", "build", captions, "--output", tmp_path / "ray", "--device", "cpu", "--engine", "ray"]
    process = start([*arguments, "--chunk-captions", 256], log)
    kill_a_worker(process, tmp_path / "ray" / ".building" / LOG_NAME, after=4)
    assert process.wait(timeout=500) == 0, log.read_text()
    assert "was begun 2 times" in log.read_text()
    from recap_hf import CaptionDatastore

    plain, ray = (CaptionDatastore.from_pretrained(tmp_path / name) for name in ("plain", "ray"))
    assert plain.records == ray.records
    # Batches of other lengths move the last digits.
    np.testing.assert_allclose(ray.embeddings, plain.embeddings, atol=1e-5)


def test_a_run_with_other_settings_names_them_and_starts_over(tmp_path):
    work, notes = tmp_path / "work", []
    settings = {"batch_size": 8, "k": 4}
    resume(work, settings, notes.append)
    (work / "part-000000.jsonl").write_text("{}")
    resume(work, dict(settings), notes.append)
    assert (work / "part-000000.jsonl").is_file()
    assert not notes
    resume(work, {"batch_size": 8, "num_beams": 3}, notes.append)
    assert not (work / "part-000000.jsonl").exists()
    assert "num_beams was the default, is 3; k was 4, is the default" in notes[0]
    assert "batch_size" not in notes[0]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        resume(tmp_path / "letters", settings, notes.append)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "mine"
    for text in ('{"tracks": 3}', "no JSON"):
        (tmp_path / "letters" / "plan.json").write_text(text)
        with pytest.raises(ValueError, match="not of an earlier run"):
            resume(tmp_path / "letters", settings, notes.append)
    (work / "mine.txt").write_text("mine")
    resume(work, settings, notes.append)
    assert (work / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_ray_leaves_the_environment_and_shares_the_cores(tmp_path):
    def make():
        import torch

        return lambda name: (tmp_path / name).write_text(str(torch.get_num_threads()))

    # Ray itself sets others.
    before = os.environ.get("OMP_NUM_THREADS")
    assert sorted(run_parts(make, ["a", "b"], tmp_path / "work")) == [0, 1]
    assert os.environ.get("OMP_NUM_THREADS") == before
    share = max(1, os.cpu_count() // 2)
    assert {(tmp_path / name).read_text() for name in "ab"} == {str(share)}


def test_parts_are_counted_by_the_log(tmp_path):
    log = tmp_path / LOG_NAME
    assert not begun(log)
    log.write_text("12:00:00\thost\t1\t0\n12:00:01\thost\t2\t1\n12:00:02\thost\t3\t0\n")
    assert begun(log) == {0: 2, 1: 1}


def test_what_ray_cannot_do_is_said_and_leaves_an_older_output(tmp_path, capsys):
    output = tmp_path / "captions.txt"
    output.write_text("of an earlier run")
    assert main(["caption", "-", "--engine", "ray", "--output", str(output)]) == 1
    assert "standard input" in capsys.readouterr().err
    assert output.read_text() == "of an earlier run"
