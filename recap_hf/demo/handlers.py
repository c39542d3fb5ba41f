"""Reactions of the page to its visitors, without Gradio: each handler yields parts of the page as they become ready.

A part is `{name: value}`: HTML for `status` and for the names in `PIECES`; for `choices`, the names of the datastores
and the chosen one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from recap_hf.audio.timeline import caption_timeline

from . import views
from .captioner import DemoCaptioner
from .pictures import clock
from .recordings import Recording, RefusedError, read_waveform, take_upload
from .sessions import Session, Sessions
from .settings import DemoSettings

logger = logging.getLogger(__name__)

Update = dict[str, Any]
READY = "Ready. Record or upload a sound, or try an example."
_INTERNAL = "An error occurred on this server. Your recording is not the cause. Please try again."
PIECES = ("caption", "recording", "timeline", "explanation", "comparison")
_EMPTY = dict.fromkeys(PIECES, "")
_STEPS = 5


def _reporting_errors(handler: Callable[..., Iterator[Update]]) -> Callable[..., Iterator[Update]]:
    """Shows why an input is refused. Other errors go to the log and are shown without details."""

    @wraps(handler)
    def reporting(*args: Any) -> Iterator[Update]:
        try:
            yield from handler(*args)
        except RefusedError as error:
            yield {"status": views.status(str(error), "refused")}
        except Exception:
            logger.exception("The demo failed.")
            yield {"status": views.status(_INTERNAL, "refused")}

    return reporting


def _step(message: str, number: int) -> Update:
    return {"status": views.status(message, "busy", number, _STEPS)}


class Handlers:
    """The handlers of the page. `examples` are recordings by their name on the page."""

    def __init__(
        self, captioner: DemoCaptioner, settings: DemoSettings, examples: dict[str, Path] | None = None
    ) -> None:
        self.captioner = captioner
        self.settings = settings
        self.examples = examples or {}
        self.sessions = Sessions(60 * settings.keep_minutes)

    @_reporting_errors
    def receive(self, key: str, path: str | Path, name: str) -> Iterator[Update]:
        """Describes an uploaded or recorded file, which is deleted before the first part is yielded."""
        data = take_upload(Path(path), self.settings.max_bytes)
        yield from self._read(key, data, name)

    @_reporting_errors
    def example(self, key: str, name: str) -> Iterator[Update]:
        """Describes an example."""
        yield from self._read(key, self.examples[name].read_bytes(), name)

    def _read(self, key: str, data: bytes, name: str) -> Iterator[Update]:
        session = self.sessions[key]
        session.recording, session.captions = None, {}
        yield {**_EMPTY, **_step("Reading the recording …", 1)}
        extractor = self.captioner.feature_extractor
        waveform = read_waveform(data, name, self.settings.max_seconds, extractor.sampling_rate)
        session.recording = Recording(name, waveform, extractor)
        yield {"recording": views.render("recording", clip=session.recording)}
        yield from self._describe(session)

    def forget(self, key: str) -> Iterator[Update]:
        """Deletes the session of a visitor."""
        self.sessions.forget(key)
        choices = self.captioner.choices
        yield {**_EMPTY, "status": views.status(f"Deleted. {READY}"), "choices": (choices, choices[0])}

    @_reporting_errors
    def choose(self, key: str, choice: str) -> Iterator[Update]:
        """Retrieves from another datastore."""
        session = self.sessions[key]
        known = self._choices(session)
        if choice not in known:
            # The session was deleted while the page was open.
            yield {"choices": (known, known[0])}
            raise RefusedError("Your own captions have been deleted. Please use them again.")
        session.choice = choice
        yield from self._describe(session)

    @_reporting_errors
    def use_own(self, key: str, text: str) -> Iterator[Update]:
        """Embeds the visitor's own captions, one in each line, and retrieves from them."""
        captions = self._lines(text)
        session = self.sessions[key]
        for done in self.captioner.embed(captions):
            if isinstance(done, int):
                message = f"Embedding your captions: {done} of {len(captions)} …"
                yield {"status": views.status(message, "busy", done, len(captions))}
        session.captions.pop(self._own_choice(session), None)
        # The last one is the datastore.
        session.own = done
        session.choice = self._own_choice(session)
        yield {"choices": (self._choices(session), session.choice)}
        yield from self._describe(session)

    def _lines(self, text: str) -> list[str]:
        captions = [" ".join(line.split()) for line in (text or "").splitlines() if line.strip()]
        if not captions:
            raise RefusedError("Please write at least one caption, one in each line.")
        if len(captions) > self.settings.max_captions:
            raise RefusedError(f"{len(captions):,} captions: the maximum is {self.settings.max_captions:,}.")
        longest = self.settings.max_caption_characters
        for number, line in enumerate(captions, start=1):
            if len(line) > longest:
                raise RefusedError(f"Caption {number} has {len(line):,} characters: the maximum is {longest}.")
        return captions

    def _own_choice(self, session: Session) -> str | None:
        if session.own is None:
            return None
        return f"Your own ({len(session.own):,} caption{'s' if len(session.own) > 1 else ''})"

    def _choices(self, session: Session) -> list[str]:
        own = self._own_choice(session)
        return [*self.captioner.choices, *([own] if own else [])]

    def _describe(self, session: Session) -> Iterator[Update]:
        """Describes the recording of a session, if there is one, with the chosen datastore."""
        choice = session.choice or self.captioner.choices[0]
        if session.recording is None:
            yield {"status": views.status(f"Retrieving from: {choice}. Now record or upload a sound.")}
            return
        yield {"timeline": "", "explanation": "", **_step("Retrieving captions and generating …", 2)}
        own = choice == self._own_choice(session)
        captioner = self.captioner.captioner_of(session.own if own else choice)
        recording = session.recording
        result = captioner.caption([recording.waveform])[0].to_dict()
        session.captions[choice] = result["caption"]
        yield {
            "caption": views.render("caption", result=result, choice=choice),
            "comparison": views.render("comparison", captions=session.captions, current=choice),
            **_step("Captioning the segments …", 3),
        }
        segments = []
        # In small batches: the first segments are shown early.
        for segment in caption_timeline(captioner, recording.waveform, batch_size=2):
            segments.append(segment)
            message = f"Captioning the segments: {clock(segment['end'])} of {clock(recording.seconds)} …"
            strip = views.render("timeline", segments=segments, seconds=recording.seconds)
            yield {"timeline": strip, **_step(message, 3)}
        yield _step("Explaining the caption …", 4)
        explanation, picture = self.captioner.explain(captioner, recording, result)
        yield {
            "explanation": views.explanation(explanation, recording, picture),
            "status": views.status(f"Done: “{recording.name}” is described.", "done"),
        }
