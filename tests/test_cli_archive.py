"""`recap caption` over many recordings: runs that go on, sidecars, columns, progress."""

from __future__ import annotations

import csv
import io
import json

import pytest
import soundfile
from conftest import synthetic_clip

from recap_cli import main, results
from recap_cli.journal import Journal
from recap_hf import streaming
from recap_hf.modeling.captioning_recap import Captioner


@pytest.fixture
def archive(tmp_path):
    """Eleven recordings, of which one is broken, one in a deeper folder."""
    folder = tmp_path / "archive"
    (folder / "deeper").mkdir(parents=True)
    for number in range(9):
        soundfile.write(folder / f"{number}.wav", synthetic_clip(0.3 + number / 10, number), 48_000)
    (folder / "5 broken.wav").write_bytes(b"no recording")
    soundfile.write(folder / "deeper" / "z.wav", synthetic_clip(0.5, 20), 48_000)
    return folder


@pytest.fixture
def run(capsys, model_folder):
    def call(*argv, status=0):
        options = ("--model", model_folder, "--max-new-tokens", 4, "--batch-size", 1)
        assert main(["caption", *map(str, argv), *map(str, options)]) == status
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured

    return call


def interrupt_after(monkeypatch, groups):
    """Lets `recap caption` compute some groups, then end as Ctrl-C does. Returns the names that it reads."""
    complete, read = streaming.caption_groups, []

    def some(captioner, sources, batch_size):
        names = list(sources)
        read.extend(names)
        for number, group in enumerate(complete(captioner, names, batch_size)):
            if number == groups:
                raise KeyboardInterrupt
            yield group

    monkeypatch.setattr(streaming, "caption_groups", some)
    return read


@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "text"])
def test_a_resumed_run_gives_what_one_run_gives(archive, run, tmp_path, monkeypatch, form):
    whole, output = tmp_path / "whole.out", tmp_path / "captions.out"
    run(archive, "--output", whole, "--format", form, status=1)
    journal = tmp_path / "captions.out.resume"
    for done in (4, 8):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            captured = run(archive, "--output", output, "--format", form, "--resume", status=130)
        # A group has four readable recordings, whatever else is among them.
        assert "the same command goes on from there" in captured.err
        assert not output.exists()
        readable = [row for line in journal.read_text().splitlines()[1:] for row in json.loads(line)["results"]]
        assert len({row["file"] for row in readable if "caption" in row}) == done
        # What a kill leaves: the group is dropped and its recordings captioned again.
        with open(journal, "a") as file:
            file.write('{"results": [{"file": "' + str(archive / "8.wav") + '", "capt')
    captured = run(archive, "--output", output, "--format", form, "--resume", status=1)
    assert "8 of 11 recordings are done" in captured.err
    assert output.read_bytes() == whole.read_bytes()


def test_what_is_done_is_not_done_again(archive, run, tmp_path, monkeypatch):
    output = tmp_path / "captions.jsonl"
    (archive / "5 broken.wav").unlink()
    run(archive, "--output", output, "--resume")
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    run(archive, "--output", output, "--resume")
    monkeypatch.undo()
    soundfile.write(archive / "3b.wav", synthetic_clip(0.5, 30), 48_000)
    read = interrupt_after(monkeypatch, 9)
    run(archive, "--output", output, "--resume")
    assert read == [str(archive / "3b.wav")]
    names = [json.loads(line)["file"] for line in output.read_text().splitlines()]
    assert names == sorted(names) and len(names) == 11


def test_changed_settings_are_named(archive, run, tmp_path):
    output = tmp_path / "captions.jsonl"
    run(archive / "0.wav", "--output", output, "--resume")
    before = output.read_bytes()
    captured = run(archive / "0.wav", "--output", output, "--resume", "--k", 1, status=1)
    assert "other settings (k was the default, is 1): --resume-anyway goes on" in captured.err
    assert output.read_bytes() == before
    captured = run(archive / "0.wav", archive / "1.wav", "--output", output, "--resume-anyway", "--k", 1)
    assert "going on with other settings (k was the default, is 1)" in captured.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(row["retrieved"]) for row in rows] == [2, 1]


def test_a_changed_datastore_is_named(archive, run, tmp_path):
    captions = tmp_path / "captions.txt"
    for text in ("a bell rings", "an owl hoots and hoots"):
        captions.write_text(text)
        arguments = (archive / "0.wav", "--output", tmp_path / "out.jsonl", "--datastore", captions, "--resume")
        captured = run(*arguments, status=int(text.startswith("an owl")))
    assert f"datastore was {captions} of 20" in captured.err


