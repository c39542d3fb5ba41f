"""The HTTP side of `recap serve`: limits, forms, errors."""

import asyncio
import hmac
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Annotated, Any

from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.serving.process import WorkerProcess
from recap_hf.serving.worker import CAPTIONS, SEARCH, TAGS, RequestError
from recap_hf.version import __version__

try:
    from fastapi import FastAPI, File, Form, Request, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError('The service needs FastAPI and uvicorn: pip install "recap-hf[serve]"') from error

_AUDIO = "/v1/audio/"
# Larger values would take the memory of all.
_LARGEST = {"num_beams": 32, "candidates": 32, "k": 64, "max_new_tokens": 256}
_STATUS_TYPES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "upload_timeout",
    413: "upload_too_large",
}
# Room for the other fields of a form beside its file.
_FIELDS_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Limits of the service.

    Args:
        max_bytes (`int`, *optional*, defaults to 100,000,000): largest upload.
        timeout_s (`float`, *optional*, defaults to 120): longest time for an upload, and from then to its answer.
        queue (`int`, *optional*, defaults to 128): requests that are received, wait or are worked on.
        token (`str`, *optional*): what a client must send as `Authorization: Bearer TOKEN`.
    """

    max_bytes: int = 100_000_000
    timeout_s: float = 120.0
    queue: int = 128
    token: str | None = None


def create_app(worker: WorkerProcess, model: str, limits: Limits | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        worker ([`WorkerProcess`]): started.
        model (`str`): its name, for clients.
        limits ([`Limits`], *optional*)
    """
    limits = limits or Limits()
    about = "Captions, tags and search of recordings. Errors are `{error: {type, message}}`."
    # Instead of FastAPI's own form of a 422.
    errors = {status: {"description": "`{error: {type, message}}`"} for status in ("4XX", "5XX")}
    app = FastAPI(title="recap serve", version=__version__, description=about, responses=errors)
    app.add_middleware(_Gate, worker=worker, limits=limits)
    for kind in (RequestError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _error_response)
    options = [
        _form(option.name, option.metadata["kind"], option.metadata["help"]) for option in fields(CaptionOptions)
    ]

    async def ask(kind: str, file: UploadFile | None, values: dict[str, Any]) -> dict[str, Any]:
        name = PurePath((file and file.filename) or "upload").name
        with _on_disk(file) as (path, copy):
            if copy is not None:
                await run_in_threadpool(shutil.copyfileobj, file.file, copy)
                copy.close()
            number, future = worker.submit(kind, path, name, values)
            try:
                answer = await asyncio.wait_for(asyncio.wrap_future(future), limits.timeout_s)
            except asyncio.TimeoutError as error:
                raise RequestError(504, "timeout", f"No answer within {limits.timeout_s:g} s.") from error
            finally:
                # Nothing, if it is answered.
                worker.cancel(number)
        return answer if file is None else {"file": name, **answer}

    @app.post("/v1/audio/captions", summary="The caption of a recording; with timestamps what happens when")
    @_with_form(*options)
    async def captions(file: UploadFile, timestamps: Annotated[bool, Form()] = False, **given: Any) -> Any:
        try:
            chosen = CaptionOptions(**given)
        except ValueError as error:
            raise RequestError(422, "invalid_field", str(error)) from error
        return await ask(CAPTIONS, file, {"timestamps": timestamps, "options": tuple(chosen.to_dict().items())})

    @app.post("/v1/audio/tags", summary="The sounds in a recording, with probabilities and times")
    @_with_form()
    async def tags(
        file: UploadFile,
        top: Annotated[int, Form(ge=1)] = 10,
        threshold: Annotated[float, Form(ge=0, le=1)] = 0.1,
    ) -> Any:
        return await ask(TAGS, file, {"top": top, "threshold": threshold})

    @app.post("/v1/audio/search", summary="The recordings of the index that are nearest to a text or a recording")
    @_with_form()
    async def search(
        file: Annotated[UploadFile | None, File()] = None,
        text: Annotated[str | None, Form()] = None,
        top: Annotated[int, Form(ge=1, le=1000)] = 10,
    ) -> Any:
        if (file is None) == (not text):
            raise RequestError(422, "invalid_field", "Expected either a `text` or a `file` to search for.")
        return await ask(SEARCH, file, {"text": text, "top": top})

    @app.get("/v1/models", summary="The model")
    async def models() -> Any:
        data = [{"id": model, "object": "model", "owned_by": "recap_hf", **worker.facts}]
        return {"object": "list", "data": data}

    @app.get("/health", summary="Whether the model is there, and the number of requests that wait")
    async def health() -> Any:
        state = {"status": "ok" if worker.ready else "starting", "waiting": worker.waiting}
        return JSONResponse(state, 200 if worker.ready else 503)

    return app


