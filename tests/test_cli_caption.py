"""`recap caption`: good recordings captioned, bad ones named, formats, exit status, never a traceback."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import synthetic_clip
from test_audio import BROKEN, encode

from recap_cli import main
from recap_hf import streaming
from recap_hf.recordings import expand_inputs


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    (folder / "deeper").mkdir(parents=True)
    soundfile.write(folder / "b.wav", synthetic_clip(1.0, 1), 48_000)
    soundfile.write(folder / "deeper" / "c.flac", synthetic_clip(2.0, 2), 48_000)
    soundfile.write(folder / "silent.wav", np.zeros(4_800), 48_000)
    (folder / "notes.txt").write_text("not a recording")
    return folder


def run(capsys, *argv):
    status = main(["caption", *map(str, argv)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_text(capsys, recordings, model_folder):
    status, out, _ = run(capsys, recordings / "b.wav", "--model", model_folder, "--max-new-tokens", 5)
    assert status == 0
    first, *hits = out.splitlines()
    assert first.startswith(f"{recordings / 'b.wav'}: ")
    assert {hit.split("  ")[-1] for hit in hits} == {"a dog barks", "rain falls"}


def test_threads(capsys, recordings, model_folder, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for options in ((), ("--threads", 3)):
        run(capsys, recordings / "silent.wav", "--model", model_folder, *options)
    # One for a small model, unless asked for.
    assert threads == [1, 3]


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_machine_formats(capsys, recordings, model_folder, form, tmp_path):
    arguments = [recordings, "--model", model_folder, "--max_new_tokens=5", "--format", form]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    rows = {
        "json": lambda: json.loads(out),
        "jsonl": lambda: [json.loads(line) for line in out.splitlines()],
        "csv": lambda: list(csv.DictReader(io.StringIO(out))),
    }[form]()
    assert [os.path.relpath(row["file"], recordings) for row in rows] == ["b.wav", "deeper/c.flac", "silent.wav"]
    assert rows[2]["caption"] == "silence"
    retrieved = rows[0]["retrieved"] if form != "csv" else json.loads(rows[0]["retrieved"])
    assert len(retrieved) == 2
    run(capsys, *arguments, "--output", tmp_path / "out")
    assert (tmp_path / "out").read_text() == out


def test_broken_recordings_are_named_and_the_others_captioned(capsys, recordings, model_folder):
    for name, (data, _) in BROKEN.items():
        (recordings / f"bad {name}.wav").write_bytes(data)
    (recordings / "bad folder.wav").mkdir()
    (recordings / "bad codec.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(300))
    locked = recordings / "bad locked.wav"
    locked.write_bytes(encode("wav"))
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        # Root may read everything: nothing can be locked for it.
        locked.unlink()
    bad = sorted(path.name for path in recordings.glob("bad *"))
    status, out, err = run(
        capsys, recordings, "--model", model_folder, "--max-new-tokens", 3, "--batch-size", 2, "--format", "jsonl"
    )
    assert status == 1
    rows = {os.path.basename(row["file"]): row for row in map(json.loads, out.splitlines())}
    assert sorted(name for name, row in rows.items() if "error" in row) == bad
    assert sorted(name for name, row in rows.items() if "caption" in row) == ["b.wav", "c.flac", "silent.wav"]
    for name in bad:
        assert f"{name}: {rows[name]['error']}" in err
        assert rows[name]["error"].strip()
    assert f"{len(bad)} of {len(bad) + 3} recordings could not be captioned" in err


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv"])
def test_a_run_without_any_caption_leaves_the_older_output(capsys, recordings, model_folder, tmp_path, suffix):
    output = tmp_path / f"captions.{suffix}"
    (recordings / "bad.wav").write_bytes(b"RIFF")
    arguments = (recordings / "bad.wav", "--model", model_folder, "--output", output)
    # What was not there is written.
    assert run(capsys, *arguments)[0] == 1
    assert output.is_file()
    output.write_text("of yesterday")
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert f"{output} stays as it was" in err and "1 of 1 recordings could not be captioned" in err
    assert output.read_text() == "of yesterday"
    assert not output.with_name(f"{output.name}.partial").exists()


def test_standard_input(capsys, model_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encode("flac"))))
    status, out, _ = run(capsys, "-", "--model", model_folder, "--max-new-tokens", 3)
    assert status == 0
    assert out.startswith("-: ")


def test_another_datastore(capsys, recordings, model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("church bells ring\n")
    _, out, _ = run(
        capsys, recordings / "b.wav", "--model", model_folder, "--datastore", tmp_path / "mine.txt", "--format", "json"
    )
    assert [hit["caption"] for hit in json.loads(out)[0]["retrieved"]] == ["church bells ring"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nothing/*.wav"], 2, "no file matches"),
        ([], 2, "the following arguments are required"),
        (["a.wav", "--num-beams", "0"], 2, "expected an integer of at least 1, got '0'"),
        (["a.wav", "--k", "-3"], 2, "expected an integer of at least 0, got '-3'"),
        (["a.wav", "--timeline"], 2, "recap timeline RECORDING"),
        (["a.wav", "--candidates", "4", "--rerank", "none"], 2, "Without reranking `candidates`"),
        ([""], 2, "an empty name"),
        ([__file__, "--output", __file__, "--format", "text"], 2, "names the input file"),
        (["a.wav", "--output", "a.csv", "--format", "jsonl"], 2, "contradict each other"),
        (["a.wav", "--output", "a.docx"], 2, "no format has the suffix .docx"),
        (["a.wav", "--output", "a.srt"], 2, "recap timeline writes subtitles"),
        (["a.wav", "--output", "/no/folder/a.csv"], 2, "there is no folder /no/folder"),
        (["a.wav", "--format", "xml"], 2, "invalid choice: 'xml'"),
        (["a.wav", "--model", "/no/such/folder"], 1, "/no/such/folder"),
        (["a.wav", "--device", "meta"], 1, "The device 'meta' is not there: torch finds none on this machine"),
        (["a.wav", "--length-penalty", "300"], 2, "expected a number from -100 to 100, got '300'"),
        (["a.wav", "--temperature", "1e-300"], 2, "expected a number of at least 0.001"),
        (["--", "--no_such_file.wav"], 1, "--no_such_file.wav"),
        (["a.wav", "--device", "tpu"], 1, "The device must be one of torch, such as 'cpu' or 'cuda:0', got 'tpu'"),
    ],
)
def test_wrong_calls(capsys, arguments, status, message):
    try:
        actual = main(["caption", *arguments])
    except SystemExit as stop:
        actual = stop.code
    captured = capsys.readouterr()
    assert actual == status
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_bad_datastore_is_a_message(capsys, recordings, model_folder, tmp_path):
    for name, text in (("empty.txt", "\n"), ("empty.json", '{"data": []}')):
        (tmp_path / name).write_text(text)
        status, _, err = run(capsys, recordings / "b.wav", "--model", model_folder, "--datastore", tmp_path / name)
        assert status == 1
        assert "holds no captions" in err


def test_expansion(recordings):
    assert expand_inputs([str(recordings / "*.wav")]) == [str(recordings / "b.wav"), str(recordings / "silent.wav")]
    assert expand_inputs(["-", "https://example.org/a.wav", "missing.wav"]) == [
        "-",
        "https://example.org/a.wav",
        "missing.wav",
    ]
    (recordings / "empty").mkdir()
    with pytest.raises(ValueError, match="no recordings in this folder"):
        expand_inputs([str(recordings / "empty")])


def test_an_interrupted_run_leaves_the_older_output_and_valid_json(capsys, recordings, model_folder, monkeypatch):
    complete = streaming.caption_groups

    def interrupted(captioner, sources, batch_size):
        yield next(complete(captioner, sources, batch_size))[:1]
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "caption_groups", interrupted)
    arguments = [recordings, "--model", model_folder, "--max-new-tokens", 3]
    status, out, _ = run(capsys, *arguments, "--format", "json")
    assert status == 130
    assert [os.path.basename(row["file"]) for row in json.loads(out)] == ["b.wav"]
    output = recordings / "captions.json"
    output.write_text("older")
    status, _, err = run(capsys, *arguments, "--output", output)
    assert status == 130
    assert output.read_text() == "older"
    partial = recordings / "captions.json.partial"
    assert str(partial) in err
    assert len(json.loads(partial.read_text())) == 1
    monkeypatch.undo()
    assert run(capsys, *arguments, "--output", output)[0] == 0
    assert len(json.loads(output.read_text())) == 3
    assert not partial.exists()


def test_a_full_disk_leaves_the_results_so_far(capsys, recordings, model_folder, monkeypatch):
    complete = streaming.caption_groups

    def full(captioner, sources, batch_size):
        yield next(complete(captioner, sources, batch_size))[:1]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streaming, "caption_groups", full)
    output = recordings / "captions.jsonl"
    output.write_text("older")
    status, _, err = run(
        capsys, recordings, "--model", model_folder, "--max-new-tokens", 3, "--output", output, "--batch-size", 1
    )
    assert status == 1
    assert output.read_text() == "older"
    partial = recordings / "captions.jsonl.partial"
    assert str(partial) in err
    assert [os.path.basename(json.loads(line)["file"]) for line in partial.read_text().splitlines()] == ["b.wav"]


@pytest.mark.parametrize("form", ["text", "json", "jsonl", "csv"])
def test_odd_names_are_captioned_and_do_not_reach_the_terminal(
    capsys, recordings, model_folder, form, tmp_path, monkeypatch
):
    names = [b"a\xe9.wav", b"b\x1b[2J\x9b.wav", b"=cmd|' !A0.wav"]
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(encode("wav"))
    (folder / "c.wav").write_bytes(b"no recording")
    monkeypatch.chdir(folder)
    inputs = [os.fsdecode(name) for name in names]
    status, out, err = run(capsys, *inputs, "c.wav", "--model", model_folder, "--max-new-tokens", 3, "--format", form)
    assert status == 1
    assert not [char for char in out + err if char != "\n" and (ord(char) < 32 or 0x7F <= ord(char) < 0xA0)]
    assert "c.wav" in err
    if form == "text":
        assert "a\\xe9.wav: " in out
    elif form == "csv":
        files = [row["file"] for row in csv.DictReader(io.StringIO(out))]
        assert files == ["a\\xe9.wav", "b\\x1b[2J\\x9b.wav", "'=cmd|' !A0.wav", "c.wav"]
    else:
        rows = json.loads(out) if form == "json" else [json.loads(line) for line in out.splitlines()]
        assert [os.fsencode(row["file"]) for row in rows] == [*names, b"c.wav"]


def test_a_narrow_encoding_stops_nothing(recordings, model_folder, tmp_path, monkeypatch):
    (tmp_path / "zh.txt").write_text("海浪 🌊\n", encoding="utf-8")
    for form in ("text", "csv", "jsonl"):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii", write_through=True))
        arguments = ["caption", recordings / "b.wav", "--model", model_folder, "--datastore", tmp_path / "zh.txt"]
        assert main([*map(str, arguments), "--max-new-tokens", "3", "--format", form]) == 0
        out = buffer.getvalue().decode("ascii")
        if form == "jsonl":
            assert json.loads(out)["retrieved"][0]["caption"] == "海浪 🌊"
        else:
            assert "\\u6d77\\u6d6a" in out


def test_folders_leave_out_what_is_no_recording(recordings):
    os.mkfifo(recordings / "pipe.wav")
    (recordings / "._b.wav").write_bytes(b"of macOS")
    (recordings / "gone.wav").symlink_to("nowhere")
    names = [os.path.basename(name) for name in expand_inputs([str(recordings)])]
    assert names == ["b.wav", "c.flac", "gone.wav", "silent.wav"]
