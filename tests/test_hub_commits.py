"""Folders to and from a Hub that speaks HTTP, with the real client: commits, resuming, revisions, errors."""

from __future__ import annotations

import hashlib
import os

import pytest
from hub_storage import File

PUSH = """
from recap_hf.modeling.hub_recap import commit_folder
def push(folder, repo="user/m", **kwargs):
    result = commit_folder(folder, repo, **kwargs)
    return [result.commit.oid, result.card_kept, result.deleted, result.commit.pr_url]
"""
FETCH = """
from recap_hf.modeling.hub_recap import fetch_folder
def fetch(repo="user/m", **kwargs):
    folder = fetch_folder(repo, **kwargs)
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()}
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
    (oid, card_kept, deleted, _), pulled = answer
    assert [commit.title for commit in hub.repo("user/m").history()] == ["Upload with recap_hf", "initial commit"]
    assert hub.repo("user/m").private
    assert (hub.repo("user/m").refs["main"], card_kept, deleted) == (oid, False, [])
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


def test_hidden_and_temporary_files_stay_at_home(hub, client, folder):
    for name in (".git/config", "__pycache__/x.pyc", "sub/__pycache__/y.pyc", ".DS_Store", ".gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    client.run(PUSH + "answer(push(sys.argv[1]))", folder)
    assert sorted(hub.files("user/m")) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "large.safetensors",
        "small.safetensors",
        "sub/b.json",
    ]


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
answer(push(folder, replaces=["*.safetensors"])[2])
"""
    )
    assert client.run(code, folder) == ["small.safetensors"]
    assert {"sub/b.json", "large.safetensors", ".gitattributes"} <= set(hub.files("user/m"))
    assert len(hub.repo("user/m").history()) == 3


@pytest.mark.parametrize("part", ["", "/2"])
def test_a_connection_dropped_in_mid_upload_is_taken_up_again(hub, client, folder, part):
    name = "large.safetensors" if part else "small.safetensors"
    path = uploaded(folder, name) + part
    hub.fail("PUT", f"{path}$", after=30_000)
    client.run(PUSH + "answer(push(sys.argv[1]))", folder)
    assert hub.files("user/m")[name].content == (folder / name).read_bytes()
    tries = [record for record in hub.log if record.path == path]
    assert [record.status for record in tries] == [None, 200]
    assert 30_000 <= tries[0].received < tries[1].received


def test_a_push_that_failed_goes_on_where_it_stopped(hub, client, folder):
    hub.fail("PUT", uploaded(folder, "small.safetensors"), status=403)
    code = PUSH + "answer(refusal(push, sys.argv[1]))"
    kind, message = client.run(code, folder)
    assert kind == "OSError" and "'user/m'" in message and "'main'" in message and "small.safetensors" in message
    assert "what has arrived is not sent" in message
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
    assert "the connection failed" in message and "Run the same command again" in message
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
    assert kind == "OSError" and "may not write there" in message and "--create-pr" in message
    url = client.run(PUSH + "answer(push(sys.argv[1], create_pr=True))", folder, token="hf_guest")[3]
    assert url == f"{hub.endpoint}/user/m/discussions/1"
    assert hub.files("user/m")["config.json"].content == b'{"a": 1}'
    assert hub.files("user/m", revision="refs/pr/1")["config.json"].content == b"proposal"


def test_a_revision_is_pinned_and_the_cache_works_offline(hub, client, folder):
    code = (
        PUSH
        + FETCH
        + """
from pathlib import Path
folder = Path(sys.argv[1])
first = push(folder)[0]
fetch(revision=first)
(folder / "config.json").write_text("later")
push(folder)
fetch()
answer([first, bytes.fromhex(fetch(revision=first)["config.json"]).decode()])
"""
    )
    first, pinned = client.run(code, folder)
    assert pinned == '{"a": 1}'
    number = len(hub.log)
    code = FETCH + "answer([fetch(revision=name)['config.json'] for name in sys.argv[1:]])"
    offline = client.run(code, first, "main", HF_HUB_OFFLINE="1")
    assert [bytes.fromhex(text).decode() for text in offline] == ['{"a": 1}', "later"]
    assert len(hub.log) == number, "offline means that nothing is asked"


