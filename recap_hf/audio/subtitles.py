"""Subtitles for people who cannot hear: [dog barking], long enough to be read, and never over speech."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recap_hf.modeling.audio_recap import SILENCE_CAPTION

_ARTICLE = re.compile(r"^(?:an?|the|some)\s+", re.IGNORECASE)
# Captions about speech, whose words a subtitle file has already.
_SPEECH = re.compile(r"\b(?:speech|speak\w*|talk\w*|voices?|conversation)\b", re.IGNORECASE)
_TIMING = re.compile(r"^\s*((?:\d+:)?\d+:\d+[.,]\d+)\s*-->\s*((?:\d+:)?\d+:\d+[.,]\d+)(.*)$")


@dataclass(frozen=True)
class SubtitleStyle:
    """How cues of sounds are displayed. Times in seconds.

    Args:
        characters_per_second (`float`, *optional*, defaults to 17): reading speed.
        min_duration (`float`, *optional*, defaults to 1.0): minimum duration of a cue.
        max_duration (`float`, *optional*, defaults to 7.0): maximum duration of a cue, from the start of its sound.
        line_length (`int`, *optional*, defaults to 42): characters in a line; there are at most two lines.
        gap (`float`, *optional*, defaults to 0.08): minimum time between two cues.
        max_delay (`float`, *optional*, defaults to 2.0): a cue that would be later than this is left out.

    Raises:
        `ValueError`: for a value that is not positive, or a maximum duration below the minimum.
    """

    characters_per_second: float = 17.0
    min_duration: float = 1.0
    max_duration: float = 7.0
    line_length: int = 42
    gap: float = 0.08
    max_delay: float = 2.0

    def __post_init__(self) -> None:
        for name in ("characters_per_second", "min_duration", "line_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}.")
        if self.max_duration < self.min_duration:
            raise ValueError(
                f"`max_duration` ({self.max_duration} s) must be at least `min_duration` ({self.min_duration} s)."
            )

    def lines(self, caption: str) -> tuple[str, ...]:
        """A caption as `[dog barking]`: without article and full stop, in brackets, in at most two lines."""
        words = _ARTICLE.sub("", " ".join(caption.split()).rstrip(".")).replace("-->", "->")
        lines = textwrap.wrap(f"[{words}]", self.line_length)
        if len(lines) > 2:
            lines = [lines[0], textwrap.shorten(" ".join(lines[1:]), self.line_length - 1, placeholder=" …") + "]"]
        return tuple(lines)

    def reading_time(self, lines: tuple[str, ...]) -> float:
        """Seconds that a cue needs."""
        return max(self.min_duration, sum(map(len, lines)) / self.characters_per_second)


@dataclass(frozen=True)
class Cue:
    """A text on the screen. `sound_end` is the end of the sound in seconds, `needed` the reading time."""

    start: float
    end: float
    text: str
    sound_end: float = 0.0
    needed: float = 0.0


class CuePlacer:
    """Makes readable cues of segments, one after the other; silence has none.

    A sound that starts while the cue before is still being read becomes its second line. If there is no room for that,
    it follows when that cue has been read, and is left out beyond `max_delay`.

    Args:
        style ([`SubtitleStyle`])
    """

    def __init__(self, style: SubtitleStyle) -> None:
        self.style = style
        self.left_out = 0
        self._lines: tuple[str, ...] = ()
        self._start = self._wanted = self._sound_end = 0.0

    def add(self, segment: dict[str, Any]) -> list[Cue]:
        """Adds a segment and returns the cues that are final, at most one."""
        if segment["caption"] == SILENCE_CAPTION:
            return []
        style, lines, start = self.style, self.style.lines(segment["caption"]), segment["start"]
        read = self._start + style.reading_time(self._lines)
        if not self._lines or start - style.gap >= read:
            return self._next(lines, start, segment["end"], start - style.gap)
        repeated = lines == self._lines[-len(lines) :]
        if repeated or len(self._lines) + len(lines) <= 2:
            # Together with the cue that is still being read.
            joined = self._lines if repeated else self._lines + lines
            self._show(joined, self._start, max(self._sound_end, segment["end"]))
        elif read + style.gap - start <= style.max_delay:
            return self._next(lines, read + style.gap, segment["end"], read)
        else:
            self.left_out += 1
        return []

    def finish(self, latest: float = float("inf")) -> list[Cue]:
        """The last cue, if there is one; it ends by `latest`."""
        if not self._lines:
            return []
        text, needed = "\n".join(self._lines), self.style.reading_time(self._lines)
        end = min(self._wanted, latest)
        return [Cue(round(self._start, 3), round(end, 3), text, self._sound_end, needed)]

    def _next(self, lines: tuple[str, ...], start: float, sound_end: float, latest: float) -> list[Cue]:
        finished = self.finish(latest)
        self._show(lines, start, sound_end)
        return finished

    def _show(self, lines: tuple[str, ...], start: float, sound_end: float) -> None:
        needed = self.style.reading_time(lines)
        self._lines, self._start, self._sound_end = lines, start, sound_end
        self._wanted = min(max(sound_end, start + needed), start + max(self.style.max_duration, needed))


def clock(seconds: float, point: str = ".") -> str:
    """Seconds as `hh:mm:ss.mmm`."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


