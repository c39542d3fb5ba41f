"""Free wordings of scenes: what people write into a datastore of their own, where the grammar writes noun phrases.

They are read, never taught as answers: the text tower learns that "Somebody sneezes in the hall." is a sneeze, and the
language model to repeat such a sentence as it stands. So they may say what no recording tells, as people do.
"""

from __future__ import annotations

import re

import numpy as np

from .grammar import Caption, Part, Scene
from .lexicon import phrases

__all__ = ["reword"]

# Subject and verb of the events, beside what is formed from their phrases.
_CLAUSES: dict[str, tuple[str, ...]] = {
    "dog_bark": ("a dog barks", "dogs bark", "a puppy barks", "two dogs are barking"),
    "rain": ("it is raining", "rain falls", "rain patters", "rain pours down", "it rains"),
    "sea_waves": ("waves break", "waves crash", "the surf rolls in", "waves wash up", "the sea roars"),
    "baby_cry": ("a baby cries", "a baby wails", "a newborn cries", "an infant screams"),
    "clock_tick": ("a clock ticks", "an old clock ticks away", "clocks tick"),
    "person_sneeze": ("a person sneezes", "someone sneezes", "somebody sneezes", "a man sneezes", "a woman sneezes"),
    "helicopter": ("a helicopter passes", "a helicopter hovers", "a helicopter takes off", "helicopters fly by"),
    "chainsaw": ("a chainsaw cuts wood", "a chainsaw roars", "somebody uses a chainsaw", "a chainsaw starts"),
    "rooster": ("a rooster crows", "roosters crow", "a cock crows", "a rooster calls"),
    "fire_crackling": ("a fire crackles", "flames crackle", "a campfire burns", "wood burns in a fireplace"),
    "saxophone": ("somebody plays the saxophone", "a saxophone plays a tune", "a sax solo"),
    "violin": ("somebody plays the violin", "a violin plays a tune", "a violin is practised"),
    "snare_drum": ("somebody plays the snare drum", "a snare drum rolls", "a snare is hit"),
    "hi_hat": ("somebody plays the hi-hat", "a hi-hat is hit", "a drummer taps the hi-hat"),
    "flute": ("somebody plays the flute", "a flute plays a tune", "a flute is practised"),
    "double_bass": ("somebody plays the double bass", "a double bass plays a tune", "an upright bass is plucked"),
    "clarinet": ("somebody plays the clarinet", "a clarinet plays a tune", "a clarinet is practised"),
    "cello": ("somebody plays the cello", "a cello plays a tune", "a cello is practised"),
    "bass_drum": ("somebody hits the bass drum", "a bass drum thumps", "a kick drum thumps", "the kick drum is hit"),
    "acoustic_guitar": ("somebody plays the guitar", "a guitar is strummed", "a guitar plays a tune"),
    "man_speaking": ("a man speaks", "a man talks", "a man is talking", "a male voice speaks", "a man speaks a word"),
}
_MANNERS = (
    *("loudly", "softly", "quietly", "nearby", "continuously", "briefly", "faintly", "outside", "inside", "slowly"),
    *("quickly", "steadily", "suddenly", "somewhere", "clearly", "gently", "calmly", "for a while", "several times"),
    *("without a pause", "at times", "with an echo"),
)
_PLACES = tuple(
    f"{preposition} {noun}"
    for preposition, nouns in {
        "in": "a garden,the street,a kitchen,a large hall,a studio,the forest,the yard,a small room,the snow,a barn",
        "on": "a beach,a stage,a tin roof,the rocks,a farm,a table,the deck of a boat,a hill,the radio,a balcony",
        "at": "the window,night,the door,a station,the postman,the edge of a lake,dawn,a concert,home,the harbour",
        "near": "a road,the house,a river,the microphone,a village,an open window,the fence,a school",
        "above": "the city,the clouds,the trees,the fields",
        "against": "the window,the wall,the shore,the roof",
        "behind": "the house,a curtain,closed doors",
    }.items()
    for noun in nouns.split(",")
)
_NOUN_FRAMES = (
    "{}",
    "the sound of {}",
    "there is {}",
    "we hear {}",
    "you can hear {}",
    "a recording of {}",
    "{} can be heard",
    "{} is heard",
    "the noise of {}",
    "a clip of {}",
)
# "a dog barking", but not "the barking of a dog".
_PARTICIPLE = re.compile(
    r"^(?P<subject>(?:(?:an?|the|some) \w|someone|rain|sea|waves|flames).*?) (?P<verb>\w+ing)\b(?P<rest>.*)$"
)


def _clause(part: Part, rng: np.random.Generator) -> str:
    """A part as somebody might say it: a clause of its own, or its phrase in a frame."""
    own = _CLAUSES.get(part.key, ()) if part.phrases is None else ()
    if own and rng.random() < 0.5:
        return own[rng.integers(len(own))]
    choices = part.phrases or phrases(part.key)
    phrase = choices[rng.integers(len(choices))]
    match = _PARTICIPLE.match(phrase)
    if match and " of " not in match["subject"] and rng.random() < 0.4:
        subject = match["subject"]
        return f"{subject} {'are' if re.search('[^s]s$', subject) else 'is'} {match['verb']}{match['rest']}"
    return _NOUN_FRAMES[rng.integers(len(_NOUN_FRAMES))].format(phrase)


def reword(scene: Scene, rng: np.random.Generator) -> Caption:
    """Word a scene freely, mostly as a sentence; an order is said where there is one, an attribute never."""
    clauses = []
    for part in scene.parts:
        words = [_clause(part, rng)]
        if rng.random() < 0.3:
            words.append(_MANNERS[rng.integers(len(_MANNERS))])
        if rng.random() < 0.4:
            words.append(_PLACES[rng.integers(len(_PLACES))])
        clauses.append(" ".join(words))
    if scene.order is None:
        clauses = [clauses[index] for index in rng.permutation(len(clauses))]
        joints = (" and ", " while ", ", and ", " as ", " with ")
    else:
        joints = (" and then ", ", then ", " followed by ", ", after that ")
    text = joints[rng.integers(len(joints))].join(clauses)
    if rng.random() < 0.7:
        text = text[0].upper() + text[1:] + "."
    return Caption(text, scene.keys, scene.order)