def _form(name: str, kind: type, text: str) -> inspect.Parameter:
    annotation = Annotated[kind | None, Form(description=text, le=_LARGEST.get(name))]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_form(*further: inspect.Parameter) -> Callable[[Any], Any]:
    """Adds fields to the form of a route, and refuses fields that it does not have."""

    def wrap(route: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        own = [one for one in inspect.signature(route).parameters.values() if one.kind is not one.VAR_KEYWORD]
        own = [one.replace(kind=one.KEYWORD_ONLY) for one in own]
        known = {one.name for one in (*own, *further)}

        async def checked(*, request: Request, **values: Any) -> Any:
            unknown = sorted(set(await request.form()) - known)
            if unknown:
                message = f"Unknown fields: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
                raise RequestError(422, "invalid_field", message)
            return await route(**values)

        first = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
        checked.__signature__ = inspect.Signature([first, *own, *further])
        checked.__name__ = route.__name__
        return checked

    return wrap


@contextmanager
def _on_disk(file: UploadFile | None) -> Iterator[tuple[str | None, Any]]:
    """A temporary file for an upload, which the worker reads."""
    if file is None:
        yield None, None
        return
    with tempfile.NamedTemporaryFile(prefix="recap-serve-", delete=False) as copy:
        try:
            yield copy.name, copy
        finally:
            os.unlink(copy.name)


async def _error_response(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestError):
        status, kind, message = error.status, error.kind, error.message
    elif isinstance(error, RequestValidationError):
        places = (f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        status, kind, message = 422, "invalid_field", "; ".join(places)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
        kind = _STATUS_TYPES.get(status, "error")
    else:
        status, kind, message = 500, "internal_error", type(error).__name__
    return _json_error(status, kind, message)


def _json_error(status: int, kind: str, message: str, retry_after: int | None = None) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after or 5)
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)


class _Gate:
    """Refuses a request before its body is read: without the token, in a full queue, too large; and one whose body is
    larger than announced or does not end."""

    def __init__(self, app: Any, worker: WorkerProcess, limits: Limits) -> None:
        self.app, self.worker, self.limits = app, worker, limits
        self.inside = 0

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        audio = scope["path"].startswith(_AUDIO)
        self.inside += audio
        try:
            await self.app(scope, self._limited(receive), send)
        finally:
            self.inside -= audio

    def _refusal(self, scope: Mapping[str, Any]) -> JSONResponse | None:
        headers, limits = dict(scope["headers"]), self.limits
        given = headers.get(b"authorization", b"")
        if limits.token is not None and not hmac.compare_digest(given, f"Bearer {limits.token}".encode()):
            return _json_error(401, "unauthorized", "Expected the header `Authorization: Bearer TOKEN`.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.max_bytes + _FIELDS_BYTES:
            return _json_error(413, "upload_too_large", f"An upload has at most {limits.max_bytes:,} bytes.")
        if scope["path"].startswith(_AUDIO):
            if not self.worker.ready:
                return _json_error(503, "worker_lost", "The model is being loaded: try again.")
            if self.inside >= limits.queue:
                wait = max(1, round(self.inside * self.worker.seconds_per_answer))
                return _json_error(429, "queue_full", f"{self.inside} requests wait: try again in {wait} s.", wait)
        return None

    def _limited(self, receive: Any) -> Any:
        left, latest = self.limits.max_bytes + _FIELDS_BYTES, time.monotonic() + self.limits.timeout_s
        ended = False

        async def limited() -> Any:
            nonlocal left, ended
            if ended:
                # What may come now is that the client goes.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, latest - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"The upload took longer than {self.limits.timeout_s:g} s.") from error
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"An upload has at most {self.limits.max_bytes:,} bytes.")
            ended = not message.get("more_body", False)
            return message

        return limited