def test_a_journal_of_another_run_or_kind_is_refused(archive, run, tmp_path):
    journal = tmp_path / "captions.jsonl.resume"
    with Journal(journal, {"k": 4}):
        captured = run(archive / "0.wav", "--output", tmp_path / "captions.jsonl", "--resume", status=1)
        assert "another run writes there" in captured.err
    journal.write_text("notes of mine\n")
    captured = run(archive / "0.wav", "--output", tmp_path / "captions.jsonl", "--resume", status=1)
    assert "captions.jsonl.resume, line 1: not written by --resume" in captured.err
    assert journal.read_text() == "notes of mine\n"


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_sidecars(archive, run, kind):
    captured = run(archive, "--sidecar", kind, "--format", "jsonl", status=1)
    rows = {row["file"]: row for row in map(json.loads, captured.out.splitlines())}
    for name, row in rows.items():
        sidecar = archive / (name.removeprefix(f"{archive}/").removesuffix("wav") + kind)
        if "error" in row:
            assert not sidecar.exists()
        elif kind == "txt":
            assert sidecar.read_text() == row["caption"] + "\n"
        else:
            assert json.loads(sidecar.read_text()) == {**row, "file": sidecar.with_suffix(".wav").name}
    written = archive / f"0.{kind}"
    written.write_text("my own words")
    assert "10 sidecars" not in (error := run(archive, "--sidecar", kind, status=2).err)
    assert f"{written} is there, and 9 others are" in error
    captured = run(archive, "--sidecar", kind, "--skip-existing", "--format", "jsonl", status=1)
    assert [json.loads(line)["file"] for line in captured.out.splitlines()] == [str(archive / "5 broken.wav")]
    assert written.read_text() == "my own words"


def test_two_recordings_with_one_sidecar_are_refused(archive, run):
    soundfile.write(archive / "0.flac", synthetic_clip(0.5, 1), 48_000)
    assert "would have the same 0.txt" in run(archive, "--sidecar", "txt", status=2).err
    assert not list(archive.rglob("*.txt"))


def test_columns(archive, run):
    names = (archive / "1.wav", archive / "5 broken.wav", archive / "2.wav")
    rows = [json.loads(line) for line in run(*names, "--format", "jsonl", status=1).out.splitlines()]
    captions = [" ".join(row["caption"].split()) for row in rows if "caption" in row]
    assert run(*names, "--columns", "caption", status=1).out.splitlines() == captions
    full = list(csv.DictReader(io.StringIO(run(*names, "--format", "csv", status=1).out)))
    out = run(*names, "--columns", "file,caption,score", "--format", "csv", status=1).out
    assert out.splitlines()[0] == "file,caption,score"
    kept = ("file", "caption", "score")
    assert list(csv.DictReader(io.StringIO(out))) == [{name: row[name] for name in kept} for row in full]


def test_folders_of_folders(archive, run):
    out = run(archive, "--no-recursive", "--columns", "file", status=1).out
    assert len(out.splitlines()) == 9 and "deeper" not in out


def test_progress(archive, run, monkeypatch):
    monkeypatch.setattr(results, "_PROGRESS_S", 0.0)
    error = run(archive, "--columns", "file", status=1).err
    # Groups end with the fourth and the eighth recording that can be read.
    lines = [line for line in error.splitlines() if line.endswith(" left")]
    assert [line.split(",")[0] for line in lines] == [f"recap caption: {n} of 11 recordings" for n in (4, 9)]
    assert "left" not in run(archive, "--columns", "file", "--quiet", status=1).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --output FILE"),
        (["--resume", "--output", "a.jsonl", "--engine", "ray"], "--engine ray goes on where it stopped without it"),
        (["--resume", "--output", "a.jsonl", "--sidecar", "txt"], "go on by --skip-existing instead"),
        (["--overwrite-metadata"], "are about --write-metadata"),
        (["--columns", "caption", "--format", "json"], "--columns are of text and CSV"),
        (["--columns", "captions"], "expected different ones of file,caption"),
        (["--skip-existing"], "leaves out recordings with a --sidecar"),
        (["--skip-existing", "--sidecar", "txt", "--output", "a.csv"], "would replace a.csv by the new rows alone"),
        (["--dry-run", "--write-metadata", "--resume", "--output", "a.csv"], "--dry-run writes nothing that --resume"),
        (["https://example.org/a.wav", "--sidecar", "txt"], "is no file on this machine"),
    ],
)
def test_wrong_calls(capsys, arguments, message):
    try:
        status = main(["caption", __file__, *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
