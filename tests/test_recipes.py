"""The caption grammar of recap-tiny: names what it must and nothing else, and never says what is not in the scene."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.naming import NamingRules
from recipes.recap_tiny.grammar21 import Caption, Part, Scene, answer, compatible, contradict, invented_sound, render
from recipes.recap_tiny.lexicon21 import COUNTABLE, HEARD, SPECIAL, other_sounds, phrases, vocabulary_sounds


@pytest.fixture(scope="module")
def keywords(shared_dir):
    return NamingRules.read(shared_dir / "data" / "keywords.json")


@pytest.mark.parametrize("event", sorted(HEARD))
def test_phrases_name_their_event_and_no_other(event, keywords):
    for rules in (keywords, NamingRules.ours()):
        for phrase in (*HEARD[event], *COUNTABLE.get(event, ())):
            assert rules.named(phrase) == {event}
            assert not rules.foreign_words(phrase)


def test_other_sounds_name_no_event(keywords):
    for rules in (keywords, NamingRules.ours()):
        for forms in (*other_sounds().values(), *SPECIAL.values()):
            for phrase in forms:
                assert rules.named(phrase) == set(), phrase
    assert len(other_sounds()) > 400
    assert set(COUNTABLE) <= set(HEARD)


def test_captions_of_scenes_name_exactly_their_events(keywords):
    rng = np.random.default_rng(0)
    events = tuple(HEARD)
    for _ in range(600):
        count = int(rng.integers(1, 4))
        chosen = [events[index] for index in rng.choice(len(events), size=count, replace=False)]
        relation = "sequence" if count > 1 and rng.random() < 0.5 else "overlap"
        scene = Scene(tuple(Part(key, frozenset({"far"})) for key in chosen), relation)
        text = render(scene, rng).text
        for rules in (keywords, NamingRules.ours()):
            assert rules.named(text) == set(chosen), text
            assert not rules.foreign_words(text), text


def test_attributes_and_order_are_said_only_where_they_are():
    rng = np.random.default_rng(1)
    plain = Scene((Part("dog_bark"), Part("rain")))
    words = ("distance", "far away", "background", "once", "twice", "repeatedly", "again", "then", "after", "followed")
    for _ in range(200):
        text = render(plain, rng, detail=1.0, say_order=1.0).text
        assert not any(word in text for word in words), text
    twice = Scene((Part("dog_bark", frozenset({"twice"})),))
    assert render(twice, rng, detail=1.0).text == "a dog barking twice"
    # A count belongs to a burst: a sound that has none leaves it unsaid, and does not claim it.
    rain = render(Scene((Part("rain", frozenset({"twice"})),)), rng, detail=1.0)
    assert "twice" not in rain.text and rain.attributes == frozenset()


def test_order_is_worded_in_the_order_of_onset():
    rng = np.random.default_rng(2)
    scene = Scene((Part("dog_bark"), Part("rain")), "sequence")
    forms = set()
    for _ in range(200):
        text = render(scene, rng, say_order=1.0).text
        dog = min(text.find(word) for word in ("dog",) if word in text)
        wet = min(text.find(word) for word in ("rain",) if word in text)
        assert (dog > wet) == (" after " in text), text
        forms |= {word for word in ("after", ", then", "and then", "followed by") if word in text}
    assert forms == {"after", ", then", "and then", "followed by"}


def test_compatible_by_hand():
    scene = Scene((Part("rain", frozenset({"far"})), Part("cello")), "sequence")
    keys = frozenset({"rain", "cello"})
    assert compatible(Caption("", keys), scene)
    assert compatible(Caption("", keys, ("rain", "cello"), frozenset({("rain", "far")})), scene)
    assert not compatible(Caption("", keys, ("cello", "rain")), scene)
    assert not compatible(Caption("", frozenset({"rain"})), scene)
    assert not compatible(Caption("", keys, None, frozenset({("cello", "far")})), scene)


def test_a_contradiction_is_never_true_when_everything_is_said():
    rng = np.random.default_rng(3)
    for scene in (
        Scene((Part("rain"),)),
        Scene((Part("rain"), Part("cello"))),
        Scene((Part("rain"), Part("cello")), "sequence"),
        Scene((Part("rain"), Part("cello"), Part("flute")), "sequence"),
    ):
        for _ in range(200):
            assert not compatible(render(contradict(scene, rng, tuple(HEARD)), rng, 1.0, 1.0), scene)


def test_an_answer_uses_the_words_of_its_prompt():
    dog, rain = Part("dog_bark"), Part("rain")
    captions = ["steady rainfall and a violin", "a barking dog", "rain, then a dog barking"]
    # Overlapping sounds come in the order of the prompt, and each in the words that it has there first.
    assert answer(Scene((dog, rain)), captions) == "steady rainfall and a barking dog"
    assert answer(Scene((dog, rain), "sequence"), captions) == "a barking dog and then steady rainfall"
    assert answer(Scene((rain,)), ["Raindrops falling"]) == "raindrops falling"
    # Without a prompt the first phrase of the lexicon, in the order of the scene.
    assert answer(Scene((dog, rain)), []) == "a dog barking and rain falling"
    three = Scene((Part("cello"), dog, rain))
    assert answer(three, ["rain"]) == "rain, a cello playing and a dog barking"


def test_an_answer_says_every_attribute_and_a_count_only_of_bursts():
    far_dog = Part("dog_bark", frozenset({"far", "twice"}))
    assert answer(Scene((far_dog,)), ["a barking dog"]) == "a dog barking twice in the distance"
    assert answer(Scene((Part("rain", frozenset({"twice"})),)), ["rain"]) == "rain"
    behind = Scene((Part("rain", frozenset({"background"})), Part("cello")))
    assert answer(behind, ["rain falling and a cello"]) == "a cello and rain falling in the background"
    invented = Part("troob", phrases=("a troob flaining", "the flaining of a troob"))
    assert answer(Scene((invented,)), ["the flaining of a troob"]) == "the flaining of a troob"


def test_vocabulary_lookups():
    assert phrases("rain") == HEARD["rain"]
    assert len(vocabulary_sounds()) == len(set(vocabulary_sounds()))
    with pytest.raises(KeyError, match="no sound 'zebra'"):
        phrases("zebra")
    name = invented_sound(np.random.default_rng(0))
    assert all(name.key in phrase for phrase in name.phrases)
