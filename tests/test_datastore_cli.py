"""`recap datastore` with a tiny random captioner, from a file of captions to a search."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from recap_cli import main

CAPTIONS = ["a dog barks", "rain falls on a roof", "a violin plays", "A dog barks!", "sea waves roll"]


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_processor):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def captions_file(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("clip_id,caption\n" + "".join(f"c{row},{text}\n" for row, text in enumerate(CAPTIONS)))
    return path


@pytest.fixture
def recap(capsys):
    def run(*arguments, status=0):
        capsys.readouterr()
        assert main(["datastore", *map(str, arguments)]) == status
        return capsys.readouterr()

    return run


def test_from_a_file_to_a_search(recap, checkpoint, captions_file, tmp_path):
    folder = tmp_path / "store"
    model = ("--model", checkpoint)
    out = recap("build", captions_file, "--output", folder, "--licence", "CC0", *model, "--format", "json").out
    assert json.loads(out)["captions"] == 5
    info = json.loads(recap("info", folder, "--format", "json", "--queries", "5").out)
    assert {"captions", "duplicates", "dimension", "index", "recall"} <= set(info)
    assert (info["captions"], info["dimension"], info["duplicates"]["normalised"]) == (5, 16, 1)
    assert "captions: 5" in recap("info", folder, "--queries", "0").out
    hits = json.loads(recap("search", folder, "--text", "a violin plays", "--k", "2", *model, "--format", "json").out)
    assert (hits[0]["caption"], hits[0]["row"], hits[0]["clip_id"]) == ("a violin plays", 2, "c2")
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(hits) == 2
    (tmp_path / "more.txt").write_text("wind blows\n")
    assert "added: 1" in recap("add", folder, tmp_path / "more.txt", *model).out
    assert recap("remove", folder, "--clip-id", "c1.wav", "--text", "WIND blows").out == "removed: 2\n"
    assert "removed: 1" in recap("filter", folder, "--duplicates", "normalised", "--max-tokens", "0").out
    recap("export", folder, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text().splitlines() == ["a dog barks", "a violin plays", "sea waves roll"]
    assert recap("verify", folder, "--encoder", *model).out == "whole\n"
    assert recap("merge", folder, folder, "--output", tmp_path / "twice").out == "added: 3\n"
    assert json.loads(recap("index", folder, "--index", "exact", "--format", "json").out) == {"kind": "exact"}
    recap("reembed", tmp_path / "twice", *model)
    (folder / "datastore.json").write_text("{")
    assert "not the description" in recap("verify", folder, status=1).out


def test_search_by_audio(recap, checkpoint, tmp_path, clips):
    import soundfile

    soundfile.write(tmp_path / "clip.wav", clips[0], 48_000)
    found = recap("search", checkpoint / "datastore", "--audio", tmp_path / "clip.wav", "--model", checkpoint).out
    lines = found.splitlines()
    assert len(lines) == 4
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_errors_are_a_line(recap, checkpoint, captions_file, tmp_path, capsys):
    missing = recap("info", tmp_path / "absent", status=1).err
    assert missing.startswith("recap datastore: error: ")
    assert "Traceback" not in missing
    assert (
        "absent.csv" in recap("build", "absent.csv", "--output", tmp_path / "s", "--model", checkpoint, status=1).err
    )
    assert not (tmp_path / "s").exists()
    build = ("build", captions_file, "--output", tmp_path / "s", "--model", checkpoint)
    for options, said in (
        (("--index", "bogus"), "no kind of index"),
        (("--recall", "2"), "at most 1"),
        (("--device", "cuda:7"), "'cuda:7' is not there") if not torch.cuda.is_available() else ((), ""),
    ):
        if said:
            # Before anything is embedded, and nothing is left behind.
            assert said in recap(*build, *options, status=1).err
            assert not (tmp_path / "s").exists()
    assert "is a file" in recap(*build[:3], captions_file, "--model", checkpoint, status=1).err
    assert "a file, not the folder" in recap("info", captions_file, status=1).err
    (tmp_path / "empty.txt").write_text("\n")
    nothing = ("build", tmp_path / "empty.txt", "--output", tmp_path / "s", "--model", checkpoint)
    assert "the sources hold none" in recap(*nothing, status=1).err
    pairs = ("--columns", "caption", "--model", checkpoint)
    assert "OURS=THEIRS" in recap("build", captions_file, "--output", tmp_path / "s", *pairs, status=1).err
    for wrong in (("search", tmp_path), ("export", tmp_path, "--to", "milvus", "--index-params", "{bad")):
        with pytest.raises(SystemExit) as caught:
            main(["datastore", *map(str, wrong)])
        assert caught.value.code == 2
    assert "expected a JSON object, got '{bad'" in capsys.readouterr().err


def test_a_merge_replaces_no_datastore(recap, checkpoint):
    store = checkpoint / "datastore"
    twice = checkpoint / "twice"
    assert recap("merge", store, store, "--output", twice).out == "added: 8\n"
    assert "is not empty" in recap("merge", store, store, "--output", twice, status=1).err
    assert "captions: 16" in recap("info", twice, "--queries", "0").out
    assert "--text is empty" in recap("search", store, "--text", " ", "--model", checkpoint, status=1).err


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom recap_cli import main\n"
        "try:\n    main(['datastore', 'build', '--help'])\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
