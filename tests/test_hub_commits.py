"""Folders to and from a Hub that speaks HTTP, with the real client: commits, resuming, revisions, errors."""

from __future__ import annotations

import hashlib
import os

import pytest

PUSH = """
from pathlib import Path
from recap_hf.hub.push import PushOptions, upload
def push(folder, repo="user/m", replaces=(), **options):
    result = upload(Path(folder), repo, "model", PushOptions(**options), replaces)
    return [result.commit.oid, result.card_kept, result.commit.pr_url]
"""
FETCH = """
from huggingface_hub import snapshot_download
def fetch(repo="user/m", **kwargs):
    folder = Path(snapshot_download(repo, **kwargs))
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()}
"""
STORE = """
from recap_hf.modeling.datastore_files_recap import fetch_datastore
"""


@pytest.fixture
def folder(tmp_path):
    """A small file, one in a subfolder, a card, and two large ones, the second of them in three parts."""
    root = tmp_path / "folder"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text('{"a": 1}')
    (root / "sub" / "b.json").write_text("{}")
    (root / "README.md").write_text("---\nlicense: mit\n---\nours")
    (root / "small.safetensors").write_bytes(bytes(range(256)) * 300)
    (root / "large.safetensors").write_bytes(b"\1" + bytes(range(256)) * 1000)
    return root


def uploaded(folder, name):
    """Path under which the Hub receives the content of a file."""
    return f"/lfs/{hashlib.sha256((folder / name).read_bytes()).hexdigest()}"


def test_a_push_is_one_commit_and_a_pull_gives_it_back(hub, client, folder):
    answer = client.run(PUSH + FETCH + "answer([push(sys.argv[1], private=True), fetch()])", folder)
    (oid, card_kept, _), pulled = answer
    assert [commit.title for commit in hub.repo("user/m").history()] == ["Upload RECAP model", "initial commit"]
    assert hub.repo("user/m").private
    assert (hub.repo("user/m").refs["main"], card_kept) == (oid, False)
    del pulled[".gitattributes"]
    assert pulled == {
        path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()
    }
    # The three parts of the large file, each sent once.
    assert sorted(hub.uploads().values()) == [56_001, 76_800, 100_000, 100_000]


def test_a_second_push_sends_only_what_changed(hub, client, folder):
    code = (
        PUSH
        + """
from pathlib import Path
folder = Path(sys.argv[1])
first = push(folder)
again = push(folder)
(folder / "config.json").write_text('{"a": 2}')
(folder / "small.safetensors").write_bytes(b"other" * 20000)
answer([first, again, push(folder)])
"""
    )
    first, again, third = client.run(code, folder)
    assert first[0] == again[0] != third[0]
    assert hub.repo("user/m").history()[0].paths == ["config.json", "small.safetensors"]
    sent = hub.uploads()
    assert sent[uploaded(folder, "small.safetensors")] == 100_000
    assert sum(sent.values()) == 332_801 + 100_000


def test_a_card_is_kept_unless_it_is_to_be_overwritten(hub, client, folder):
    code = (
        PUSH
        + """
from pathlib import Path
folder = Path(sys.argv[1])
push(folder)
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\nnew")
kept = push(folder)[1]
from huggingface_hub import hf_hub_download
text = Path(hf_hub_download("user/m", "README.md")).read_text()
overwritten = push(folder, overwrite_card=True)[1]
answer([kept, text[-4:], overwritten])
"""
    )
    assert client.run(code, folder) == [True, "ours", False]
    assert hub.files("user/m")["README.md"].content.endswith(b"new")


def test_files_of_an_earlier_push_that_are_replaced_go(hub, client, folder):
    code = (
        PUSH
        + """
from pathlib import Path
folder = Path(sys.argv[1])
push(folder)
(folder / "small.safetensors").unlink()
(folder / "sub" / "b.json").unlink()
answer(push(folder, replaces=["*.safetensors"]))
"""
    )
    client.run(code, folder)
    assert "small.safetensors" not in hub.files("user/m")
    assert {"sub/b.json", "large.safetensors", ".gitattributes"} <= set(hub.files("user/m"))
    assert len(hub.repo("user/m").history()) == 3


def test_a_push_that_failed_goes_on_where_it_stopped(hub, client, folder):
    hub.fail("PUT", uploaded(folder, "small.safetensors"), status=403)
    code = PUSH + "answer(refusal(push, sys.argv[1]))"
    kind, message = client.run(code, folder)
    assert kind == "OSError" and "'user/m'" in message and "'main'" in message and "small.safetensors" in message
    assert "files that have arrived are not sent" in message
    assert len(hub.repo("user/m").history()) == 1, "nothing is visible of half a push"
    stored = set(hub.storage.objects)
    number = len(hub.log)
    client.run(PUSH + "answer(push(sys.argv[1]))", folder)
    sent_again = {path.split("/")[2] for path in hub.uploads(number)}
    assert sent_again and not sent_again & stored
    assert set(hub.files("user/m")) >= {"small.safetensors", "large.safetensors"}


