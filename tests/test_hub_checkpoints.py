"""Checkpoints and datastores pushed to a Hub that speaks HTTP, and pulled where the package is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import synthetic_clip
from huggingface_hub import DatasetCard, ModelCard

CAPTIONS = [
    {"caption": "a dog barks twice", "source": "AudioCaps", "licence": "MIT", "clip_id": "x1"},
    {"caption": "rain falls on a roof", "source": "Clotho", "licence": "CC BY-NC 4.0", "clip_id": "rain.wav"},
    {"caption": "a violin plays a slow melody", "source": "own"},
    {"caption": "sea waves roll onto a beach", "source": "Clotho", "licence": "CC BY-NC 4.0", "year": 2020},
]
CLI = """
from recap_cli import main
def recap(*args):
    status = main([str(arg) for arg in args])
    assert status == 0, status
"""
PUSH_AND_LISTEN = (
    CLI
    + """
import contextlib, io
said = io.StringIO()
with contextlib.redirect_stderr(said):
    recap("push", sys.argv[1], "user/recap", "--private")
answer(said.getvalue())
"""
)
PULL = """
import numpy as np
from transformers import AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
options = {"trust_remote_code": True, "revision": sys.argv[3]}
model = AutoModel.from_pretrained(sys.argv[1], **options)
processor = AutoProcessor.from_pretrained(sys.argv[1], **options)
captioner = pipeline("audio-captioning", model=sys.argv[1], **options)
result = captioner({"array": np.load(sys.argv[2]), "sampling_rate": 48_000})
if sys.argv[4:]:
    model.push_to_hub(sys.argv[4])
    processor.push_to_hub(sys.argv[4])
assert "recap_hf" not in sys.modules
answer([type(model).__module__.split(".")[0], processor.datastore.captions, result])
"""


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_processor):
    """A saved checkpoint with its datastore, between what else a training leaves in a folder."""
    from recap_hf import CaptionDatastore

    folder = tmp_path / "checkpoint"
    tiny_model.generation_config.max_new_tokens = 6
    tiny_processor.datastore = CaptionDatastore.from_captions(CAPTIONS, tiny_model, tiny_processor)
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"\0" * 10)
    (folder / "datastore" / "left-behind.npy").write_bytes(b"\0" * 10)
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"\0" * 10)
    (folder / "report.json").write_text(json.dumps({"data": str(tmp_path)}))
    (folder / "optimizer_link").symlink_to(tmp_path)
    (folder / "datastore" / "outward.jsonl").symlink_to("/etc/passwd")
    for name in (".env", "id_rsa", "notes.md", "config.json.bak", "tokenizer.json~", "secret_recap.py", "LICENSE.key"):
        (folder / name).write_text("private")
    (folder / "clap_tokenizer" / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "clip.npy"
    np.save(path, synthetic_clip(2.5, 1))
    return path


@pytest.fixture
def expected(tiny_model, tiny_processor, checkpoint, recording):
    """What the pipeline says in this process, before anything was pushed."""
    from transformers import pipeline

    captioner = pipeline("audio-captioning", model=str(checkpoint))
    return captioner({"array": np.load(recording), "sampling_rate": 48_000})


def strings(value):
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_a_pushed_checkpoint_runs_where_the_package_is_not_installed(hub, client, checkpoint, recording, expected):
    with open(checkpoint / "audio_recap.py", "a", encoding="utf-8") as file:
        file.write("open('was_run', 'w')\n")
    said = client.run(PUSH_AND_LISTEN, checkpoint)
    assert "audio_recap.py differs from the package's file" in said and said.count("differs") == 1
    repo, files = hub.repo("user/recap"), hub.files("user/recap")
    assert repo.private and len(repo.history()) == 2, "all in one commit"
    assert {"model.safetensors", "datastore/datastore.json", "modeling_recap.py", "README.md"} <= set(files)
    store = json.loads((checkpoint / "datastore" / "datastore.json").read_text())
    assert {name for name in files if not name.endswith("_recap.py")} == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(f"clap_tokenizer/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json")),
        *(f"datastore/{name}" for name in ("datastore.json", *store["files"])),
    }
    # The package's own code, whatever the folder has under its names.
    modeling = Path(__file__).resolve().parent.parent / "modeling"
    assert {name: file.content for name, file in files.items() if name.endswith("_recap.py")} == {
        path.name: path.read_bytes() for path in modeling.glob("*_recap.py")
    }
    for name, file in files.items():
        if name.endswith(".json"):
            paths = [text for text in strings(json.loads(file.content)) if str(checkpoint.parent) in text]
            assert not paths, f"{name} names a local path: {paths}"
    module, captions, result = client.run(PULL, "user/recap", recording, "main", "user/fork", package=False)
    assert module == "transformers_modules"
    assert captions == [entry["caption"] for entry in CAPTIONS]
    assert result["caption"] == expected["caption"]
    assert result["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert [hit["row"] for hit in result["retrieved"]] == [hit["row"] for hit in expected["retrieved"]]
    # Pushed again from there by transformers' own `push_to_hub`: the same weights, code and datastore.
    fork = hub.files("user/fork")
    assert {name for name in files if "/" in name} <= set(fork)
    assert {name: file.etag for name, file in fork.items() if name.endswith((".py", ".safetensors"))} == {
        name: file.etag for name, file in files.items() if name.endswith((".py", ".safetensors"))
    }


def test_a_checkpoint_that_was_downloaded_once_runs_offline(hub, client, checkpoint, recording, expected):
    """Downloaded as `hf download` does it, by a client that has never asked for any file that is not there."""
    code = "from huggingface_hub import snapshot_download; answer(snapshot_download('user/recap')[-40:])"
    client.run(CLI + "recap('push', sys.argv[1], 'user/recap'); answer(0)", checkpoint)
    commit = client.run(code)
    number = len(hub.log)
    for revision in (commit, "main"):
        arguments = ("user/recap", recording, revision)
        _, captions, result = client.run(PULL, *arguments, package=False, HF_HUB_OFFLINE="1")
        assert captions == [entry["caption"] for entry in CAPTIONS]
        assert result["caption"] == expected["caption"]
    assert len(hub.log) == number


@pytest.mark.parametrize(
    ("endpoint", "reason"), [(None, "user/absent"), ("http://127.0.0.1:9", "couldn't connect to 'http://127.0.0.1:9'")]
)
def test_a_checkpoint_that_is_not_there_is_one_line(hub, client, endpoint, reason):
    """No lines of retries before it, and no traceback, whether the Hub says so or cannot be reached."""
    code = """