def srt_block(number: int, cue: Cue) -> str:
    """A cue of a SubRip file."""
    times = f"{clock(cue.start, ',')} --> {clock(cue.end, ',')}"
    return f"{number}\n{times}\n{cue.text.replace('-->', '->')}\n\n"


def vtt_block(cue: Cue) -> str:
    """A cue of a WebVTT file, with markup characters escaped."""
    return f"{clock(cue.start)} --> {clock(cue.end)}\n{html.escape(cue.text, quote=False)}\n\n"


@dataclass(frozen=True)
class _Block:
    """A block of a subtitle file, verbatim; `start` is `None` for one without a timing, as a head or a note."""

    lines: tuple[str, ...]
    start: float | None = None
    end: float | None = None

    @classmethod
    def parse(cls, text: str) -> _Block:
        lines = tuple(text.splitlines())
        found = next(filter(None, map(_TIMING.match, lines[:2])), None)
        return cls(lines) if found is None else cls(lines, _seconds(found[1]), _seconds(found[2]))


class SubtitleFile:
    """A SubRip or WebVTT file, whose text stays as it is.

    Args:
        text (`str`): the text of the file.

    Raises:
        `ValueError`: if it has no cue.
    """

    def __init__(self, text: str) -> None:
        text = text.lstrip("\ufeff")
        self.is_vtt = text.startswith("WEBVTT")
        self.blocks = [_Block.parse(part) for part in re.split(r"(?:\r?\n[ \t]*){2,}", text.strip()) if part.strip()]
        if not any(block.start is not None for block in self.blocks):
            raise ValueError("There is no cue with a time in the subtitles; expected SubRip (.srt) or WebVTT (.vtt).")

    @classmethod
    def read(cls, path: str | Path) -> SubtitleFile:
        """Reads a file.

        Raises:
            `OSError`, `ValueError`: if it cannot be read, is not UTF-8 or UTF-16, or has no cue.
        """
        data = Path(path).read_bytes()
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        try:
            return cls(data.decode(encoding))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: the subtitles are not in UTF-8 ({error}); convert them first.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def speech(self) -> list[tuple[float, float]]:
        """Start and end of all cues in seconds, sorted, overlapping ones joined."""
        joined: list[tuple[float, float]] = []
        for start, end in sorted((block.start, block.end) for block in self.blocks if block.start is not None):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return joined

    def with_cues(self, cues: Iterable[Cue]) -> str:
        """The text of the file with more cues in it, in order of time. SubRip cues are numbered again."""
        waiting, parts, number = sorted(cues, key=lambda cue: cue.start), [], 0
        for block in [*self.blocks, None]:
            while waiting and (block is None or (block.start is not None and waiting[0].start < block.start)):
                number += 1
                cue = waiting.pop(0)
                parts.append(vtt_block(cue) if self.is_vtt else srt_block(number, cue))
            if block is None:
                break
            lines = block.lines
            if block.start is not None:
                number += 1
                if not self.is_vtt:
                    first = next(index for index, line in enumerate(lines) if _TIMING.match(line))
                    lines = (str(number), *lines[first:])
            parts.append("\n".join(lines) + "\n\n")
        return "".join(parts)


def _seconds(text: str) -> float:
    parts = [float(part) for part in text.replace(",", ".").split(":")]
    return round(sum(part * 60**power for power, part in enumerate(reversed(parts))), 3)


def merge_cues(cues: Iterable[Cue], speech: list[tuple[float, float]], style: SubtitleStyle) -> tuple[list[Cue], int]:
    """Moves cues of sounds into the pauses between cues of speech, which are neither covered nor changed.

    A cue is displayed in the first pause that leaves time to read it, during its sound or at most `max_delay` later.
    Cues about speech are dropped: the file has its words.

    Args:
        cues: from a [`CuePlacer`], in order.
        speech (`list[tuple[float, float]]`): from [`SubtitleFile.speech`].
        style ([`SubtitleStyle`])

    Returns:
        `tuple`: the cues that were placed, and the number of sounds without a place.
    """
    placed: list[Cue] = []
    left_out = 0
    busy_until = 0.0
    ends = [-float("inf"), *(end for _, end in speech)]
    starts = [*(start for start, _ in speech), float("inf")]
    pauses = list(zip(ends, starts, strict=True))
    for cue in cues:
        if _SPEECH.search(cue.text):
            continue
        latest = max(cue.sound_end, cue.start) + style.max_delay
        for free, taken in pauses:
            start = max(cue.start, free + style.gap, busy_until)
            end = min(start + (cue.end - cue.start), taken - style.gap)
            if start <= latest and end - start >= cue.needed - 1e-6:
                placed.append(replace(cue, start=round(start, 3), end=round(end, 3)))
                busy_until = end + style.gap
                break
        else:
            left_out += 1
    return placed, left_out
