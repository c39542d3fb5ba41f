"""How the test Hub reads a request and answers it, with planted faults (see `hub_server.py`)."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from hub_storage import HubError

if TYPE_CHECKING:
    from hub_server import HubServer

CHUNK = 65536


@dataclass
class Fault:
    """A planted fault for the next `times` requests whose method and path match, after `skip` of them went well.

    `status` answers with that status; `after` drops the connection once so many bytes of the body were received (PUT,
    POST) or sent (GET).
    """

    method: str
    pattern: str
    status: int | None = None
    after: int | None = None
    times: int = 1
    skip: int = 0


@dataclass
class Record:
    """One request as the server saw it, with the bytes of its body and of the answer's body."""

    method: str
    path: str
    received: int = 0
    sent: int = 0
    status: int | None = None
    authorised: bool = False
    range: str | None = None


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, pattern: str):
    """Register a handler's method for requests whose whole path matches `pattern`."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return register


class Connection(BaseHTTPRequestHandler):
    """Reads requests, hands each to its route and sends the answer; plants the faults on the way."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Nothing on stderr: the server keeps its own log."""

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        self.record = Record(self.command, path, range=self.headers.get("Range"))
        self.record.authorised = "Authorization" in self.headers
        with self.hub.storage.lock:
            self.hub.log.append(self.record)
        self.fault = self.hub.take_fault(self.command, path)
        try:
            self.body = self.read_body()
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, None, "planted fault")
            for method, pattern, name in ROUTES:
                match = pattern.fullmatch(path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    getattr(self, name)(**match.groupdict())
                    return
            raise HubError(404, None, f"unknown endpoint {self.command} {path}")
        except HubError as error:
            self.refuse(error)
        except ConnectionError:
            self.close_connection = True

    def read_body(self) -> bytes:
        """The request's body, whether its length is announced or it comes in chunks."""
        body = bytearray()
        for piece in self.body_pieces():
            body += piece
            self.record.received += len(piece)
            after = self.fault.after if self.fault and self.command in ("PUT", "POST") else None
            if after is not None and len(body) >= after:
                self.drop()
        return bytes(body)

    def body_pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read1(min(left, CHUNK))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def drop(self) -> None:
        """Cut the connection as a broken network does: with a reset, without an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionError("planted fault")

    def reply(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        after = self.fault.after if self.fault and self.command == "GET" else None
        self.wfile.write(content[:after])
        self.record.sent = len(content[:after])
        if after is not None and after < len(content):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionError("planted fault")

    def reply_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def refuse(self, error: HubError) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": error.message} | error.headers
        if error.code:
            headers["X-Error-Code"] = error.code
        try:
            self.reply(error.status, json.dumps({"error": error.message}).encode(), headers)
        except ConnectionError:
            self.close_connection = True
