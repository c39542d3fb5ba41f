"""Checkpoints with damaged or missing files: one line that names the folder, and never a caption of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
from conftest import synthetic_clip
from safetensors.torch import load_file, save_file

from recap_cli import main
from recap_hf import RecapForConditionalGeneration, RecapProcessor


@pytest.fixture
def folder(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    soundfile.write(tmp_path / "clip.wav", synthetic_clip(1.0, 1), 48_000)
    return tmp_path / "model"


def caption(folder, capsys):
    """Status and error of `recap caption`, which must not be a traceback."""
    arguments = ["caption", str(folder.parent / "clip.wav"), "--model", str(folder), "--max-new-tokens", "3"]
    status = main(arguments)
    return status, capsys.readouterr().err


def test_missing_weights_are_named(folder, capsys):
    weights = load_file(folder / "model.safetensors")
    dropped = [name for name in weights if ".crossattention.c_attn.weight" in name]
    save_file({name: weights[name] for name in weights if name not in dropped}, folder / "model.safetensors")
    status, errors = caption(folder, capsys)
    assert status == 1
    assert f"{len(dropped)} weights are missing, such as {dropped[0]}" in errors
    with pytest.raises(ValueError, match="weights are missing"):
        RecapForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder, capsys, share):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(share * len(data))])
    status, errors = caption(folder, capsys)
    assert status == 1
    assert errors.startswith("recap caption: error: ") and errors.count("\n") == 1
    assert str(folder) in errors


def test_every_damaged_json_file(folder, capsys):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))
    assert {"config.json", "processor_config.json", "tokenizer.json"} <= set(names)
    for name in names:
        whole = (folder / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"null", b"[1]", b"\xff\xfe\x00", b'{"a": ' * 20_000):
            (folder / name).write_bytes(damaged)
            status, errors = caption(folder, capsys)
            if status:
                assert errors.startswith("recap caption: error: "), (name, damaged[:20], errors)
                assert "Traceback" not in errors
                assert len(errors.splitlines()) == 1, (name, damaged[:20], errors)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("value", [None, -1, 10**9, "x", [], {}])
def test_every_wrong_setting(folder, capsys, value):
    for name in ("config.json", "processor_config.json"):
        whole = json.loads((folder / name).read_text())
        for key in whole:
            (folder / name).write_text(json.dumps({**whole, key: value}))
            _, errors = caption(folder, capsys)
            assert "Traceback" not in errors, (name, key)
        (folder / name).write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("eos_token_id", value) for value in ("x", None, True, [0, 10**6])),
        ("bos_token_id", None),
        ("pad_token_id", 2**70),
        ("bos_token_id", -1),
        ("num_beams", 0),
        ("rerank", "x"),
        ("rerank_weight", -1),
        # Too few, no number, no list, numbers of nothing.
        *(("no_repeat_token_groups", value) for value in ([0, 1], [1e308], 5, {}, [-1], ["x"])),
    ],
)
def test_impossible_decoding_is_named(folder, capsys, name, value):
    content = json.loads((folder / "generation_config.json").read_text())
    if isinstance(value, list) and name == "no_repeat_token_groups" and len(value) == 1:
        tokens = json.loads((folder / "config.json").read_text())["decoder"]["vocab_size"]
        value = [0] * (tokens - 1) + value
    (folder / "generation_config.json").write_text(json.dumps({**content, name: value}))
    status, errors = caption(folder, capsys)
    assert status == 1
    assert str(folder) in errors and name in errors and errors.count("\n") == 1


@pytest.mark.parametrize("pattern", ["processor_config.json", "tokenizer*", "config.json", "model.safetensors"])
def test_missing_files(folder, capsys, pattern):
    for path in Path(folder).glob(pattern):
        path.unlink()
    status, errors = caption(folder, capsys)
    assert status == 1
    assert str(folder) in errors and "Traceback" not in errors


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "clap_tokenizer/tokenizer.json"])
def test_a_damaged_tokenizer_is_not_another_one(folder, capsys, name):
    """Also without a datastore, whose check would notice it: transformers takes the decoder's for CLAP's."""
    shutil.rmtree(folder / "datastore")
    (folder.parent / "captions.txt").write_text("a dog barks\nrain falls\n")
    for damaged in (b"", b"\x80\x04\x95", (folder / name).read_bytes()[:200], b"[]", None):
        if damaged is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damaged)
        if name.endswith("tokenizer.json"):
            with pytest.raises((ValueError, OSError), match=str(folder)):
                RecapProcessor.from_pretrained(folder)
        status, errors = caption(folder, capsys)
        assert status == 1 and str(folder) in errors and errors.count("\n") == 1, (name, damaged, errors)


def test_code_of_a_folder_is_neither_run_nor_asked_for(folder, capsys, monkeypatch):
    (folder / "evil.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\nclass Tokenizer: pass\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = dict.fromkeys(
            ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor"), "evil.Tokenizer"
        )
        content.pop("tokenizer_class", None)
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    caption(folder, capsys)
    assert not (folder / "was_run").exists()
