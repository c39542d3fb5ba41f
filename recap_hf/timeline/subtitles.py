"""Subtitles for people who cannot hear: what is said in brackets, long enough to be read, and never over speech."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recap_hf.modeling.audio_recap import SILENCE_CAPTION

__all__ = ["Cue", "CuePlacer", "SubtitleFile", "SubtitleStyle", "merge_cues", "srt_block", "vtt_block"]

_ARTICLE = re.compile(r"^(?:an?|the|some)\s+", re.IGNORECASE)
# A file of subtitles has the words themselves.
_SPEECH = re.compile(r"\b(?:speech|speak\w*|talk\w*|voices?|conversation)\b", re.IGNORECASE)
_TIMING = re.compile(r"^\s*((?:\d+:)?\d+:\d+[.,]\d+)\s*-->\s*((?:\d+:)?\d+:\d+[.,]\d+)(.*)$")


@dataclass(frozen=True)
class SubtitleStyle:
    """How sounds are shown to readers. Times in seconds.

    Args:
        characters_per_second (`float`, *optional*, defaults to 17): the reading speed that a cue leaves time for.
        min_duration (`float`, *optional*, defaults to 1.0): no cue is shown for less.
        max_duration (`float`, *optional*, defaults to 7.0): nor for more: a sound that goes on is named at its
            beginning.
        line_length (`int`, *optional*, defaults to 42): characters in a line; there are at most two lines.
        gap (`float`, *optional*, defaults to 0.08): between two cues, so that one is seen to follow the other.
        max_delay (`float`, *optional*, defaults to 2.0): a cue that could only be shown later than this is left out.

    Raises:
        `ValueError`: for a value that is not positive, or a longest duration below the shortest.
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
    """A text on the screen. `sound_end` says how long the sound itself goes on, `needed` how long reading takes."""

    start: float
    end: float
    text: str
    sound_end: float = 0.0
    needed: float = 0.0


class CuePlacer:
    """Makes readable cues of segments, one after the other; silence gets none.

    A sound that begins before the cue before it can be read is shown with it, as a second line; where there is no
    room for that it is shown as soon as the cue before has been read, and left out beyond `max_delay`.

    Args:
        style ([`SubtitleStyle`])
    """

    def __init__(self, style: SubtitleStyle) -> None:
        self.style = style
        self.left_out = 0
        self._lines: tuple[str, ...] = ()
        self._start = self._wanted = self._sound_end = 0.0

    def add(self, segment: dict[str, Any]) -> list[Cue]:
        """Takes a segment and returns the cues whose end is certain by now, at most one."""
        if segment["caption"] == SILENCE_CAPTION:
            return []
        lines, start = self.style.lines(segment["caption"]), segment["start"]
        if not self._lines:
            self._show(lines, start, segment["end"])
            return []
        read = self._start + self.style.reading_time(self._lines)
        if start - self.style.gap >= read:
            finished = self._finish(start - self.style.gap)
            self._show(lines, start, segment["end"])
            return [finished]
        if lines == self._lines[-len(lines) :] or len(self._lines) + len(lines) <= 2:
            # Together with the cue that is still being read.
            joined = self._lines if lines == self._lines[-len(lines) :] else self._lines + lines
            self._show(joined, self._start, max(self._sound_end, segment["end"]))
            return []
        if read + self.style.gap - start <= self.style.max_delay:
            finished = self._finish(read)
            self._show(lines, read + self.style.gap, segment["end"])
            return [finished]
        self.left_out += 1
        return []

    def finish(self) -> list[Cue]:
        """The last cue, if there is one."""
        return [self._finish(float("inf"))] if self._lines else []

    def _show(self, lines: tuple[str, ...], start: float, sound_end: float) -> None:
        needed = self.style.reading_time(lines)
        self._lines, self._start, self._sound_end = lines, start, sound_end
        self._wanted = min(max(sound_end, start + needed), start + max(self.style.max_duration, needed))

    def _finish(self, latest: float) -> Cue:
        text, needed = "\n".join(self._lines), self.style.reading_time(self._lines)
        end = min(self._wanted, latest)
        return Cue(round(self._start, 3), round(end, 3), text, self._sound_end, needed)


