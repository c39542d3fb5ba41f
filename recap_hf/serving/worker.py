"""The process of the model: it reads recordings, captions those that wait together, and sends the answers.

A crash of a native decoder or of the model ends this process and not the server.
"""

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from recap_hf.audio.reading import read_blocks
from recap_hf.audio.timeline import TimelineSummary, caption_timeline
from recap_hf.modeling.captioning_recap import READ_ERRORS, Captioner
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.tagging import Tagger

# Batches of the decoder that are encoded together, as `recap caption` does.
_BATCHES_TOGETHER = 4
CAPTIONS, TAGS, SEARCH = "captions", "tags", "search"


class RequestError(Exception):
    """A request that is refused: HTTP status, type and message."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(status, kind, message)
        self.status, self.kind, self.message = status, kind, message


@dataclass(frozen=True)
class Models:
    """What a worker loads.

    Args:
        load (`Callable[[], Captioner]`): loads the captioner. Must be picklable.
        index (`str`, *optional*): folder with a sound index, for searches.
        batch_size (`int`, *optional*, defaults to 8): recordings that are decoded together.
        max_seconds (`float`, *optional*, defaults to 300): longest recording.
    """

    load: Callable[[], Captioner]
    index: str | None = None
    batch_size: int = 8
    max_seconds: float = 300.0


@dataclass
class Job:
    """A request.

    Args:
        number (`int`): names the answer.
        kind (`str`): `captions`, `tags` or `search`.
        path (`str`, *optional*): the recording, which the server deletes.
        name (`str`): of the recording, for messages.
        fields (`dict`): the other fields of the request.
    """

    number: int
    kind: str
    path: str | None
    name: str
    fields: dict[str, Any]
    waveform: Any = None
    warnings: list[str] = field(default_factory=list)


def work(connection: Connection, models: Models) -> None:
    """Runs a worker until the server closes the connection.

    It receives a [`Job`], or the number of one that nobody waits for any more. It sends `("ready", facts)` or
    `("failed", reason)` once, and `(number, answer)` for each job, where an answer is plain data or a
    [`RequestError`], and `None` for a job that it left out.
    """
    # Ctrl-C ends the server, which closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answers = _Answers(models)
    except (*READ_ERRORS, AttributeError) as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", answers.facts()))
    sending = threading.Lock()

    def send(number: int, answer: Any) -> None:
        with sending:
            connection.send((number, answer))

    unread: SimpleQueue[Job] = SimpleQueue()
    ready: SimpleQueue[Job] = SimpleQueue()
    unwanted: set[int] = set()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while True:
                message = connection.recv()
                unwanted.add(message) if isinstance(message, int) else unread.put(message)
        # The server is gone: nobody waits for an answer.
        os._exit(0)

    def read() -> None:
        while True:
            job = unread.get()
            try:
                if job.path is not None and job.number not in unwanted:
                    answers.read(job)
            except RequestError as error:
                send(job.number, error)
            else:
                ready.put(job)

    # libsndfile and soxr release Python's lock: one core reads, one is the model's.
    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=receive, daemon=True).start()
    while True:
        jobs = [ready.get()]
        with suppress(Empty):
            while len(jobs) < _BATCHES_TOGETHER * models.batch_size:
                jobs.append(ready.get_nowait())
        left_out = {job.number for job in jobs} & unwanted
        unwanted.difference_update(job.number for job in jobs)
        for number in left_out:
            send(number, None)
        wanted = [job for job in jobs if job.number not in left_out]
        for group in _groups(wanted):
            for job, answer in zip(group, answers.of(group), strict=True):
                send(job.number, answer)


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Captions with the same options together, every other request alone."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        together = job.kind == CAPTIONS and not job.fields["timestamps"]
        groups.setdefault(job.fields["options"] if together else job.number, []).append(job)
    return list(groups.values())


def open_index(folder: str, captioner: Any) -> Any:
    """The sound index of a folder, ready to be searched: by the captioner's CLAP, or by the one that made it."""
    from recap_hf.archive import SoundIndex

    index = SoundIndex.load(folder, encoder=captioner)
    try:
        _ = index.encoder
    except ValueError:
        index = SoundIndex.load(folder)
        _ = index.encoder
    return index


