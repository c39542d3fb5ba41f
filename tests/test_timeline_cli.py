"""`recap timeline`: one recording or many, every format, subtitles, broken files, memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import same_results, synthetic_clip

from benchmarks.timeline import compare_formats, measure_memory
from recap_cli import main
from recap_cli.timeline import FORMATS
from recap_hf import AudioStream, Captioner, CaptionOptions, caption_timeline


def sound(*parts):
    return np.concatenate([np.zeros(round(p * 48_000), np.float32) if p > 0 else synthetic_clip(-p, 1) for p in parts])


@pytest.fixture
def recording(tmp_path):
    """Sound to 2 s, silence to 5 s, sound to 7 s."""
    path = tmp_path / "street.flac"
    soundfile.write(path, sound(-2.0, 3.0, -2.0), 48_000)
    return path


@pytest.fixture
def run(capsys, model_folder):
    def call(*options):
        fast = ("--model", model_folder, "--max-new-tokens", 5, "--num-beams", 1, "--hop", 1)
        status = main(["timeline", *map(str, (*options, *fast))])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


def test_every_format_equals_the_json(run, recording, tmp_path):
    for kind in FORMATS:
        status, out, _ = run(recording, "--format", kind, "--output-dir", tmp_path / "out")
        assert (status, out) == (0, "")
    (entry,) = json.loads((tmp_path / "out" / "street.json").read_text())
    assert (entry["file"], entry["duration"]) == (str(recording), 7.0)
    segments = entry["segments"]
    assert (segments[0]["start"], segments[-1]["end"]) == (0.0, 7.0)
    assert {"start": 2.0, "end": 5.0, "caption": "silence", "score": 1.0, "retrieved": []} in segments
    lines = (tmp_path / "out" / "street.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"file": str(recording), **segment} for segment in segments]
    for kind, text in compare_formats(tmp_path / "out" / "street", segments).items():
        assert text == "equal" or "No module named" in text, kind
    assert len(list((tmp_path / "out").iterdir())) == len(FORMATS)


def test_several_recordings_standard_input_and_broken_ones(run, recording, tmp_path, monkeypatch):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    data = tmp_path / "whole.wav"
    soundfile.write(data, sound(-2.0, 3.0, -2.0), 48_000)
    (tmp_path / "cut.wav").write_bytes(data.read_bytes()[:-100_000])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(recording.read_bytes())))
    names = (recording, tmp_path / "broken.wav", tmp_path / "cut.wav", "-")
    status, out, errors = run(*names, "--format", "json", "--skip-silence")
    assert status == 1
    whole, broken, cut, piped = json.loads(out)
    assert same_results(piped["segments"], whole["segments"])
    assert "silence" not in {segment["caption"] for segment in whole["segments"]}
    # The summary knows of the silence that is not written.
    assert whole["sounds"][-1] == {"caption": "silence", "seconds": 3.0, "segments": None}
    assert broken["segments"] == [] and "error" in broken
    assert "error" not in cut and cut["segments"][0]["start"] == 0.0
    assert "broken.wav: not a recording" in errors and "cut.wav: cut off or damaged" in errors
    assert "1 of 4 recordings could not be captioned to the end" in errors


def test_subtitles_stay_where_a_recording_cannot_be_read(run, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    output = tmp_path / "broken.srt"
    output.write_text("of yesterday")
    for where in (("--output", output), ("--format", "srt", "--output-dir", tmp_path)):
        status, _, errors = run(tmp_path / "broken.wav", *where)
        assert (status, output.read_text()) == (1, "of yesterday")
        assert "broken.srt stays as it was" in errors


def test_the_suffix_of_the_file_is_its_format(run, recording, tmp_path):
    for suffix, head in {".srt": "1\n00:00:00,000 --> ", ".vtt": "WEBVTT\n\n", ".csv": "file,start,end,"}.items():
        assert run(recording, "--output", tmp_path / f"out{suffix}")[0] == 0
        assert (tmp_path / f"out{suffix}").read_text().startswith(head)


def test_readable_cues(run, recording):
    _, out, _ = run(recording, "--format", "vtt", "--accessible")
    assert out.startswith("WEBVTT\n\n00:00:00.000 --> ")
    assert "silence" not in out
    assert "\n[" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "srt"), "--format srt holds one recording, got 2"),
        (("--output", "x", "--output-dir", "y"), "--output and --output-dir exclude each other"),
        (("--output", "x.docx"), "--output x.docx: no format has the suffix .docx: give --format text|json"),
        (("--output", "x.csv", "--format", "vtt"), "--output x.csv and --format vtt contradict each other"),
        (("--output", "x.srt"), "--format srt holds one recording, got 2"),
        (("--accessible",), "--accessible needs --format srt or vtt"),
    ],
)
def test_calls_that_make_no_sense(run, recording, options, message):
    status, out, errors = run(recording, recording, *options)
    assert (status, out) == (2, "")
    assert f"recap timeline: error: {message}" in errors


def test_the_flag_of_earlier_releases_names_the_command(capsys, recording):
    assert main(["caption", str(recording), "--timeline"]) == 2
    assert "recap timeline" in capsys.readouterr().err


def test_two_recordings_of_one_name_are_not_written_over(run, recording, tmp_path):
    (tmp_path / "deeper").mkdir()
    other = tmp_path / "deeper" / "street.flac"
    other.write_bytes(recording.read_bytes())
    status, _, errors = run(recording, other, "--format", "srt", "--output-dir", tmp_path / "out")
    assert status == 1
    assert "Two recordings would be written to street.srt" in errors


@pytest.mark.parametrize("rate", [44_100, 192_000])
def test_the_blocks_of_the_stream_make_no_difference(tiny_model, tiny_processor, tmp_path, rate):
    captioner = Captioner(tiny_model, tiny_processor, options=CaptionOptions(max_new_tokens=4, num_beams=1))
    rng = np.random.default_rng(0)
    path = tmp_path / "field.wav"
    loudness = np.repeat(rng.choice([0.0, 0.01, 0.3], 12), rate)[:, None]
    soundfile.write(path, loudness * rng.standard_normal((12 * rate, 4)).cumsum(axis=0) % 0.3, rate, subtype="PCM_24")
    expected = list(caption_timeline(captioner, AudioStream(path)))
    assert len(expected) > 2
    for block_s in (0.013, 1.0, 60.0):
        assert list(caption_timeline(captioner, AudioStream(path, block_s=block_s))) == expected


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """Ten minutes with the embedded default: the tenth takes no more memory than the second."""
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 48_000, 2) as file:
        for second in range(600):
            # A sound every ten seconds; most is silence, to be quick.
            part = synthetic_clip(1.0, second % 7) if second % 10 == 0 else np.zeros(48_000)
            file.write(np.stack([part, part], axis=1))
    command = [sys.executable, "-m", "recap_cli", "timeline", str(tmp_path / "long.flac")]
    command += ["--format", "jsonl", "--output", str(tmp_path / "long.jsonl"), "--batch-size", "2"]
    cost = measure_memory(command, tmp_path / "long.jsonl", 600)
    by_minute = {int(minute): value for minute, value in cost["rss_mib"].items()}
    early = max(value for minute, value in by_minute.items() if 1 <= minute <= 3)
    late = max(value for minute, value in by_minute.items() if minute >= 7)
    assert late <= early + 40, by_minute


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from recap_cli import main\ntry: main(['timeline', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "--accessible" in result.stdout


def test_an_input_is_never_overwritten(run, recording):
    data = recording.read_bytes()
    status, _, err = run(recording, "--output", recording)
    assert status == 2
    assert "names the input file" in err
    assert recording.read_bytes() == data


def test_a_closed_pipe_ends_the_run_without_an_error(recording, model_folder):
    command = [sys.executable, "-m", "recap_cli", "timeline", *[str(recording)] * 3, "--model", str(model_folder)]
    script = 'set -o pipefail; "$@" --max-new-tokens 3 --format jsonl | true'
    result = subprocess.run(["bash", "-c", script, "-", *command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
