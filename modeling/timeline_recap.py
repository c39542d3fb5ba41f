"""Timelines: a recording of any length becomes segments with start, end, caption, score and retrieved captions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .audio_recap import SILENCE_CAPTION
from .audio_stream_recap import AudioStream
from .segmentation_recap import Piece, SegmentationSettings, Segmenter

# Windows that the encoder sees at once when it looks for boundaries.
_WINDOW_BATCH = 16
DEFAULT_SEGMENT_BATCH = 8
_MAX_CACHED_TEXTS = 512
_MAX_GROUPS = 256
# In the summary: at most so many kinds of sounds, each with at least this share of all sound.
_SUMMARY_GROUPS = 4
_SUMMARY_SHARE = 0.05


@dataclass(frozen=True)
class TimelineSettings(SegmentationSettings):
    """When a recording counts as changed, and what is one segment. See [`SegmentationSettings`] for the first five.

    Args:
        same_caption (`float`, *optional*, defaults to 0.9):
            Neighbours say the same if their captions are equal or the cosine of their CLAP text embeddings is at
            least this: they become one segment, with the caption of the longer one.
        merge_gap_s (`float`, *optional*, defaults to 2.0): so does what has a shorter silence between.
        min_sound_s (`float`, *optional*, defaults to 0.1): sound shorter than this counts as silence.
    """

    same_caption: float = 0.9
    merge_gap_s: float = 2.0
    min_sound_s: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.same_caption >= -1:
            raise ValueError(f"`same_caption` is a cosine, got {self.same_caption!r}.")
        for name in ("merge_gap_s", "min_sound_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0 s, got {getattr(self, name)!r}.")


def caption_timeline(
    captioner: Any,
    source: Any,
    *,
    settings: TimelineSettings | None = None,
    summary: TimelineSummary | None = None,
    batch_size: int = DEFAULT_SEGMENT_BATCH,
) -> Iterator[dict[str, Any]]:
    """Captions a recording of any length, segment by segment, in constant memory.

    Args:
        captioner ([`Captioner`]): with its options.
        source: all that [`AudioStream`] reads: a path, a URL, bytes, `{"array", "sampling_rate"}`, a waveform at the
            feature extractor's rate, or an [`AudioStream`] itself.
        settings ([`TimelineSettings`], *optional*)
        summary ([`TimelineSummary`], *optional*): is told every segment, and knows the summary at the end.
        batch_size (`int`, *optional*, defaults to 8): segments that are captioned at once.

    Yields:
        `dict`: `{"start": float, "end": float, "caption": str, "score": float, "retrieved": list[dict]}`, times in
        seconds to the millisecond, without gaps or overlaps, as soon as a segment is certain. Silence is captioned
        "silence" with score 1.0 and nothing retrieved. The segments do not depend on the size of the blocks that the
        recording is read in.

    Raises:
        As [`AudioStream`]; of a recording that cannot be read to its end, after the segments of what could be read.

    Example:
        >>> for segment in caption_timeline(Captioner.from_pretrained(), "street.flac"):
        ...     print(f"{segment['start']:.1f} {segment['end']:.1f} {segment['caption']}")
    """
    settings = settings or TimelineSettings()
    rate = captioner.processor.feature_extractor.sampling_rate
    stream = source if isinstance(source, AudioStream) else AudioStream(source, rate)
    if stream.sampling_rate != rate:
        raise ValueError(f"The stream has {stream.sampling_rate} Hz, the feature extractor {rate} Hz.")
    caption = SegmentCaptioner(captioner)
    texts = CaptionEmbeddings(captioner)
    reader = _Reader(stream)
    pieces = _pieces(captioner, reader, stream.sampling_rate, settings)
    captioned = _captioned(caption, pieces, batch_size, round(settings.min_sound_s * rate), rate)
    for segment in merge_segments(captioned, texts, settings):
        if summary is not None:
            summary.add(segment, texts.of(segment["caption"]))
        yield segment
    if reader.error is not None:
        raise reader.error


class _Reader:
    """The blocks of a stream; an error of reading ends them, and is kept until they are captioned."""

    def __init__(self, stream: AudioStream) -> None:
        self.stream = stream
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            yield from self.stream
        except (OSError, ValueError, ImportError) as error:
            self.error = error


def _pieces(
    captioner: Any, blocks: Iterable[np.ndarray], sampling_rate: int, settings: TimelineSettings
) -> Iterator[Piece]:
    def embed(windows: list[np.ndarray]) -> np.ndarray:
        batches = [windows[start : start + _WINDOW_BATCH] for start in range(0, len(windows), _WINDOW_BATCH)]
        return np.concatenate([_embed_windows(captioner, batch) for batch in batches])

    segmenter = Segmenter(embed, sampling_rate, settings)
    for block in blocks:
        yield from segmenter.push(block)
    yield from segmenter.finish()


def _embed_windows(captioner: Any, windows: list[np.ndarray]) -> np.ndarray:
    return captioner.encode(windows).audio_embeds[:, 0].cpu().numpy()


class SegmentCaptioner:
    """Captions of waveforms as dictionaries, and what a captioner returns for silence.

    Args:
        captioner ([`Captioner`])
    """

    def __init__(self, captioner: Any) -> None:
        self.captioner = captioner
        (self.silence,) = self([np.zeros(1, np.float32)])

    def __call__(self, waveforms: list[np.ndarray]) -> list[dict[str, Any]]:
        """One result a waveform."""
        return [result.to_dict() for result in self.captioner.caption(waveforms)]


def _captioned(
    caption: SegmentCaptioner, pieces: Iterable[Piece], batch_size: int, shortest: int, rate: int
) -> Iterator[dict[str, Any]]:
    """Segments of the pieces, in order, sound captioned `batch_size` pieces at a time."""
    waiting: list[dict[str, Any]] = []
    sounds: list[tuple[dict[str, Any], np.ndarray]] = []

    def flush() -> Iterator[dict[str, Any]]:
        if sounds:
            results = caption([waveform for _, waveform in sounds])
            for (segment, _), result in zip(sounds, results, strict=True):
                segment.update(result)
        yield from waiting
        waiting.clear()
        sounds.clear()

    for piece in pieces:
        segment = {"start": round(piece.start / rate, 3), "end": round(piece.end / rate, 3), **caption.silence}
        waiting.append(segment)
        if piece.waveform is not None and len(piece.waveform) >= shortest:
            sounds.append((segment, piece.waveform))
        # An hour with a click a second must not wait for eight sounds either.
        if len(sounds) == batch_size or len(waiting) >= 8 * batch_size:
            yield from flush()
    yield from flush()


def merge_segments(
    segments: Iterable[dict[str, Any]], texts: CaptionEmbeddings, settings: TimelineSettings
) -> Iterator[dict[str, Any]]:
    """Makes one segment of neighbours that say the same, also over a short silence. At most two wait."""
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
        elif short and texts.same(last["caption"], segment["caption"], settings.same_caption):
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


class CaptionEmbeddings:
    """CLAP text embeddings of captions, the last few hundred kept.

    Args:
        captioner ([`Captioner`]): its model embeds.
    """

    def __init__(self, captioner: Any) -> None:
        self.captioner = captioner
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()

    def of(self, caption: str) -> np.ndarray:
        """The embedding, L2-normalised, of shape `(dimension,)`."""
        if caption not in self._known:
            self._known[caption] = self.captioner.model.embed_captions([caption], self.captioner.processor)[0]
            if len(self._known) > _MAX_CACHED_TEXTS:
                self._known.popitem(last=False)
        return self._known[caption]

    def same(self, first: str, second: str, threshold: float) -> bool:
        """Whether two captions say the same. Nothing but silence says silence."""
        if first == second:
            return True
        if SILENCE_CAPTION in (first, second):
            return False
        return float(self.of(first) @ self.of(second)) >= threshold


class TimelineSummary:
    """One sentence about a whole recording, from its segments: what there is most of, most first.

    Captions that say the same are one kind of sound. Memory does not grow with the recording: of more than 256 kinds
    the one with the least time is forgotten.

    Args:
        same_caption (`float`, *optional*, defaults to 0.9): see [`TimelineSettings`].
    """

    def __init__(self, same_caption: float = TimelineSettings.same_caption) -> None:
        self.same_caption = same_caption
        self.duration = 0.0
        self.silence = 0.0
        self._groups: list[dict[str, Any]] = []
        self._embeddings: list[np.ndarray] = []
        self._score = 0.0

    def add(self, segment: dict[str, Any], embedding: np.ndarray) -> None:
        """Takes a segment and the text embedding of its caption."""
        length = segment["end"] - segment["start"]
        self.duration = max(self.duration, segment["end"])
        if _is_silence(segment):
            self.silence += length
            return
        self._score += length * segment["score"]
        likeness = np.stack(self._embeddings) @ embedding if self._groups else np.zeros(0)
        if likeness.max(initial=-1.0) >= self.same_caption:
            group = self._groups[int(likeness.argmax())]
            group["seconds"] += length
            group["segments"] += 1
            if length > group["longest"]:
                group.update(caption=segment["caption"], retrieved=segment["retrieved"], longest=length)
            return
        self._groups.append(
            {
                "caption": segment["caption"],
                "seconds": length,
                "segments": 1,
                "retrieved": segment["retrieved"],
                "longest": length,
            }
        )
        self._embeddings.append(embedding)
        if len(self._groups) > _MAX_GROUPS:
            least = min(range(_MAX_GROUPS), key=lambda index: self._groups[index]["seconds"])
            del self._groups[least], self._embeddings[least]

    def result(self) -> dict[str, Any]:
        """
        Returns:
            `dict`: `caption` names up to four kinds of sounds, those with at least a twentieth of all sound, most
            time first; "silence" if there is none. `score` is the mean of the segments' scores by time, `retrieved`
            what the longest segment of the first kind was prompted with, `duration` the recording's length in
            seconds, and `sounds` lists `{"caption", "seconds", "segments"}` of all kinds, silence included.
        """
        groups = sorted(self._groups, key=lambda group: -group["seconds"])
        sounding = sum(group["seconds"] for group in groups)
        chosen = [group for group in groups if group["seconds"] >= _SUMMARY_SHARE * sounding][:_SUMMARY_GROUPS]
        chosen = chosen or groups[:1]
        sounds = [{name: group[name] for name in ("caption", "seconds", "segments")} for group in groups]
        if self.silence:
            sounds.append({"caption": SILENCE_CAPTION, "seconds": self.silence, "segments": None})
        for sound in sounds:
            sound["seconds"] = round(sound["seconds"], 3)
        return {
            "caption": _enumerate([group["caption"] for group in chosen]) or SILENCE_CAPTION,
            "score": self._score / sounding if sounding else 1.0,
            "retrieved": chosen[0]["retrieved"] if chosen else [],
            "duration": round(self.duration, 3),
            "sounds": sounds,
        }


def _enumerate(captions: list[str]) -> str:
    captions = [caption.strip().rstrip(".") for caption in captions]
    return " and ".join(part for part in (", ".join(captions[:-1]), *captions[-1:]) if part)


__all__ = [
    "DEFAULT_SEGMENT_BATCH",
    "CaptionEmbeddings",
    "SegmentCaptioner",
    "TimelineSettings",
    "TimelineSummary",
    "caption_timeline",
    "merge_segments",
]
