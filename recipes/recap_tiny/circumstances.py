"""What people write of their recordings that the sound does not tell: whose it was, where, and when.

Captions of corpora describe the sound alone, so a text tower that reads only these has never read "living room" or
"grandfather", and such a word moves the embedding of a caption away from its sound. `with_circumstance` adds some to
captions of the grammar, for the CLAP alone: the captioner shall not learn to say them.
"""

from __future__ import annotations

import re
from random import Random

import numpy as np

# None of these names a sound, which a test asks the lexicon, or is a place that one expects a certain sound at.
PLACES = """
in the living room; in the bedroom; in the hallway; in the basement; in the attic; in the garage; on our balcony; on
the terrace; in the yard; behind the house; at the neighbours'; upstairs; downstairs; on the third floor; on the
ground floor; in the corner; at the window; on the table; at my desk; on the sofa; under the bed; on the shelf; at
home; at work; in the library; in the waiting room; in the lobby; at the hotel; in the museum; at the chemist's; at
the bakery; in the old town; in the village; in the suburbs; in the capital; at the corner; across the road; on the
square; on the hill; in the valley; in the south; at the campsite; abroad; near the border; at my grandmother's; at my
parents' place; at a friend's flat; in Spain; in Berlin; in London; in Japan; in the north
"""
TIMES = """
this morning; last night; yesterday; today; on Sunday; on Monday evening; at noon; at midnight; after lunch; before
breakfast; during dinner; at dawn; in winter; in spring; last summer; in October; in 2019; on our holiday; on my
birthday; while I was reading; before bedtime; as every day; for the first time; at the weekend
"""
PERSONS = """
My brother; My sister; My father; Mum; Dad; Grandpa; Grandma; My uncle; My aunt; Our neighbour; A friend; One of the
guests; A visitor; A colleague; My wife; My husband; The caretaker; Our teacher; The landlord; Anna; Peter; Maria; Tom
"""
OWNERS = "My; Our; Their; His; Her; The neighbour's; My brother's; Grandma's; This; That"
_SHARE = 0.4
_PERSON = re.compile(r"^(?:Someone|A person) ")
_ARTICLE = re.compile(r"^An? (?!few )")


def listed(text: str) -> list[str]:
    """The entries of a list above."""
    return [" ".join(entry.split()) for entry in text.split(";")]


_PLACES, _TIMES, _PERSONS, _OWNERS = (listed(text) for text in (PLACES, TIMES, PERSONS, OWNERS))


def with_circumstance(caption: str, rng: Random | np.random.Generator) -> str:
    """A caption with a place, a time or a person's name, or as it is, as `rng` draws.

    Args:
        caption: of the grammar, with a capital and without a full stop.
        rng: source of every choice.
    """

    def pick(options: list[str]) -> str:
        return options[int(rng.random() * len(options))]

    if rng.random() >= _SHARE:
        return caption
    if rng.random() < 0.5:
        caption = _PERSON.sub(lambda _: pick(_PERSONS) + " ", caption)
        caption = _ARTICLE.sub(lambda _: pick(_OWNERS) + " ", caption)
    if rng.random() < 0.7:
        caption += " " + pick(_PLACES)
    if rng.random() < 0.3:
        caption += " " + pick(_TIMES)
    return caption
