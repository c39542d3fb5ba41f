"""The endpoints of the test Hub (see `hub_server.py`)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from hub_connection import Connection, route
from hub_storage import DATE, Commit, File, HubError, Repo

TYPES = "(?P<type>models|datasets|spaces)"
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Token:
    """An access token: its user and whether it may write to that user's repositories."""

    user: str
    write: bool = True


class HubHandler(Connection):
    """Answers the requests of one connection."""

    # who asks, and what they may see

    def token(self) -> Token | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = self.hub.tokens.get(header.removeprefix("Bearer "))
        if token is None:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return token

    def find(self, repo_type: str, repo_id: str, write: bool = False) -> Repo:
        """The repository, if the caller may see it (and, with `write`, change it)."""
        token = self.token()
        repo = self.hub.storage.repos.get((repo_type.rstrip("s"), repo_id))
        owner = token is not None and token.user == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise HubError(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token is None:
            raise HubError(401, None, "Invalid username or password.")
        if write and not (owner and token.write):
            raise HubError(403, None, f"You don't have the rights to write to {repo_id}")
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        token = self.token()
        if token is None:
            raise HubError(401, None, "Invalid username or password.")
        role = {"role": "write" if token.write else "read", "displayName": "test"}
        user = {"type": "user", "id": "1", "name": token.user, "fullname": token.user, "orgs": []}
        self.reply_json(user | {"auth": {"type": "access_token", "accessToken": role}})

    # repositories, branches and pull requests

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        request = json.loads(self.body)
        token = self.token()
        if token is None:
            raise HubError(401, None, "Invalid username or password.")
        repo_type, repo_id = (
            request.get("type") or "model",
            f"{request.get('organization') or token.user}/{request['name']}",
        )
        if not token.write or token.user != repo_id.split("/")[0]:
            raise HubError(403, None, f"You don't have the rights to create a {repo_type} under this namespace")
        private = request.get("private") or request.get("visibility") == "private"
        url = f"{self.hub.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        try:
            with self.hub.storage.lock:
                self.hub.storage.create(repo_type, repo_id, bool(private))
            self.reply_json({"url": url, "name": repo_id, "id": repo_id})
        except HubError as error:
            self.reply_json({"error": error.message, "url": url}, error.status)

    @route("GET", f"/api/{TYPES}/{REPO}(/revision/(?P<revision>.+))?")
    def repo_info(self, type: str, repo: str, revision: str | None) -> None:
        self.reply_json(self.find(type, repo).info(revision or "main"))

    @route("GET", f"/api/{TYPES}/{REPO}/refs")
    def refs(self, type: str, repo: str) -> None:
        found = self.find(type, repo)
        prs = [
            {"name": ref, "ref": ref, "targetCommit": oid}
            for ref, oid in found.refs.items()
            if ref.startswith("refs/pr/")
        ]
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in found.refs.items()
            if not ref.startswith("refs/pr/")
        ]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in found.tags.items()]
        self.reply_json({"branches": branches, "converts": [], "tags": tags, "pullRequests": prs})

    @route("POST", f"/api/{TYPES}/{REPO}/branch/(?P<name>.+)")
    def create_branch(self, type: str, repo: str, name: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self.create_ref(self.find(type, repo, write=True).refs, name, type, repo, start)

    @route("POST", f"/api/{TYPES}/{REPO}/tag/(?P<start>.+)")
    def create_tag(self, type: str, repo: str, start: str) -> None:
        self.create_ref(self.find(type, repo, write=True).tags, json.loads(self.body)["tag"], type, repo, start)

    def create_ref(self, names: dict[str, str], name: str, type: str, repo: str, start: str) -> None:
        if name in names:
            raise HubError(409, None, f"Reference {name} already exists")
        names[name] = self.find(type, repo).resolve(start).oid
        self.reply_json({}, 201)

    @route("POST", f"/api/{TYPES}/{REPO}/discussions")
    def create_discussion(self, type: str, repo: str) -> None:
        request = json.loads(self.body)
        with self.hub.storage.lock:
            pull = self.find(type, repo).open_pull_request(request["title"], "main")
        self.reply_json({"num": pull["num"], "pullRequest": True}, 201)

    @route("GET", f"/api/{TYPES}/{REPO}/discussions/(?P<number>[0-9]+)")
    def discussion(self, type: str, repo: str, number: str) -> None:
        pull = self.find(type, repo).pulls[int(number) - 1]
        details = {
            "title": pull["title"],
            "num": pull["num"],
            "author": {"name": "user"},
            "repo": {"name": repo, "type": type.rstrip("s")},
            "status": "draft",
            "createdAt": DATE,
            "isPullRequest": True,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
            "diff": "",
        }
        self.reply_json(details)

    # uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        request = json.loads(self.body)
        block = re.match(r"---\n(.*?)\n---", request["content"], re.S)
        warnings = [] if block else [{"message": "empty or missing yaml metadata in repo card"}]
        self.reply_json({"errors": [], "warnings": warnings})

    @route("POST", f"/api/{TYPES}/{REPO}/preupload/(?P<revision>.+)")
    def preupload(self, type: str, repo: str, revision: str) -> None:
        found = self.find(type, repo, write="create_pr" not in self.query)
        tree, answers = found.resolve(revision).tree, []
        for file in json.loads(self.body)["files"]:
            mode = self.hub.storage.upload_mode(file["path"], file["size"], base64.b64decode(file["sample"]))
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in tree:
                answer["oid"] = tree[file["path"]].etag
            answers.append(answer)
        self.reply_json({"files": answers, "commitOid": found.resolve(revision).oid})

    @route("POST", f"/((?P<type>datasets|spaces)/)?{REPO}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, type: str | None, repo: str) -> None:
        request = json.loads(self.body)
        self.find(type or "models", repo, write="ref" in request)
        objects = [self.upload_actions(item["oid"], item["size"]) for item in request["objects"]]
        self.reply_json({"transfer": "multipart", "objects": objects})

    def upload_actions(self, oid: str, size: int) -> dict:
        """How to upload an object; no action where its content is already stored."""
        answer: dict = {"oid": oid, "size": size}
        if oid in self.hub.storage.objects:
            return answer
        verify = {"href": f"{self.hub.endpoint}/lfs-verify/{oid}"}
        if size <= self.hub.part_size:
            answer["actions"] = {"upload": {"href": f"{self.hub.cdn}/lfs/{oid}"}, "verify": verify}
            return answer
        count = -(-size // self.hub.part_size)
        header = {f"{number:05d}": f"{self.hub.cdn}/lfs/{oid}/{number}" for number in range(1, count + 1)}
        upload = {
            "href": f"{self.hub.endpoint}/lfs-complete/{oid}",
            "header": header | {"chunk_size": str(self.hub.part_size)},
        }
        answer["actions"] = {"upload": upload, "verify": verify}
        return answer

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def put_object(self, oid: str) -> None:
        self.hub.storage.put_object(oid, self.body)
        self.reply(200)

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
    def put_part(self, oid: str, number: str) -> None:
        with self.hub.storage.lock:
            self.hub.storage.parts.setdefault(oid, {})[int(number)] = self.body
        self.reply(200, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    @route("POST", "/lfs-complete/(?P<oid>[0-9a-f]{64})")
    def complete(self, oid: str) -> None:
        with self.hub.storage.lock:
            parts = self.hub.storage.parts.pop(oid)
            for part in json.loads(self.body)["parts"]:
                if part["etag"].strip('"') != hashlib.md5(parts[part["partNumber"]]).hexdigest():
                    raise HubError(400, None, f"part {part['partNumber']} of {oid} has another etag")
            self.hub.storage.put_object(oid, b"".join(parts[number] for number in sorted(parts)))
        self.reply_json({})

    @route("POST", "/lfs-verify/(?P<oid>[0-9a-f]{64})")
    def verify(self, oid: str) -> None:
        if len(self.hub.storage.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, None, f"{oid} was not uploaded")
        self.reply_json({})

    @route("POST", f"/api/{TYPES}/{REPO}/commit/(?P<revision>.+)")
    def commit(self, type: str, repo: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        found = self.find(type, repo, write=not create_pr)
        items = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.storage.lock:
            commit, pull = self.hub.storage.apply_commit(found, revision, items, create_pr)
        prefix = "" if type == "models" else f"{type}/"
        answer = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.hub.endpoint}/{prefix}{repo}/commit/{commit.oid}",
        }
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{prefix}{repo}/discussions/{pull['num']}"
        self.reply_json(answer)

    # downloads

    @route("GET", f"/api/{TYPES}/{REPO}/tree/(?P<rest>.+)")
    def tree(self, type: str, repo: str, rest: str) -> None:
        found = self.find(type, repo)
        revision, folder = split_revision(found, rest)
        entries = found.listing(revision, folder, self.query.get("recursive", "").lower() in ("true", "1"))
        start, end = int(self.query.get("cursor", 0)), int(self.query.get("cursor", 0)) + self.hub.page_size
        headers = {}
        if end < len(entries):
            query = "&".join(f"{key}={value}" for key, value in {**self.query, "cursor": end}.items())
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.reply_json(entries[start:end], headers=headers)

    @route("POST", f"/api/{TYPES}/{REPO}/paths-info/(?P<revision>.+)")
    def paths_info(self, type: str, repo: str, revision: str) -> None:
        found = self.find(type, repo)
        is_form = "json" not in self.headers.get("Content-Type", "")
        paths = parse_qs(self.body.decode())["paths"] if is_form else json.loads(self.body)["paths"]
        entries = {entry["path"]: entry for entry in found.listing(revision, recursive=True)}
        self.reply_json([entries[path] for path in paths if path in entries])

    @route("GET", f"/((?P<type>datasets|spaces)/)?{REPO}/resolve/(?P<rest>.+)")
    def resolve(self, type: str | None, repo: str, rest: str) -> None:
        found = self.find(type or "models", repo)
        revision, path = split_revision(found, rest)
        commit = found.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = self.file_of(commit, path)
        if file.sha256 is None:
            headers["Location"] = f"/api/resolve-cache/{type or 'models'}/{repo}/{commit.oid}/{path}"
            self.reply(307, headers=headers)
        else:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            self.reply(302, headers=headers | {"Location": f"{self.hub.cdn}/cdn/{file.sha256}"})

    @route("GET", f"/api/resolve-cache/{TYPES}/{REPO}/(?P<revision>[0-9a-f]+)/(?P<path>.+)")
    def resolve_cache(self, type: str, repo: str, revision: str, path: str) -> None:
        commit = self.find(type, repo).resolve(revision)
        file = self.file_of(commit, path)
        self.send_content(file.content, {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'})

    @route("GET", "/cdn/(?P<oid>[0-9a-f]{64})")
    def cdn_object(self, oid: str) -> None:
        if self.record.authorised:
            raise HubError(400, None, "a token was sent to the storage host")
        self.send_content(self.hub.storage.objects[oid], {"ETag": f'"{oid}"'})

    def file_of(self, commit: Commit, path: str) -> File:
        if path not in commit.tree:
            # The client remembers that this commit has no such file, which it needs to know offline.
            raise HubError(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit.oid)
        return commit.tree[path]

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        """The content, or the range of it that was asked for."""
        size, wanted = len(content), re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        if wanted is None:
            self.reply(200, content, headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last), size - 1) if first and last else size - 1
        if start >= size:
            self.reply(416, headers={"Content-Range": f"bytes */{size}"})
            return
        self.reply(206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"})


def split_revision(repo: Repo, rest: str) -> tuple[str, str]:
    """Split `REVISION/PATH`, where the revision may itself hold slashes (`refs/pr/1`, `feature/x`)."""
    for name in sorted([*repo.refs, *repo.tags, *repo.commits], key=len, reverse=True):
        if rest == name or rest.startswith(name + "/"):
            return name, rest[len(name) + 1 :]
    revision, _, path = rest.partition("/")
    return revision, path