from recap_cli import main
os.dup2(os.open("said.txt", os.O_CREAT | os.O_WRONLY), 2)
status = main(["caption", "a.wav", "--model", "user/absent"])
sys.stderr.flush()
answer([status, open("said.txt").read()])
"""
    status, said = client.run(code, **({} if endpoint is None else {"HF_ENDPOINT": endpoint}))
    assert status == 1
    assert said.startswith("recap caption: error: ") and reason in said
    assert said.count("\n") <= 3 and "etry" not in said and "Traceback" not in said


def test_the_card_says_what_the_files_say(checkpoint):
    from recap_hf.hub.prepare import prepare_folder

    facts = {"licence": "Apache 2.0", "limits": ["It is random."], "tags": ["whales"]}
    (checkpoint / "card_facts.json").write_text(json.dumps(facts))
    prepare_folder(checkpoint, "user/recap")
    card = ModelCard.load(checkpoint / "README.md")
    text, data = str(card), card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "audio-text-to-text")
    assert "whales" in data.tags
    assert "| Clotho | 2 | CC BY-NC 4.0 |" in text and "The captions of Clotho are not free" in text
    assert "For 1 of the captions no licence is recorded" in text
    assert "GPT-2, 2 layers of width 24" in text and "- It is random." in text
    assert "caption 1, caption 2, ..., caption 4" in text
    assert "| `num_beams` | 3 |" in text and "| `max_new_tokens` | 6 |" in text
    # A card that is there is its author's.
    (checkpoint / "README.md").write_text("mine")
    prepare_folder(checkpoint, "user/recap")
    assert (checkpoint / "README.md").read_text() == "mine"


def test_parameters_are_counted_from_the_files(checkpoint, tiny_model):
    """The tied output layer is one tensor; batch norm statistics are no parameters."""
    from recap_hf.hub.describe import describe_checkpoint, read_weights

    sizes, dtypes = read_weights(checkpoint)
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in tiny_model.parameters())
    assert dtypes == ["float32"]
    cross_attention = sum(parameter.numel() for parameter in tiny_model.cross_attention_parameters())
    assert f"{cross_attention:,} parameters" in describe_checkpoint(checkpoint).parts["cross-attention"]


def test_a_datastore_of_its_own_is_referred_to_by_id_and_commit(hub, client, checkpoint, recording, expected):
    code = (
        CLI
        + """