def test_a_commit_whose_connection_drops_can_be_repeated(hub, client, folder):
    hub.fail("POST", "/commit/", after=100)
    message = client.run(PUSH + "answer(refusal(push, sys.argv[1]))", folder)[1]
    assert "Run the same command again" in message
    number = len(hub.log)
    client.run(PUSH + "answer(push(sys.argv[1]))", folder)
    assert hub.uploads(number) == {}, "the large files had arrived"
    assert "config.json" in hub.files("user/m")


def test_branches_and_pull_requests(hub, client, folder):
    code = (
        PUSH
        + FETCH
        + """
from pathlib import Path
folder = Path(sys.argv[1])
push(folder)
(folder / "config.json").write_text("branch")
push(folder, revision="dev/next")
answer(sorted(bytes.fromhex(fetch(revision=name)["config.json"]).decode() for name in ("main", "dev/next")))
"""
    )
    assert client.run(code, folder) == ["branch", '{"a": 1}']
    (folder / "config.json").write_text("proposal")
    # A guest may not write there, but may propose.
    kind, message = client.run(PUSH + "answer(refusal(push, sys.argv[1]))", folder, token="hf_guest")
    assert kind == "OSError" and "token may write there" in message and "--create-pr" in message
    url = client.run(PUSH + "answer(push(sys.argv[1], create_pr=True))", folder, token="hf_guest")[2]
    assert url == f"{hub.endpoint}/user/m/discussions/1"
    assert hub.files("user/m")["config.json"].content == b'{"a": 1}'
    assert hub.files("user/m", revision="refs/pr/1")["config.json"].content == b"proposal"


REFUSALS = {
    None: [("push(folder)", ["'user/m'", "'main'", "no token is set", "hf auth login"])],
    "hf_bad": [("push(folder)", ["'user/m'", "a token is set", "hf auth login"])],
    "hf_reader": [("push(folder)", ["'user/m'", "403", "--create-pr"])],
    "hf_owner": [
        ("push(folder, create_pr=True, revision='x')", ["create_pr=True", "revision='x'"]),
        ("push(folder, 'a/b/c')", ["'a/b/c'"]),
        (
            "fetch_datastore('user/absent', revision='v2')",
            ["dataset or model", "'user/absent'", "'v2'", "authenticated"],
        ),
        (
            "fetch_datastore('user/hidden', revision='v9')",
            ["'user/hidden'", "'v9'", "Revision Not Found"],
        ),
        ("fetch_datastore('user/d', repo_type='dataset')", ["the dataset repository 'user/d'"]),
        ("fetch_datastore('a/b/c')", ["'a/b/c'", "Repo id"]),
    ],
}


@pytest.mark.parametrize("token", REFUSALS)
def test_errors_name_repository_revision_and_remedy(hub, client, folder, token):
    """In one line each."""
    hub.storage.create("model", "user/hidden", private=True)
    calls = ", ".join(f"refusal(lambda: {code})" for code, _ in REFUSALS[token])
    answers = client.run(PUSH + STORE + f"folder = sys.argv[1]\nanswer([{calls}])", folder, token=token)
    for (code, expected), answer in zip(REFUSALS[token], answers, strict=True):
        assert answer is not None and answer[0] in ("OSError", "ValueError"), code
        assert [part for part in expected if part not in answer[1]] == [], (code, answer)
        assert "\n" not in answer[1], answer


def test_a_broken_hub_and_no_hub_are_told_apart(hub, client, folder):
    hub.fail("POST", "/api/repos/create", status=500)
    message = client.run(PUSH + "answer(refusal(push, sys.argv[1]))", folder)[1]
    assert "the Hub answered 500" in message and "Run the same command again" in message
    code = PUSH + STORE + "answer([refusal(push, sys.argv[1])[1], refusal(fetch_datastore, 'user/m')[1]])"
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}
    pushed, fetched = client.run(code, folder, **unreachable)
    assert "Run the same command again" in pushed
    assert "check your internet connection" in fetched
    offline = client.run(PUSH + "answer(refusal(push, sys.argv[1]))", folder, HF_HUB_OFFLINE="1")[1]
    assert "offline mode is on" in offline and os.environ["HF_HUB_OFFLINE"] == "1"
