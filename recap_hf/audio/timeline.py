"""Timelines: a recording of any length becomes segments with start, end, caption, score and retrieved captions."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recap_hf.modeling.audio_recap import SILENCE_CAPTION
from recap_hf.modeling.captioning_recap import Captioner

from .segmentation import Piece, SegmentationSettings, Segmenter
from .stream import AudioStream

# Windows per forward pass of the encoder during segmentation.
_WINDOW_BATCH = 16
DEFAULT_SEGMENT_BATCH = 8
_MAX_CACHED_TEXTS = 512
_MAX_GROUPS = 256
# The summary names at most this number of kinds of sounds, each with at least this share of all sound.
_SUMMARY_GROUPS = 4
_SUMMARY_SHARE = 0.05


@dataclass(frozen=True)
class TimelineSettings(SegmentationSettings):
    """Settings of a timeline: those of [`SegmentationSettings`], and which segments are merged.

    Args:
        same_caption (`float`, *optional*, defaults to 0.9):
            Adjacent segments are merged if their captions are equal or the cosine of their CLAP text embeddings is at
            least this. The merged segment has the caption of the longer one.
        merge_gap_s (`float`, *optional*, defaults to 2.0): they are also merged across a silence shorter than this.
        min_sound_s (`float`, *optional*, defaults to 0.1): shorter sound counts as silence, unless the
            recording is nothing else.

    Raises:
        `ValueError`: for a value outside its range.
    """

    same_caption: float = 0.9
    merge_gap_s: float = 2.0
    min_sound_s: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.same_caption >= -1:
            raise ValueError(f"`same_caption` is a cosine and must be at least -1, got {self.same_caption!r}.")
        for name in ("merge_gap_s", "min_sound_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0 s, got {getattr(self, name)!r}.")


def caption_timeline(
    captioner: Captioner,
    source: Any,
    *,
    settings: TimelineSettings | None = None,
    summary: "TimelineSummary | None" = None,
    batch_size: int = DEFAULT_SEGMENT_BATCH,
) -> Iterator[dict[str, Any]]:
    """Captions a recording of any length, segment by segment, in constant memory.

    Args:
        captioner ([`Captioner`]): captions the segments with its options.
        source: what [`AudioStream`] takes (a path, a URL, bytes, `{"array", "sampling_rate"}`, a waveform at
            `captioner.sampling_rate`), or an [`AudioStream`].
        settings ([`TimelineSettings`], *optional*)
        summary ([`TimelineSummary`], *optional*): collects the segments; `summary.result()` is complete at the end.
        batch_size (`int`, *optional*, defaults to 8): segments that are captioned together.

    Yields:
        `dict`: `{"start": float, "end": float, "caption": str, "score": float, "retrieved": list[dict]}`, and what
        else a [`CaptionResult`] has. Times are in seconds, rounded to milliseconds; segments have no gaps and no
        overlaps, and are yielded as soon as they are final. Silence has the caption "silence", score 1.0 and nothing
        retrieved. The segments do not depend on the blocks that the recording is read in.

    Raises:
        As [`AudioStream`]. If a recording cannot be read to its end, the segments of what could be read come first.
        `ValueError`: for an [`AudioStream`] at another sampling rate than the captioner's.

    Example:
        >>> for segment in caption_timeline(Captioner.from_pretrained(), "street.flac"):
        ...     print(f"{segment['start']:.1f} {segment['end']:.1f} {segment['caption']}")
    """
    settings = settings or TimelineSettings()
    rate = captioner.sampling_rate
    stream = source if isinstance(source, AudioStream) else AudioStream(source, rate)
    if stream.sampling_rate != rate:
        raise ValueError(f"Expected a stream at the captioner's {rate} Hz, got {stream.sampling_rate} Hz.")
    error: Exception | None = None

    def blocks() -> Iterator[np.ndarray]:
        nonlocal error
        try:
            yield from stream
        except (OSError, ValueError, ImportError) as caught:
            # Raised below, after everything before it is captioned.
            error = caught

    embed = caption_embedder(captioner)
    pieces = _pieces(captioner, blocks(), settings)
    captioned = _captioned(captioner, pieces, batch_size, round(settings.min_sound_s * rate))
    for segment in merge_segments(captioned, embed, settings):
        if summary is not None:
            summary.add(segment, embed(segment["caption"]))
        yield segment
    if error is not None:
        raise error


def _pieces(captioner: Captioner, blocks: Iterable[np.ndarray], settings: TimelineSettings) -> Iterator[Piece]:
    def embed(windows: list[np.ndarray]) -> np.ndarray:
        batches = [windows[start : start + _WINDOW_BATCH] for start in range(0, len(windows), _WINDOW_BATCH)]
        return np.concatenate([captioner.encode(batch).audio_embeds[:, 0].cpu().numpy() for batch in batches])

    segmenter = Segmenter(embed, captioner.sampling_rate, settings)
    for block in blocks:
        yield from segmenter.push(block)
    yield from segmenter.finish()


def silent_segment(start: float, end: float) -> dict[str, Any]:
    """The segment of a silence from `start` to `end`, in seconds."""
    times = {"start": round(start, 3), "end": round(end, 3)}
    return {**times, "caption": SILENCE_CAPTION, "score": 1.0, "retrieved": []}


def _captioned(captioner: Captioner, pieces: Iterable[Piece], batch_size: int, shortest: int) -> Iterator[dict]:
    """A segment for each piece, in order; sound is captioned `batch_size` pieces at a time."""
    rate = captioner.sampling_rate
    waiting: list[dict[str, Any]] = []
    sounds: list[tuple[dict[str, Any], np.ndarray]] = []

    def flush() -> Iterator[dict[str, Any]]:
        if sounds:
            results = captioner.caption([waveform for _, waveform in sounds])
            for (segment, _), result in zip(sounds, results, strict=True):
                segment.update(result.to_dict())
        yield from waiting
        waiting.clear()
        sounds.clear()

    only: Piece | None = None
    for number, piece in enumerate(pieces):
        only = None if number else piece
        segment = silent_segment(piece.start / rate, piece.end / rate)
        waiting.append(segment)
        if piece.waveform is not None and len(piece.waveform) >= shortest:
            sounds.append((segment, piece.waveform))
        # The second bound is for recordings with little sound between many silences.
        if len(sounds) == batch_size or len(waiting) >= 8 * batch_size:
            yield from flush()
    if only is not None and only.waveform is not None and not sounds and waiting:
        sounds.append((waiting[0], only.waveform))
    yield from flush()


def merge_segments(
    segments: Iterable[dict[str, Any]], embed: Callable[[str], np.ndarray], settings: TimelineSettings
) -> Iterator[dict[str, Any]]:
    """Merges adjacent segments with the same meaning, also across a short silence. It holds at most two segments.

    Args:
        segments: without gaps, in order.
        embed (`Callable`): from a caption to its L2-normalised embedding of shape `(dimension,)`.
        settings ([`TimelineSettings`])
    """

    def same(first: str, second: str) -> bool:
        if first == second or SILENCE_CAPTION in (first, second):
            return first == second
        return float(embed(first) @ embed(second)) >= settings.same_caption

    last: dict[str, Any] | None = None
    # The length of the part whose caption the last segment has.
    weight = 0.0
    pause: dict[str, Any] | None = None
    for segment in segments:
        length = segment["end"] - segment["start"]
        short = pause is None or pause["end"] - pause["start"] < settings.merge_gap_s
        if last is None:
            last, weight = segment, length
        elif _is_silence(segment) and not _is_silence(last):
            pause = segment if pause is None else {**pause, "end": segment["end"]}
        elif short and same(last["caption"], segment["caption"]):
            longer = segment if length > weight else last
            last = {**longer, "start": last["start"], "end": segment["end"]}
            weight, pause = max(weight, length), None
        else:
            yield last
            if pause is not None:
                yield pause
            last, weight, pause = segment, length, None
    yield from (segment for segment in (last, pause) if segment is not None)


def _is_silence(segment: dict[str, Any]) -> bool:
    return segment["caption"] == SILENCE_CAPTION


def caption_embedder(captioner: Captioner) -> Callable[[str], np.ndarray]:
    """A function from a caption to its L2-normalised CLAP text embedding, which remembers the last 512."""

    @functools.lru_cache(maxsize=_MAX_CACHED_TEXTS)
    def embed(caption: str) -> np.ndarray:
        return captioner.model.embed_captions([caption], captioner.processor)[0]

    return embed


class TimelineSummary:
    """One caption for a whole recording, from its segments: the sounds with the most time, longest first.

    Captions with the same meaning are one kind of sound. Memory is constant: of more than 256 kinds the one with the
    least time is dropped.

    Args:
        same_caption (`float`, *optional*, defaults to 0.9): see [`TimelineSettings`].
    """

    def __init__(self, same_caption: float = TimelineSettings.same_caption) -> None:
        self.same_caption = same_caption
        self.duration = 0.0
        self.silence = 0.0
        self._groups: list[dict[str, Any]] = []
        self._embeddings: list[np.ndarray] = []
        self._score = self._sounding = 0.0

    def add(self, segment: dict[str, Any], embedding: np.ndarray) -> None:
        """Adds a segment and the text embedding of its caption."""
        length = segment["end"] - segment["start"]
        self.duration = max(self.duration, segment["end"])
        if _is_silence(segment):
            self.silence += length
            return
        self._score += length * segment["score"]
        self._sounding += length
        similarities = np.stack(self._embeddings) @ embedding if self._groups else np.zeros(0)
        if similarities.max(initial=-2.0) >= self.same_caption:
            group = self._groups[int(similarities.argmax())]
        else:
            group = {"seconds": 0.0, "segments": 0, "longest": 0.0}
            self._groups.append(group)
            self._embeddings.append(embedding)
        group["seconds"] += length
        group["segments"] += 1
        if "caption" not in group or length > group["longest"]:
            group.update(caption=segment["caption"], retrieved=segment["retrieved"], longest=length)
        if len(self._groups) > _MAX_GROUPS:
            least = min(range(_MAX_GROUPS), key=lambda index: self._groups[index]["seconds"])
            del self._groups[least], self._embeddings[least]

    def result(self) -> dict[str, Any]:
        """
        Returns:
            `dict`: `caption` joins the captions of up to four kinds of sounds, those with at least 5 % of all sound,
            most time first; "silence" if there is no sound. `score` is the mean of the segments' scores weighted by
            time, `retrieved` those of the longest segment of the first kind, `duration` the length of the recording in
            seconds, and `sounds` lists `{"caption", "seconds", "segments"}` of all kinds, silence included.
        """
        groups = sorted(self._groups, key=lambda group: -group["seconds"])
        chosen = [group for group in groups if group["seconds"] >= _SUMMARY_SHARE * self._sounding][:_SUMMARY_GROUPS]
        chosen = chosen or groups[:1]
        sounds = [{name: group[name] for name in ("caption", "seconds", "segments")} for group in groups]
        if self.silence:
            sounds.append({"caption": SILENCE_CAPTION, "seconds": self.silence, "segments": None})
        for sound in sounds:
            sound["seconds"] = round(sound["seconds"], 3)
        return {
            "caption": _enumerate([group["caption"] for group in chosen]) or SILENCE_CAPTION,
            "score": self._score / self._sounding if self._sounding else 1.0,
            "retrieved": chosen[0]["retrieved"] if chosen else [],
            "duration": round(self.duration, 3),
            "sounds": sounds,
        }


def _enumerate(captions: list[str]) -> str:
    captions = [caption.strip().rstrip(".") for caption in captions]
    return " and ".join(part for part in (", ".join(captions[:-1]), *captions[-1:]) if part)