import json
from pathlib import Path
from datasets import load_dataset
from recap_hf import CaptionDatastore, open_datastore
recap("push", sys.argv[1], "user/recap", "--datastore-repo", "user/captions")
rows = load_dataset("user/captions", split="train").to_list()
stores = [
    CaptionDatastore.from_pretrained("user/captions"),
    CaptionDatastore.from_pretrained("user/recap"),
    open_datastore("user/captions", None, None),
]
reference = json.loads((Path(sys.argv[1]) / "datastore" / "datastore.json").read_text())
answer([rows, [store.records[:] for store in stores], "reference" in reference])
"""
    )
    rows, stores, local_changed = client.run(code, checkpoint)
    dataset, model = hub.files("user/captions", "dataset"), hub.files("user/recap")
    commit = hub.repo("user/captions", "dataset").refs["main"]
    assert json.loads(model["datastore/datastore.json"].content)["reference"] == {
        "repo_id": "user/captions",
        "revision": commit,
    }
    assert [name for name in model if name.startswith("datastore/")] == ["datastore/datastore.json"]
    assert not local_changed, "the user's own folder stays as it was"
    assert [list(row) for row in rows] == [["caption", "clip_id", "source", "licence", "year"]] * 4
    assert [{key: value for key, value in row.items() if value is not None} for row in rows] == CAPTIONS
    assert stores == [CAPTIONS] * 3
    card = DatasetCard(dataset["README.md"].content.decode()).data.to_dict()
    assert card["license"] == ["cc-by-nc-4.0", "mit", "unknown"]
    assert card["caption_sources"][0] == {"name": "Clotho", "captions": 2, "license": "CC BY-NC 4.0"}
    assert ModelCard(model["README.md"].content.decode()).data.datasets == ["user/captions"]

    # The checkpoint keeps the datastore that it was pushed with, whatever becomes of the dataset afterwards.
    hub.repo("user/captions", "dataset").commit("main", "emptied", {}, commit)
    _, captions, result = client.run(PULL, "user/recap", recording, "main", package=False)
    assert captions == [entry["caption"] for entry in CAPTIONS]
    assert result["caption"] == expected["caption"]


def test_a_second_push_sends_only_what_changed_and_resumes(hub, client, checkpoint):
    """The same folder again, then other weights over a connection that drops in the middle of them."""
    hub.fail("PUT", "^/lfs/[0-9a-f]+/1$", skip=1, after=100_000)
    code = (
        CLI
        + """
from safetensors.numpy import load_file, save_file
arguments = ["push", sys.argv[1], "user/recap", "--datastore-repo", "user/captions"]
recap(*arguments)
recap(*arguments)
weights = os.path.join(sys.argv[1], "model.safetensors")
state = load_file(weights)
state["decoder.transformer.wte.weight"] += 1
save_file(state, weights, metadata={"format": "pt"})
recap(*arguments)
answer(0)
"""
    )
    client.run(code, checkpoint)
    newest, first, initial = hub.repo("user/recap").history()
    assert initial.title == "initial commit", "the second push made no commit"
    assert newest.paths == ["model.safetensors"]
    assert len(hub.repo("user/captions", "dataset").history()) == 2
    size = (checkpoint / "model.safetensors").stat().st_size
    old, new = (hub.uploads_of(commit.tree["model.safetensors"].sha256) for commit in (first, newest))
    assert sum(old) == size, "sent once, not with every push"
    assert new[0] == pytest.approx(100_000, abs=70_000) and sum(new[1:]) == size, "cut off, then sent whole"
    assert sum(hub.uploads().values()) == sum(
        [*old, *new, *(len(file.content) for file in hub.files("user/captions", "dataset").values() if file.sha256)]
    )


def test_push_to_hub_of_model_processor_and_datastore(hub, client, checkpoint):
    code = """
