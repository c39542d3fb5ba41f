"""What happens when a visitor does something: each handler yields pieces of the page as they become ready.

A piece is `{name: value}`: HTML for `status` and for the names in `PIECES`, and for `choices` the names of the
captions to choose from with the one that is chosen. No Gradio here: the page puts them into its components.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from . import views
from .captioner import DemoCaptioner
from .pictures import clock as _clock
from .recordings import Recording, Refused, read_waveform, take_upload
from .sessions import Session, Sessions
from .settings import DemoSettings

logger = logging.getLogger(__name__)

Update = dict[str, Any]
READY = "Ready. Record or upload a sound, or try one of the examples."
_OURS = "Something went wrong on this server. It is not your recording; please try again."
PIECES = ("caption", "recording", "timeline", "explanation", "comparison")
_EMPTY = dict.fromkeys(PIECES, "")
_STEPS = 5


def _politely(handler: Callable[..., Iterator[Update]]) -> Callable[..., Iterator[Update]]:
    """A refusal is said on the page; a fault of ours goes to the log and is said without details."""

    @wraps(handler)
    def polite(*args: Any) -> Iterator[Update]:
        try:
            yield from handler(*args)
        except Refused as refusal:
            yield {"status": views.status(str(refusal), "refused")}
        except Exception:
            logger.exception("The demo failed.")
            yield {"status": views.status(_OURS, "refused")}

    return polite


class Handlers:
    """The page's behaviour.

    Args:
        captioner ([`DemoCaptioner`]): the model with its datastores.
        settings ([`DemoSettings`]): the limits.
        examples (`dict[str, Path]`, *optional*): recordings to try, by their name on the page.
    """

    def __init__(
        self, captioner: DemoCaptioner, settings: DemoSettings, examples: dict[str, Path] | None = None
    ) -> None:
        self.captioner = captioner
        self.settings = settings
        self.examples = examples or {}
        self.sessions = Sessions(60 * settings.keep_minutes)

    # -------------------------------------------------------------- recordings

    @_politely
    def receive(self, key: str, path: str | Path, name: str) -> Iterator[Update]:
        """Takes an uploaded or recorded file, which is gone when the first piece is yielded, and describes it."""
        data = take_upload(Path(path), self.settings.max_bytes)
        yield {"status": views.status("Reading the recording …", "busy", 1, _STEPS)}
        yield from self._read(key, data, name)

    @_politely
    def example(self, key: str, name: str) -> Iterator[Update]:
        """Describes one of the examples."""
        yield {"status": views.status("Reading the recording …", "busy", 1, _STEPS)}
        yield from self._read(key, self.examples[name].read_bytes(), name)

    def _read(self, key: str, data: bytes, name: str) -> Iterator[Update]:
        session = self.sessions[key]
        session.recording, session.captions = None, {}
        yield _EMPTY
        rate = self.captioner.sampling_rate
        waveform = read_waveform(data, name, self.settings.max_seconds, rate)
        session.recording = Recording(name, waveform, rate, *self.captioner.frequency_range)
        yield {"recording": views.recording(session.recording)}
        yield from self._describe(session)

    def forget(self, key: str) -> Iterator[Update]:
        """Drops all that is remembered of a visitor."""
        self.sessions.forget(key)
        choices = self.captioner.choices
        yield {
            **_EMPTY,
            "status": views.status(f"Forgotten. {READY}"),
            "choices": (choices, choices[0]),
        }

    # ---------------------------------------------------------------- captions

    @_politely
    def choose(self, key: str, choice: str) -> Iterator[Update]:
        """Retrieves from the captions of another choice."""
        session = self.sessions[key]
        known = self._choices(session)
        if choice not in known:
            # The page was open for longer than it is remembered: the visitor's own captions are gone.
            yield {"choices": (known, known[0])}
            raise Refused("Your own captions are no longer remembered. Please use them again.")
        session.choice = choice
        yield from self._describe(session)

    @_politely
    def use_own(self, key: str, text: str) -> Iterator[Update]:
        """Embeds the visitor's own captions, one a line, and retrieves from them."""
        captions = self._lines(text)
        session = self.sessions[key]
        store = None
        for done in self.captioner.embed(captions):
            if isinstance(done, int):
                message = f"Reading your captions: {done} of {len(captions)} …"
                yield {"status": views.status(message, "busy", done, len(captions))}
            else:
                store = done
        session.captions.pop(self._own_choice(session), None)
        session.own = store
        session.choice = self._own_choice(session)
        yield {"choices": (self._choices(session), session.choice)}
        yield from self._describe(session)

    def _lines(self, text: str) -> list[str]:
        captions = [" ".join(line.split()) for line in (text or "").splitlines()]
        captions = [line for line in captions if line]
        if not captions:
            raise Refused("Please write at least one caption, one a line.")
        if len(captions) > self.settings.max_captions:
            raise Refused(
                f"These are {len(captions):,} captions; this page takes {self.settings.max_captions:,} at most."
            )
        longest = self.settings.max_caption_characters
        for number, line in enumerate(captions, start=1):
            if len(line) > longest:
                raise Refused(f"Caption {number} has {len(line):,} characters; the longest may have {longest}.")
        return captions

    def _own_choice(self, session: Session) -> str | None:
        if session.own is None:
            return None
        return f"Your own ({len(session.own):,} caption{'s' if len(session.own) > 1 else ''})"

    def _choices(self, session: Session) -> list[str]:
        own = self._own_choice(session)
        return [*self.captioner.choices, *([own] if own else [])]

    # -------------------------------------------------------------- describing

    def _describe(self, session: Session) -> Iterator[Update]:
        """Describes the recording of a session, if there is one, with the captions that it has chosen."""
        choice = session.choice or self.captioner.choices[0]
        if session.recording is None:
            yield {"status": views.status(f"Captions to look up: {choice}. Now record or upload a sound.")}
            return
        yield {
            **dict.fromkeys(("timeline", "explanation"), ""),
            "status": views.status("Listening, looking up captions, writing …", "busy", 2, _STEPS),
        }
        own = choice == self._own_choice(session)
        captioner = self.captioner.captioner_of(session.own if own else choice)
        recording = session.recording
        result = self.captioner.caption(captioner, recording)
        session.captions[choice] = result["caption"]
        yield {
            "caption": views.caption(result, choice),
            "comparison": views.comparison(session.captions, choice),
            "status": views.status("Finding out what happens when …", "busy", 3, _STEPS),
        }
        segments = []
        for segment in self.captioner.timeline(captioner, recording):
            segments.append(segment)
            message = f"Finding out what happens when: {_clock(segment['end'])} of {_clock(recording.seconds)} …"
            yield {
                "timeline": views.timeline(segments, recording.seconds),
                "status": views.status(message, "busy", 3, _STEPS),
            }
        yield {"status": views.status("Finding out why it was called that …", "busy", 4, _STEPS)}
        explanation = self.captioner.explain(captioner, recording, result)
        picture = self.captioner.picture(recording, explanation) if explanation is not None else b""
        yield {
            "explanation": views.explanation(explanation, recording, picture),
            "status": views.status(f"Done: “{recording.name}” is described.", "done"),
        }
