"""The datastore that recap-tiny ships: captions of the grammar, most of one event.

Supersets are the known failure of retrieval (a caption that names what is there and something more), so captions of
two and three events are held to what mixtures need.
"""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np

from .grammar import ATTRIBUTES, Part, Scene, render
from .lexicon import COUNTABLE, HEARD, SPECIAL

__all__ = ["datastore_scenes"]


def _scenes(rng: np.random.Generator, events: tuple[str, ...], triples: int) -> list[Scene]:
    scenes = [Scene((Part(key),)) for key in (*events, *SPECIAL) for _ in range(8)]
    for key in events:
        names = ATTRIBUTES if key in COUNTABLE else ("far",)
        scenes += [Scene((Part(key, frozenset({name})),)) for name in names if name != "background" for _ in range(4)]
    for first, second in combinations(events, 2):
        scenes += [Scene((Part(first), Part(second)))] * 2
        scenes.append(Scene((Part(first), Part(second, frozenset({"background"})))))
        scenes.append(Scene((Part(second), Part(first, frozenset({"background"})))))
    for first, second in permutations(events, 2):
        scenes += [Scene((Part(first), Part(second)), "sequence")] * 2
    for _ in range(triples if len(events) > 2 else 0):
        chosen = [events[index] for index in rng.choice(len(events), size=3, replace=False)]
        relation = "sequence" if rng.random() < 0.5 else "overlap"
        scenes.append(Scene(tuple(Part(key) for key in chosen), relation))
    return scenes


def datastore_scenes(
    events: tuple[str, ...] = tuple(HEARD), mixed: float = 1.0, triples: int = 200, seed: int = 0
) -> list[tuple[str, Scene]]:
    """(caption, scene) of every caption of the datastore, each text once.

    Args:
        events: Events that may be named.
        mixed: Share of the captions of two and three events that is kept.
        triples: Captions of three events, before that.
        seed: Of the wordings.
    """
    rng = np.random.default_rng([0xDA7A, seed])
    captions: dict[str, Scene] = {}
    for scene in _scenes(rng, events, triples):
        text = render(scene, rng, detail=1.0, say_order=1.0).text
        if len(scene.parts) == 1 or rng.random() < mixed:
            captions.setdefault(text, scene)
    return list(captions.items())