# ------------------------------------------------------------------------ files


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}"
    return f"{clock}{point}{milliseconds % 1000:03d}"


def srt_block(number: int, cue: Cue) -> str:
    """A cue of a SubRip file."""
    return f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{cue.text.replace('-->', '->')}\n\n"


def vtt_block(cue: Cue) -> str:
    """A cue of a WebVTT file; what could be taken for markup is escaped."""
    text = html.escape(cue.text, quote=False)
    return f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{text}\n\n"


@dataclass(frozen=True)
class _Block:
    """A block of a subtitle file, verbatim; `start` is `None` for one without a timing, as a head or a note."""

    lines: tuple[str, ...]
    start: float | None = None
    end: float | None = None


class SubtitleFile:
    """A SubRip or WebVTT file: what stands in it stays as it is, to the letter.

    Args:
        text (`str`): the file's text.

    Raises:
        `ValueError`: if it has no cue.
    """

    def __init__(self, text: str) -> None:
        text = text.lstrip("\ufeff")
        self.is_vtt = text.startswith("WEBVTT")
        self.blocks = [_read_block(block) for block in re.split(r"(?:\r?\n[ \t]*){2,}", text.strip()) if block.strip()]
        if not any(block.start is not None for block in self.blocks):
            raise ValueError("There is no cue with a time in the subtitles; expected SubRip (.srt) or WebVTT (.vtt).")

    @classmethod
    def read(cls, path: str | Path) -> SubtitleFile:
        """Reads a file.

        Raises:
            `OSError`, `ValueError`: if it cannot be read, is not in UTF-8 or UTF-16, or has no cue.
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
        """The file's text with further cues in their places. SubRip cues are numbered anew."""
        waiting, parts, number = sorted(cues, key=lambda cue: cue.start), [], 0
        for block in self.blocks:
            while block.start is not None and waiting and waiting[0].start < block.start:
                number += 1
                parts.append(self._new(number, waiting.pop(0)))
            number += block.start is not None
            parts.append(self._old(number, block))
        for cue in waiting:
            number += 1
            parts.append(self._new(number, cue))
        return "".join(parts)

    def _new(self, number: int, cue: Cue) -> str:
        return vtt_block(cue) if self.is_vtt else srt_block(number, cue)

    def _old(self, number: int, block: _Block) -> str:
        lines = block.lines
        if not self.is_vtt and block.start is not None:
            first = next(index for index, line in enumerate(lines) if _TIMING.match(line))
            lines = (str(number), *lines[first:])
        return "\n".join(lines) + "\n\n"


def _read_block(text: str) -> _Block:
    lines = tuple(text.splitlines())
    for line in lines[:2]:
        found = _TIMING.match(line)
        if found:
            return _Block(lines, _seconds(found[1]), _seconds(found[2]))
    return _Block(lines)


def _seconds(text: str) -> float:
    parts = [float(part) for part in text.replace(",", ".").split(":")]
    return round(sum(part * 60**power for power, part in enumerate(reversed(parts))), 3)


def merge_cues(cues: Iterable[Cue], speech: list[tuple[float, float]], style: SubtitleStyle) -> tuple[list[Cue], int]:
    """Moves cues of sounds between the cues of speech, none of which is covered or changed.

    A cue is shown in the first pause that leaves time to read it, while its sound goes on or at most `max_delay`
    later. Sounds that are speech are left out, for the file has the words.

    Args:
        cues: from a [`CuePlacer`], in order.
        speech (`list[tuple[float, float]]`): from [`SubtitleFile.speech`].
        style ([`SubtitleStyle`])

    Returns:
        `tuple`: the cues that found a place, and how many sounds did not.
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
