"""Parts of the page as HTML. The template engine escapes every text."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from recap_hf.explain import CaptionExplanation

from . import pictures
from .recordings import Recording

# Nats: smaller effects, less than a twentieth of a word's probability, are shown as none.
_NO_EFFECT = 0.05
# Smaller weights of captions are shown as 0 %.
_NO_WEIGHT = 0.005


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("recap_hf.demo", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clock"] = pictures.clock
    environment.filters["length_in_words"] = pictures.length_in_words
    return environment


def render(name: str, **values: Any) -> str:
    """The template `name` of this package, filled in."""
    return _environment().get_template(f"{name}.html.j2").render(**values)


def status(message: str, kind: str = "idle", step: int = 0, steps: int = 0) -> str:
    """A message, of the kind `"idle"`, `"busy"`, `"done"` or `"refused"`, and the progress if there are `steps`."""
    return render("status", message=message, kind=kind, step=step, steps=steps)


def explanation(why: CaptionExplanation | None, clip: Recording, picture: bytes = b"") -> str:
    """For each word of the caption, the regions of the sound and the retrieved captions that it depends on.

    Args:
        why: the explanation; nothing is shown without one.
        clip: the recording.
        picture: all words as PNG, to save.
    """
    if why is None:
        return ""
    words = []
    for word in why.words:
        hits = sorted(zip(word.caption_weights, why.retrieved, strict=True), key=lambda pair: -pair[0])
        by_sound = word.audio_effect > _NO_EFFECT and word.audio_map.max(initial=0) > 0
        by_captions = word.captions_effect > _NO_EFFECT and any(weight >= _NO_WEIGHT for weight, _ in hits)
        at = int(word.audio_map.sum(axis=0).argmax())
        place = (word.audio_map, why.time_edges_s, why.band_edges_hz)
        words.append(
            {
                "text": word.text,
                "map": pictures.word_map(*place, clip) if by_sound else None,
                "time": (float(why.time_edges_s[at]), float(why.time_edges_s[at + 1])) if by_sound else None,
                "audio": _factor(word.audio_effect, "without the sound"),
                "captions": _factor(word.captions_effect, "without the retrieved captions"),
                "by_captions": by_captions,
                "hits": [(float(weight), hit["caption"]) for weight, hit in hits],
            }
        )
    # Words such as "of" follow from the others: a longer one is shown first.
    long = [index for index, word in enumerate(why.words) if len(word.text) > 3] or range(len(words))
    chosen = max(long, key=lambda index: why.words[index].audio_effect)
    saved = pictures.data_uri("image/png", picture)
    return render("explanation", parts=_parts(why), words=words, chosen=chosen, clip=clip, saved=saved)


def _parts(why: CaptionExplanation) -> list[tuple[str, int | None]]:
    """The caption cut into words, with their number, and the text between them."""
    parts: list[tuple[str, int | None]] = []
    place = 0
    for number, word in enumerate(why.words):
        parts += [(why.caption[place : word.start], None), (why.caption[word.start : word.end], number)]
        place = word.end
    return [*parts, (why.caption[place:], None)]


def _factor(effect: float, without: str) -> str:
    """An effect in nats as a factor of a word's probability."""
    if abs(effect) <= _NO_EFFECT:
        return f"equally likely {without}"
    factor = math.exp(min(abs(effect), 20.0))
    amount = f"{factor:.1f}" if factor < 10 else f"{factor:.0f}" if factor < 1_000 else "over a thousand"
    return f"{amount} times {'less' if effect > 0 else 'more'} likely {without}"
