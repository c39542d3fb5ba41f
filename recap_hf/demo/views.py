"""Pieces of the page as HTML. Everything is escaped by the template engine: no text of a visitor is markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from recap_hf.explain import CaptionExplanation

from . import pictures
from .recordings import Recording, duration

# Nats: an effect of less than a twentieth of a word's probability is called none.
_NOTHING = 0.05
# A caption's weight that is shown as more than 0 %.
_LEAST_WEIGHT = 0.005


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("recap_hf.demo", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clock"] = pictures.clock
    environment.filters["length_in_words"] = pictures.length_in_words
    return environment


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.html.j2").render(**values)


def status(message: str, kind: str = "idle", step: int = 0, steps: int = 0) -> str:
    """What the page is doing.

    Args:
        message: a sentence.
        kind: `"idle"`, `"busy"`, `"done"` or `"refused"`.
        step, steps: progress, where there is any.
    """
    return _render("status", message=message, kind=kind, step=step, steps=steps)


def too_large(settings: Any) -> str:
    """What is shown, by the script, of a file that is too large to be sent; hidden at first."""
    return _render("too_large", settings=settings)


def recording(clip: Recording) -> str:
    """Player, waveform and spectrogram."""
    return _render("recording", clip=clip, source=pictures.player_source(clip.waveform, clip.sampling_rate))


def caption(result: Mapping[str, Any], choice: str) -> str:
    """The caption, and the captions that were looked up for it."""
    return _render("caption", result=result, choice=choice)


def comparison(captions: Mapping[str, str], current: str) -> str:
    """What the same recording was called with each choice of captions."""
    return _render("comparison", captions=captions, current=current)


def timeline(segments: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """What happens when: a strip below the spectrogram, and a list to listen to."""
    return _render("timeline", segments=segments, seconds=seconds)


def explanation(why: CaptionExplanation | None, clip: Recording, picture: bytes = b"") -> str:
    """For each word of the caption where it was heard, and what the retrieved captions had to do with it.

    Args:
        why: what is explained, or `None`.
        clip: the recording.
        picture: all words in one PNG, to save.
    """
    if why is None:
        return ""
    words = []
    for word in why.words:
        hits = sorted(zip(word.caption_weights, why.retrieved, strict=True), key=lambda pair: -pair[0])
        # Where nothing was heard, no place was heard most.
        heard = word.audio_effect > _NOTHING and word.audio_map.max(initial=0) > 0
        place = (word.audio_map, why.time_edges_s, why.band_edges_hz)
        words.append(
            {
                "text": word.text,
                "map": pictures.spotlight(*place, clip) if heard else None,
                "time": _loudest_time(word.audio_map, why.time_edges_s) if heard else None,
                "audio": _in_words(word.audio_effect, "without the sound"),
                "captions": _in_words(word.captions_effect, "without the captions that were looked up"),
                "rests_on_captions": any(weight >= _LEAST_WEIGHT for weight, _ in hits)
                and word.captions_effect > _NOTHING,
                "hits": [(float(weight), hit["caption"]) for weight, hit in hits],
            }
        )
    # Words like "of" follow from the others: the page begins with one that says something.
    telling = [index for index, word in enumerate(why.words) if len(word.text) > 3] or range(len(words))
    chosen = max(telling, key=lambda index: why.words[index].audio_effect)
    return _render(
        "explanation",
        parts=_caption_parts(why),
        words=words,
        chosen=chosen,
        clip=clip,
        saved=pictures.png_source(picture),
    )


def _caption_parts(why: CaptionExplanation) -> list[tuple[str, int | None]]:
    """The caption cut into words, with their number, and what stands between them."""
    parts: list[tuple[str, int | None]] = []
    place = 0
    for number, word in enumerate(why.words):
        parts += [(why.caption[place : word.start], None), (why.caption[word.start : word.end], number)]
        place = word.end
    return [*parts, (why.caption[place:], None)]


def _loudest_time(audio_map: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """The seconds that a word rests on most."""
    place = int(audio_map.sum(axis=0).argmax())
    return float(edges[place]), float(edges[place + 1])


def _in_words(effect: float, without: str) -> str:
    """An effect in nats as a factor: how likely the word would have been."""
    if abs(effect) <= _NOTHING:
        return f"just as likely {without}"
    factor = math.exp(min(abs(effect), 20.0))
    amount = f"{factor:.1f}" if factor < 10 else f"{factor:.0f}" if factor < 1_000 else "over a thousand"
    return f"{amount} times {'less' if effect > 0 else 'more'} likely {without}"


def header(settings: Any, model_name: str) -> str:
    """Title and promises of the page."""
    return _render("header", settings=settings, model_name=model_name)


def limits_text(settings: Any) -> str:
    """The limits in words, for the label of the recorder."""
    return f"up to {duration(settings.max_seconds)}, {settings.max_megabytes:g} MB"