import torch
from transformers import pipeline
from recap_hf import CaptionDatastore, RecapForConditionalGeneration, RecapProcessor
model = RecapForConditionalGeneration.from_pretrained(sys.argv[1])
processor = RecapProcessor.from_pretrained(sys.argv[1])
first = processor.push_to_hub("user/recap", private=True)
second = model.push_to_hub("user/recap", max_shard_size="300KB", tags=["whales"], commit_message="ours")
third = processor.datastore.push_to_hub("user/captions", revision="v1")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/again", max_shard_size="300KB")
processor.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/again", commit_message="its processor")
whole = pipeline("audio-captioning", model=sys.argv[1])
whole.save_pretrained(sys.argv[2] + "-whole", push_to_hub=True, repo_id="user/whole")
assert pipeline("audio-captioning", model="user/whole").captioner.datastore.captions == processor.datastore.captions
store = CaptionDatastore.from_pretrained("user/captions", revision="v1")
pulled = RecapForConditionalGeneration.from_pretrained("user/recap", revision=second.oid).state_dict()
assert all(torch.equal(tensor, pulled[name]) for name, tensor in model.state_dict().items())
assert RecapProcessor.from_pretrained("user/recap").datastore.captions == store.captions
refused = refusal(CaptionDatastore.from_pretrained, "user/absent", revision="v3")
answer([first.oid, second.oid, third.oid, store.records[:], sorted(os.listdir(sys.argv[2])), refused])
"""
    first, second, third, records, saved, (kind, message) = client.run(code, checkpoint, client.home / "saved")
    assert kind == "OSError" and "dataset or model repository 'user/absent', revision 'v3'" in message
    repo, files = hub.repo("user/recap"), hub.files("user/recap")
    assert [commit.oid for commit in repo.history()[:2]] == [second, first]
    assert [commit.title for commit in repo.history()[:2]] == ["ours", "Upload processor"]
    assert repo.private and "whales" in ModelCard(files["README.md"].content.decode()).data.tags
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors.index.json" in files
    assert max(len(files[name].content) for name in shards) < 400_000
    assert hub.repo("user/captions", "dataset").refs["v1"] == third and records == CAPTIONS
    assert list(hub.files("user/captions", "dataset")) == [".gitattributes"], "main is as it was"
    # Saving with `push_to_hub=True` pushes all that is saved, code and datastore included.
    again = set(hub.files("user/again"))
    assert set(shards) < again and {name.split("/")[0] for name in again} == {*saved, ".gitattributes", "README.md"}
    assert {"modeling_recap.py", "clap_tokenizer/config.json", "datastore/datastore.json"} < again
    assert hub.repo("user/again").history()[0].title == "its processor"


@pytest.mark.slow
def test_the_embedded_default_goes_to_the_hub_and_back(hub, client, tmp_path):
    """The model that ships with the package, its own example, a dropped connection, and a process without recap_hf."""
    from transformers import pipeline

    from recap_hf import default_model_path, examples_path, load_audio

    if not (default_model_path() / "config.json").is_file():
        pytest.skip("no embedded default in this checkout; `recap tiny` makes it")
    waveform, rate = load_audio(sorted(examples_path().glob("*.flac"))[0])
    np.save(tmp_path / "clip.npy", waveform)
    said = pipeline("audio-captioning")({"array": waveform, "sampling_rate": rate})
    hub.fail("PUT", "^/lfs/[0-9a-f]+/2$", after=100_000)
    push = CLI + "recap('push', sys.argv[1], 'user/recap', '--datastore-repo', 'user/captions'); answer(0)"
    client.run(push, default_model_path())
    number = len(hub.log)
    client.run(push, default_model_path())
    assert hub.uploads(number) == {}
    assert rate == 48_000
    _, _, result = client.run(PULL, "user/recap", tmp_path / "clip.npy", "main", package=False)
    assert result["caption"] == said["caption"]
    assert [hit["caption"] for hit in result["retrieved"]] == [hit["caption"] for hit in said["retrieved"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["FOLDER/absent", "user/m"], "is no folder"),
        (["FOLDER/empty", "user/m"], "has no config.json"),
        (["FOLDER/other", "user/m"], "is the configuration of a 'bert' model, expected 'recap'"),
        (
            ["FOLDER/other", "user/m", "--card-facts", "FOLDER/facts.json"],
            "facts.json: the card's facts has unknown keys",
        ),
    ],
)
def test_folders_that_cannot_be_pushed_are_refused(tmp_path, capsys, arguments, expected):
    from recap_cli import main

    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "facts.json").write_text('{"colour": "red"}')
    assert main(["push", *(argument.replace("FOLDER", str(tmp_path)) for argument in arguments)]) == 1
    output = capsys.readouterr()
    assert expected in output.err and output.err.startswith("recap push: error: ") and output.out == ""


def test_a_link_out_of_the_folder_is_refused(tmp_path, checkpoint, capsys):
    from recap_cli import main

    (tmp_path / "outside.json").write_text("{}")
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "tokenizer_config.json").symlink_to(tmp_path / "outside.json")
    assert main(["push", str(checkpoint), "user/m"]) == 1
    assert "tokenizer_config.json is a link to" in capsys.readouterr().err