class _Answers:
    """Loads the models and answers requests with them."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.captioner = models.load()
        self.index = self.tagger = None
        self._heard = threading.local()
        # This process is the server's own: what is said of a recording is part of its answer.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = self._warned
        with suppress(ValueError):
            self.tagger = Tagger(self.captioner.model.clap, self.captioner.processor.feature_extractor)
        if models.index is not None:
            self.index = open_index(models.index, self.captioner)

    def facts(self) -> dict[str, Any]:
        """What the models can do."""
        captions = 0 if self.captioner.datastore is None else len(self.captioner.datastore)
        return {"captions_to_retrieve": captions, "tags": self.tagger is not None, "search": self.index is not None}

    def _warned(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            getattr(self._heard, "messages", []).append(str(message))

    def read(self, job: Job) -> None:
        """Reads the recording of a request. Raises [`RequestError`]: 413, 415 or 422."""
        self._heard.messages = job.warnings
        limit, samples, blocks, rate = self.models.max_seconds, 0, [], 0
        try:
            for block, rate in read_blocks(job.path):
                samples += block.shape[1]
                # Encoders pad their last packet.
                if samples > (limit + 0.1) * rate:
                    raise RequestError(413, "recording_too_long", f"{job.name}: longer than {limit:g} s.")
                blocks.append(block)
            job.waveform = self.captioner.read((np.concatenate(blocks, axis=1), rate))
        except READ_ERRORS as error:
            message = str(error).replace(job.path, job.name)
            unknown = isinstance(error, ImportError) or "not a recording that can be read" in message
            status = (415, "not_a_recording") if unknown else (422, "unreadable_recording")
            raise RequestError(*status, message) from error
        job.warnings = [message.replace(job.path, job.name) for message in job.warnings]

    def of(self, jobs: Sequence[Job]) -> list[Any]:
        """Answers to requests of one group of `_groups`."""
        try:
            found = {CAPTIONS: self._captions, TAGS: self._tags, SEARCH: self._search}[jobs[0].kind](jobs)
        except RequestError as error:
            return [error] * len(jobs)
        except Exception as error:
            # The others are answered.
            traceback.print_exc()
            return [RequestError(500, "internal_error", f"{type(error).__name__}: {error}")] * len(jobs)
        return [
            {**one, "warnings": job.warnings} if job.warnings else one for one, job in zip(found, jobs, strict=True)
        ]

    def _captions(self, jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
        try:
            captioner = self.captioner.with_options(CaptionOptions(**dict(jobs[0].fields["options"])))
        except ValueError as error:
            raise RequestError(422, "invalid_field", str(error)) from error
        if not jobs[0].fields["timestamps"]:
            results = captioner.caption([job.waveform for job in jobs], self.models.batch_size)
            return [result.to_dict() for result in results]
        summary = TimelineSummary()
        size = self.models.batch_size
        segments = list(caption_timeline(captioner, jobs[0].waveform, summary=summary, batch_size=size))
        return [{**summary.result(), "segments": segments}]

    def _tags(self, jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
        if self.tagger is None:
            raise RequestError(501, "not_supported", "The CLAP of this model has no classification head: no tags.")
        fields = jobs[0].fields
        [tags] = self.tagger.tag([jobs[0].waveform], fields["top"], fields["threshold"])
        return [{"tags": [tag.to_dict() for tag in tags]}]

    def _search(self, jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
        if self.index is None:
            raise RequestError(501, "not_supported", "The server has no index: recap serve --index FOLDER.")
        [job] = jobs
        sound = None if job.path is None else (job.waveform, self.captioner.sampling_rate)
        try:
            return [{"results": self.index.search(job.fields["text"], sound, job.fields["top"])}]
        except ValueError as error:
            raise RequestError(422, "invalid_field", str(error)) from error
