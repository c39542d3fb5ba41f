"""A small Hugging Face Hub over HTTP on this machine, for tests of pushing and pulling.

It implements the endpoints that the `huggingface_hub` client (1.x and 2.x) calls when it creates a repository, commits
a folder with large files, opens a pull request, and downloads, in plain HTTP; the client itself runs unpatched with
`HF_ENDPOINT` set to `HubServer.endpoint` and Xet switched off by its own setting `HF_HUB_DISABLE_XET=1`.

What is like the real one: small files travel inside the commit, large ones through the LFS batch endpoint (whole or in
parts) and are offered only where their content is unknown; a commit applies as a whole; downloads carry etags, commit
ids and ranges, small files behind a redirect on the same host, large ones behind a redirect to another host that must
not see the token; a private repository looks absent to others. Faults (a status, a dropped connection) can be planted.
"""

from __future__ import annotations

import re
import threading
from http.server import ThreadingHTTPServer

from hub_connection import Fault, Record
from hub_endpoints import HubHandler, Token
from hub_storage import File, Repo, Storage


class HubServer:
    """The server and what it knows; a context manager.

    Args:
        part_size: above so many bytes a large file is uploaded in parts of this size.
        page_size: entries per page of a tree listing.
        lfs_threshold: bytes above which any file counts as large (some suffixes always do).
    """

    def __init__(self, part_size: int = 5_000_000, page_size: int = 1000, lfs_threshold: int = 10_000_000):
        self.storage = Storage(lfs_threshold)
        self.tokens = {"hf_owner": Token("user"), "hf_reader": Token("user", write=False), "hf_guest": Token("guest")}
        self.part_size, self.page_size = part_size, page_size
        self.faults: list[Fault] = []
        self.log: list[Record] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home, token: str | None = "hf_owner") -> dict[str, str]:
        """Environment variables that point a fresh process at this Hub, with its cache and token under `home`."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "no_proxy": "127.0.0.1,localhost",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def fail(self, method: str, pattern: str, **kwargs) -> None:
        """Plant a `Fault`."""
        self.faults.append(Fault(method, pattern, **kwargs))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.storage.lock:
            for fault in self.faults:
                if fault.times <= 0 or fault.method != method or not re.search(fault.pattern, path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.storage.repos[repo_type, repo_id]

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, File]:
        """The files of one revision."""
        return self.repo(repo_id, repo_type).resolve(revision).tree

    def uploads(self, since: int = 0) -> dict[str, int]:
        """Bytes received by path of upload, from record number `since` on."""
        received: dict[str, int] = {}
        for record in self.log[since:]:
            if record.method == "PUT":
                received[record.path] = received.get(record.path, 0) + record.received
        return received

    def uploads_of(self, oid: str) -> list[int]:
        """Bytes received of one object, in order of the requests."""
        return [record.received for record in self.log if record.method == "PUT" and oid in record.path]
