"""The benchmarks of batch work and of the service run, and their figures are those of what they ran."""

from __future__ import annotations

import json
import shutil

import pytest
import soundfile
from conftest import synthetic_clip

from benchmarks import batch_work, serving


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed in range(12):
        soundfile.write(folder / f"{seed}.wav", synthetic_clip(0.5, seed, 16_000), 16_000)
    return folder


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg decodes the files")
def test_metadata_and_kills():
    found = batch_work.metadata(7, 1)
    assert dict(found["files"]) == {f".{name}": 1 for name in batch_work.FORMATS}
    assert found["captions_read_by_ffprobe"] == found["files"]
    assert (found["broken"], len(found["kills_at_s"])) == ([], 1)


@pytest.mark.slow
def test_a_run_that_is_killed(recordings, capsys):
    assert batch_work.main(["resume", str(recordings), "--kills", "1", "--batch-size", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recordings"], found["status"], found["same_bytes"]) == (12, 0, True)


@pytest.mark.slow
def test_the_service(recordings, capsys):
    assert serving.main([str(recordings), "--clients", "2", "--seconds", "3", "--batch-size", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["answers"]) <= {"200", "after the end"}
    assert found["bad_upload"][0] == 415
    assert found["killed"]["same_caption"]
    assert found["command_repeats"]
