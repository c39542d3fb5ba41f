"""Subtitles: cues of SubRip and WebVTT, and readable ones for people who cannot hear, such as [dog barking]."""

import html
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from recap_hf.modeling.audio_recap import SILENCE_CAPTION

_MARKUP = re.compile(r"<([^<>]+)>|\{\\([^{}]*)\}")
_ARTICLE = re.compile(r"^(?:an?|the|some)\s+", re.IGNORECASE)
_CHARACTERS_PER_SECOND = 17.0
_LINE_LENGTH = 42
# Seconds: of a cue, between two cues, and how much later than its sound a cue may be.
_MIN_DURATION, _MAX_DURATION, _GAP, _MAX_DELAY = 1.0, 7.0, 0.08, 2.0


@dataclass(frozen=True)
class Cue:
    """A text on the screen, from `start` to `end` in seconds."""

    start: float
    end: float
    text: str


class CuePlacer:
    """Makes readable cues of segments, one after the other; silence has none.

    A cue has at most two lines of 42 characters and is displayed for 1 to 7 seconds, at 17 characters per second. A
    sound that starts while the cue before is still being read becomes its second line. If there is no room for that,
    it follows when that cue has been read, and is left out if it would be more than 2 seconds late.
    """

    def __init__(self) -> None:
        self._lines: tuple[str, ...] = ()
        self._start = self._wanted = self._sound_end = 0.0

    def add(self, segment: dict[str, Any]) -> list[Cue]:
        """Adds a segment and returns the cues that are final, at most one."""
        if segment["caption"] == SILENCE_CAPTION:
            return []
        lines, start = cue_lines(segment["caption"]), segment["start"]
        read = self._start + _reading_time(self._lines)
        if not self._lines or start - _GAP >= read:
            return self._next(lines, start, segment["end"], start - _GAP)
        repeated = lines == self._lines[-len(lines) :]
        if repeated or len(self._lines) + len(lines) <= 2:
            # Together with the cue that is still being read.
            joined = self._lines if repeated else self._lines + lines
            self._show(joined, self._start, max(self._sound_end, segment["end"]))
        elif read + _GAP - start <= _MAX_DELAY:
            return self._next(lines, read + _GAP, segment["end"], read)
        return []

    def finish(self, latest: float = float("inf")) -> list[Cue]:
        """The last cue, if there is one; it ends by `latest`."""
        if not self._lines:
            return []
        return [Cue(round(self._start, 3), round(min(self._wanted, latest), 3), "\n".join(self._lines))]

    def _next(self, lines: tuple[str, ...], start: float, sound_end: float, latest: float) -> list[Cue]:
        finished = self.finish(latest)
        self._show(lines, start, sound_end)
        return finished

    def _show(self, lines: tuple[str, ...], start: float, sound_end: float) -> None:
        needed = _reading_time(lines)
        self._lines, self._start, self._sound_end = lines, start, sound_end
        self._wanted = min(max(sound_end, start + needed), start + max(_MAX_DURATION, needed))


def cue_lines(caption: str) -> tuple[str, ...]:
    """A caption as `[dog barking]`: without article and full stop, in brackets, in at most two lines."""
    words = _ARTICLE.sub("", " ".join(caption.split()).rstrip(".")).replace("-->", "->")
    lines = textwrap.wrap(f"[{words}]", _LINE_LENGTH)
    if len(lines) > 2:
        lines = [lines[0], textwrap.shorten(" ".join(lines[1:]), _LINE_LENGTH - 1, placeholder=" …") + "]"]
    return tuple(lines)


def _reading_time(lines: tuple[str, ...]) -> float:
    return max(_MIN_DURATION, sum(map(len, lines)) / _CHARACTERS_PER_SECOND)


def clock(seconds: float, point: str = ".") -> str:
    """Seconds as `hh:mm:ss.mmm`."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


def srt_block(number: int, cue: Cue) -> str:
    """A cue of a SubRip file. It has no escapes: `<i>` or `{\\an8}` of a caption stand between other brackets."""
    times = f"{clock(cue.start, ',')} --> {clock(cue.end, ',')}"
    text = _MARKUP.sub(lambda found: f"‹{found[1] or found[2]}›", cue.text.replace("-->", "->"))
    return f"{number}\n{times}\n{text}\n\n"


def vtt_block(cue: Cue) -> str:
    """A cue of a WebVTT file, with markup characters escaped."""
    return f"{clock(cue.start)} --> {clock(cue.end)}\n{html.escape(cue.text, quote=False)}\n\n"
