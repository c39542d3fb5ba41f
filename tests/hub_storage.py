"""Repositories of the test Hub: commits, refs and blobs, kept in memory (see `hub_server.py`)."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field

GITATTRIBUTES = b"*.bin filter=lfs\n*.npy filter=lfs\n*.parquet filter=lfs\n*.safetensors filter=lfs\n"
LFS_SUFFIXES = (".bin", ".faiss", ".npy", ".npz", ".parquet", ".safetensors", ".wav")
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer other than success, with the headers that the Hub sends with it."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def git_sha(content: bytes) -> str:
    """Object id that git gives to a blob of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class File:
    """One file of a commit. `sha256` is set for files kept in large file storage, and only for them."""

    content: bytes
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        lines = [
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        ]
        return "\n".join([*lines, ""]).encode()

    @property
    def oid(self) -> str:
        return git_sha(self.pointer if self.sha256 else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Commit:
    """A commit: all files of its tree, and the `paths` that the request named."""

    oid: str
    parent: str | None
    title: str
    tree: dict[str, File]
    paths: list[str] = field(default_factory=list)


@dataclass
class Repo:
    """A repository: `refs` maps branch names, tags and `refs/pr/N` to commit ids."""

    repo_type: str
    repo_id: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[dict] = field(default_factory=list)

    def commit(self, ref: str, title: str, tree: dict[str, File], parent: str | None) -> Commit:
        listing = json.dumps(
            [parent, title, sorted((path, file.oid) for path, file in tree.items()), len(self.commits)]
        )
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, tree)
        self.refs[ref] = oid
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from the newest to the oldest."""
        found, oid = [], self.resolve(revision).oid
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found

    def open_pull_request(self, title: str, base: str) -> dict:
        """Open a pull request whose ref starts at `base`."""
        number = len(self.pulls) + 1
        self.refs[f"refs/pr/{number}"] = self.resolve(base).oid
        self.pulls.append({"num": number, "title": title, "base": base})
        return self.pulls[-1]

    def listing(self, revision: str, folder: str = "", recursive: bool = False) -> list[dict]:
        """Files (and, unless `recursive`, the folders) under `folder`."""
        tree = self.resolve(revision).tree
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in tree.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on '{revision}'")
        folders, files = set(), []
        for path in sorted(inside):
            parts = path[len(prefix) :].split("/")
            folders.update(
                prefix + "/".join(parts[:n]) for n in range(1, len(parts) if recursive else min(len(parts), 2))
            )
            if recursive or len(parts) == 1:
                files.append(inside[path].describe(path))
        return [
            {"type": "directory", "path": path, "oid": git_sha(path.encode()), "size": 0} for path in sorted(folders)
        ] + files

    def info(self, revision: str) -> dict:
        commit = self.resolve(revision)
        return {
            "_id": git_sha(self.repo_id.encode())[:24],
            "id": self.repo_id,
            "author": self.repo_id.split("/")[0],
            "sha": commit.oid,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        }


class Storage:
    """All repositories and the large file storage that they share."""

    def __init__(self, lfs_threshold: int = 10_000_000):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lfs_threshold = lfs_threshold
        self.lock = threading.RLock()

    def create(self, repo_type: str, repo_id: str, private: bool) -> Repo:
        if (repo_type, repo_id) in self.repos:
            raise HubError(409, None, "You already created this repo")
        repo = Repo(repo_type, repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": File(GITATTRIBUTES)}, None)
        self.repos[repo_type, repo_id] = repo
        return repo

    def upload_mode(self, path: str, size: int, sample: bytes) -> str:
        large = path.endswith(LFS_SUFFIXES) or size > self.lfs_threshold or b"\0" in sample
        return "lfs" if large and size else "regular"

    def put_object(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, None, f"content does not match the object id {oid}")
        self.objects[oid] = content

    def apply_commit(
        self, repo: Repo, revision: str, items: list[dict], create_pr: bool
    ) -> tuple[Commit, dict | None]:
        """Apply the ndjson items of a commit request: all of them or, on an error, none."""
        header = next(item["value"] for item in items if item["key"] == "header")
        base = repo.resolve(revision)
        if header.get("parentCommit") not in (None, base.oid):
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        tree = dict(base.tree)
        for item in items:
            value = item["value"]
            if item["key"] == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, None, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
                tree[value["path"]] = File(self.objects[value["oid"]], value["oid"])
            elif item["key"] == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
            elif item["key"] == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                tree = {path: file for path, file in tree.items() if not path.startswith(prefix)}
        pull = repo.open_pull_request(header["summary"], revision) if create_pr else None
        ref = f"refs/pr/{pull['num']}" if pull else revision
        if ref not in repo.refs:
            raise HubError(400, None, f"cannot commit to {revision}: it is not a branch")
        commit = repo.commit(ref, header["summary"], tree, base.oid)
        commit.paths = [item["value"]["path"] for item in items if item["key"] != "header"]
        return commit, pull