def test_a_download_that_is_cut_off_is_resumed(hub, client):
    """The client keeps what it has in steps of 10 MiB, so the cut comes after one of them."""
    step = 10 * 1024**2
    content = bytes(range(251)) * (11 * 1024**2 // 251)
    oid = hashlib.sha256(content).hexdigest()
    hub.storage.put_object(oid, content)
    repo = hub.storage.create("model", "user/m", private=False)
    repo.commit("main", "large", {"w.safetensors": File(content, oid)}, None)
    hub.fail("GET", f"/cdn/{oid}", after=step + 1000)
    code = FETCH + "import hashlib; answer(hashlib.sha256(bytes.fromhex(fetch()['w.safetensors'])).hexdigest())"
    assert client.run(code) == oid
    tries = [(record.status, record.range, record.sent) for record in hub.log if record.path == f"/cdn/{oid}"]
    assert tries == [(200, None, step + 1000), (206, f"bytes={step}-", len(content) - step)]


def test_the_token_is_the_one_that_the_client_keeps(hub, client, folder):
    (client.home / "token").write_text("hf_owner")
    client.run(PUSH + "answer(push(sys.argv[1], private=True))", folder, token=None)
    assert "config.json" in hub.files("user/m")
    assert not [record for record in hub.log if record.authorised and record.path.startswith(("/cdn", "/lfs/"))]


def test_a_name_alone_belongs_to_the_user_of_the_token(client):
    code = """
from recap_hf.modeling.hub_recap import full_repo_id
answer([full_repo_id("other/m"), full_repo_id("m") if sys.argv[1] == "logged in" else refusal(full_repo_id, "m")])
"""
    assert client.run(code, "logged in") == ["other/m", "user/m"]
    kind, message = client.run(code, "logged out", token=None)[1]
    assert kind == "OSError" and "'m' names no user and no token is set" in message and "hf auth login" in message
    assert "hf auth login" in client.run(code, "logged out", token="hf_bad")[1][1]


REFUSALS = {
    None: [
        ("push(folder)", ["'user/m'", "'main'", "no token is set", "hf auth login"]),
        ("fetch('user/hidden')", ["'user/hidden'", "private", "no token is set", "hf auth login"]),
    ],
    "hf_bad": [("push(folder)", ["'user/m'", "a token is set", "hf auth login"])],
    "hf_reader": [("push(folder)", ["'user/m'", "may not write there", "--create-pr"])],
    "hf_owner": [
        ("push(folder, create_pr=True, revision='x')", ["'user/m'", "'x'", "no such revision"]),
        ("push(folder, 'a/b/c')", ["'a/b/c'"]),
        ("push(folder + '/empty')", ["/empty holds no file to push"]),
        ("fetch('user/absent', revision='v2')", ["'user/absent'", "'v2'", "Check the spelling"]),
        ("fetch('user/hidden', revision='v9')", ["'user/hidden'", "'v9'", "a branch, a tag or a full"]),
        ("fetch('user/d', repo_type='dataset')", ["dataset repository 'user/d'"]),
    ],
}


@pytest.mark.parametrize("token", REFUSALS)
def test_errors_name_repository_revision_and_remedy(hub, client, folder, token):
    hub.storage.create("model", "user/hidden", private=True)
    (folder / "empty").mkdir()
    calls = ", ".join(f"refusal(lambda: {code})" for code, _ in REFUSALS[token])
    answers = client.run(PUSH + FETCH + f"folder = sys.argv[1]\nanswer([{calls}])", folder, token=token)
    for (code, expected), answer in zip(REFUSALS[token], answers, strict=True):
        assert answer is not None and answer[0] in ("OSError", "ValueError"), code
        assert [part for part in expected if part not in answer[1]] == [], (code, answer)


def test_a_broken_hub_and_no_hub_are_told_apart(hub, client, folder):
    hub.fail("POST", "/api/repos/create", status=500)
    message = client.run(PUSH + "answer(refusal(push, sys.argv[1]))", folder)[1]
    assert "the Hub answered 500" in message and "Try later" in message
    code = PUSH + FETCH + "answer([refusal(push, sys.argv[1])[1], refusal(fetch)[1]])"
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}
    pushed, fetched = client.run(code, folder, **unreachable)
    assert "the connection failed" in pushed
    assert "not in the local cache" in fetched and "HF_HUB_OFFLINE" in fetched
    offline = client.run(PUSH + "answer(refusal(push, sys.argv[1]))", folder, HF_HUB_OFFLINE="1")[1]
    assert "offline mode is on" in offline and os.environ["HF_HUB_OFFLINE"] == "1"
