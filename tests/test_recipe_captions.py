"""The recipe's lexicon and grammar: what captions name, how they are worded."""

import json
import random
import re

import numpy as np
import pytest

from recap_hf import Captioner
from recipes.recap_tiny import circumstances, datastore
from recipes.recap_tiny.grammar import Sound, describe, inflect, merge, repeated_words, word_clause
from recipes.recap_tiny.inflection import base_form, gerund, plural, with_article
from recipes.recap_tiny.lexicon import (
    HUMAN_KINDS,
    YAMNET_CLASSES,
    caption_classes,
    classes,
    find,
    implied,
    labels,
    names_person,
)
from recipes.recap_tiny.ship import ship, word_groups

FORMS = ("finite", "progressive", "participle")


def _wordings(sound):
    """All that a class or label can be called, without attributes."""
    phrases = find(sound).phrases
    return {inflect(phrase, form, many) for phrase in phrases for form in FORMS for many in (False, True)}


def _names(text):
    return {classes()[index].name for index in caption_classes(text)}


def test_classes_are_yamnets_and_more(shared_dir):
    lines = (shared_dir / "data" / "teacher" / "yamnet_class_map.csv").read_text().splitlines()[1:]
    expected = [line.split(",", 2)[2].strip('"') for line in lines]
    assert [entry.name for entry in classes()[:YAMNET_CLASSES]] == expected
    assert all(len(entry.phrases) >= 3 for entry in classes())
    assert find("Dog").index in implied(find("Bark").index) and find("Animal").index in implied(find("Bark").index)


def test_phrases_name_their_class_and_label(shared_dir):
    for entry in classes():
        for text in _wordings(entry.index):
            assert entry.words.search(text.lower()), (entry.name, text)
    for file in ("keywords.json", "keywords_esc50.json"):
        for label, expression in json.loads((shared_dir / "data" / file).read_text())["events"].items():
            for text in _wordings(label):
                assert re.search(expression, text.lower()), (label, text)


@pytest.mark.parametrize(
    ("caption", "named", "not_named"),
    [
        ("A man trains a dog", {"Dog"}, {"Train", "Rail transport"}),
        ("A train horn blares", {"Train horn", "Train"}, {"Vehicle horn, car horn, honking"}),
        ("A bird flies by", {"Bird"}, {"Fly, housefly", "Insect"}),
        ("A ship's bell and wind chimes", {"Bell", "Wind chime"}, {"Wind", "Sheep"}),
        ("A toilet is flushed", {"Toilet flush"}, {"Water", "Speech"}),
        ("A woman speaks", {"Speech", "Female speech, woman speaking"}, {"Male speech, man speaking"}),
        ("A fire truck siren wails", {"Siren", "Fire engine, fire truck (siren)"}, {"Fire", "Truck"}),
        ("A steel drum and an oboe", {"Steelpan", "Oboe"}, set()),
        ("He types on a keyboard", {"Typing", "Computer keyboard"}, {"Keyboard (musical)", "Piano"}),
    ],
)
def test_words_are_precise(caption, named, not_named):
    found = _names(caption)
    assert named <= found and not found & not_named


def test_inflection():
    assert [gerund(verb) for verb in ("drip", "rev", "whistle", "open", "die", "hum", "echo", "clip-clop")] == (
        ["dripping", "revving", "whistling", "opening", "dying", "humming", "echoing", "clip-clopping"]
    )
    verbs = {"crashes": "crash", "cries": "cry", "whistles": "whistle", "hisses": "hiss", "coos": "coo", "is": "be"}
    verbs |= {"echoes": "echo", "buzzes": "buzz", "has": "have"}
    assert {verb: base_form(verb) for verb in verbs} == verbs
    assert [plural(noun) for noun in ("small dog", "goose", "baby", "bus", "sheep")] == (
        ["small dogs", "geese", "babies", "buses", "sheep"]
    )
    assert [with_article(noun) for noun in ("owl", "ukulele", "dog", "R&B song")] == (
        ["an owl", "a ukulele", "a dog", "an R&B song"]
    )


def test_grammar_by_hand():
    assert _wordings("Toilet flush") >= {"a toilet being flushed", "a toilet is being flushed", "a toilet flushing"}
    assert _wordings("Bark") >= {"a dog barks", "dogs bark", "dogs are barking", "a dog barking", "barking"}
    twice = {word_clause(Sound("dog_bark", count=2), random.Random(seed), FORMS, 1.0) for seed in range(30)}
    assert "a dog barks twice" in twice and all(text.endswith(" twice") and "dogs" not in text for text in twice)
    far = {word_clause(Sound("wind", distance="far"), random.Random(seed), FORMS, 1.0) for seed in range(30)}
    assert all(text.endswith(("in the distance", "far away")) for text in far)
    # A toothbrush is never far away: what a class cannot have is not said.
    brush = Sound("brushing_teeth", distance="far")
    assert not any("distance" in word_clause(brush, random.Random(seed), FORMS, 1.0) for seed in range(30))


def test_order_and_throughout():
    for seed in range(60):
        text = describe(["dog_bark", "siren"], random.Random(seed), "sequence").lower()
        first, last = text.find("dog"), text.find("siren")
        first = first if first >= 0 else text.find("bark")
        said_in_reverse = " after " in text and not text.startswith("after")
        assert first >= 0 and last >= 0 and (first < last) != said_in_reverse, text
    sounds = [Sound("rain", throughout=True), Sound("Cat"), Sound("Doorbell")]
    text = describe(sounds, random.Random(3), "sequence")
    assert _names(text) >= {"Rain", "Cat", "Doorbell"}


def test_no_sound_twice():
    assert [sound.name for sound in merge([Sound("Animal"), Sound("Bark"), Sound("Dog")])] == ["Bark"]
    rng = random.Random(0)
    repeated = 0
    for _ in range(400):
        text = describe(rng.sample(sorted(labels()), 2), rng, rng.choice(["overlap", "sequence"]))
        words = [re.sub(r"(?:ing|s|es)$", "", word) for word in re.findall(r"[a-z]{4,}", text.lower())]
        common = {"someth", "someone", "while", "with", "then", "play", "person", "people", "from", "into"}
        repeated += any(words.count(word) > 1 for word in set(words) - common)
    assert repeated <= 4
    assert repeated_words("Rain falling and rain falling") == {"rain", "fall"} and not repeated_words("Rain falls")


def test_sentences_are_well_formed():
    rng = np.random.default_rng(0)
    lengths, persons, texts = [], 0, set()
    inhuman = [entry.index for entry in classes() if entry.kind not in HUMAN_KINDS]
    for _ in range(600):
        sounds = [int(index) for index in rng.choice(inhuman, size=rng.integers(1, 3), replace=False)]
        relation = "overlap" if rng.random() < 0.5 else "sequence"
        text = describe([Sound(index, distance="far", level="loud") for index in sounds], rng, relation)
        assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9',& -]+[a-z]", text), text
        assert not re.search(r"\b(\w+) \1\b|  |\ba [aeio]|\ban [^aeiouAEIOURSxh8]|,,| ,", text), text
        lengths.append(len(text.split()))
        persons += names_person(text)
        texts.add(text)
    assert persons <= 0.05 * 600
    assert 5 <= np.median(lengths) <= 14 and len(texts) >= 560


def test_datastore_covers_all_classes():
    texts = datastore.captions()
    assert 10_000 <= len(texts) <= 13_000
    assert len({datastore.normalised(text) for text in texts}) == len(texts)
    assert all(" " in text for text in texts)
    persons = 0
    for text in texts[::5]:
        human = any(classes()[index].kind in HUMAN_KINDS for index in caption_classes(text))
        persons += names_person(text) and not human
    assert persons <= 0.05 * len(texts[::5])
    special = [text for group in datastore.special_captions().values() for text in group]
    assert not {datastore.normalised(text) for text in special} & {datastore.normalised(text) for text in texts}
    joined = "\n".join(text.lower() for text in [*texts, *special])
    assert [entry.name for entry in classes() if not entry.words.search(joined)] == []


def test_datastore_is_deterministic_and_keeps_copies_out(tmp_path, capsys):
    texts = list(datastore.captions())
    long = next(text for text in texts if len(text.split()) > 5)
    short = next(text for text in texts if len(text.split()) == 4)
    rows = f"caption,abstract_captions\n\"{long.upper()}.\",\"[['{short}'], ['Something else']]\"\n"
    (tmp_path / "corpus.csv").write_text(rows)
    outs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for out in outs:
        datastore.captions.cache_clear()
        assert datastore.main([str(out), "--special", str(tmp_path / "s.txt"), "--corpora", str(tmp_path)]) == 0
    assert "left out 1 captions" in capsys.readouterr().out
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert outs[0].read_text().splitlines() == [text for text in texts if text != long]
    assert "An unrecognised sound" in (tmp_path / "s.txt").read_text().splitlines()
    with pytest.raises(FileNotFoundError, match="expected CSV files with a column caption"):
        datastore.corpus_captions(tmp_path / "empty")


def test_same_generator_same_caption():
    sounds = [Sound("rain"), Sound("dog_bark", count=2)]
    for make in (random.Random, np.random.default_rng):
        assert describe(sounds, make(7)) == describe(sounds, make(7))


def test_refusals():
    with pytest.raises(KeyError, match="the name of a class or label, got 'unicorn'"):
        describe(["unicorn"], random.Random(0))
    with pytest.raises(ValueError, match="one to four different sounds, got 0"):
        describe([], random.Random(0))
    with pytest.raises(ValueError, match='"overlap" or "sequence"'):
        describe(["rain"], random.Random(0), "after")
    with pytest.raises(ValueError, match="expected a distance of far, near, background or None"):
        Sound("rain", distance="away")


def test_forms_of_a_word_are_a_group_of_tokens(decoder_tokenizer):
    """For each token that begins a word the stem of that word; function words and rests of words are in none."""

    class Tokenizer:
        tokens = (
            "\u0120dog",
            "\u0120Dogs",
            "dog",
            "\u0120the",
            "\u0120barking",
            "\u0120bark",
            "\u0120ab",
            ",",
            "\u0120dogs",
            "\u0120hi",
            "\u0120sh",
        )

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[token] for token in ids]

    assert word_groups(Tokenizer()) == [1, 1, 0, 0, 2, 2, 0, 0, 1, 3, 0]
    groups = word_groups(decoder_tokenizer)
    assert len(groups) == len(decoder_tokenizer)


def test_circumstances_name_no_sound():
    lists = (circumstances.PLACES, circumstances.TIMES, circumstances.PERSONS, circumstances.OWNERS)
    entries = [entry for text in lists for entry in circumstances.listed(text)]
    assert len(entries) > 90
    assert [entry for entry in entries if _names(entry.lower())] == []


def test_captions_with_circumstances_name_the_same_sounds():
    rng, captions = random.Random(5), ("A dog barks", "Someone snores", "An engine idles, then a horn honks twice")
    found = [(text, circumstances.with_circumstance(text, rng)) for text in captions for _ in range(200)]
    assert all(_names(text) == _names(other) for text, other in found)
    # In two of five something is added, unless its draws add nothing (0.5 * 0.3 * 0.7 of them).
    assert 0.28 < sum(text != other for text, other in found) / len(found) < 0.45
    endings = circumstances.listed(circumstances.PLACES) + circumstances.listed(circumstances.TIMES)
    assert any(other.endswith(tuple(endings)) for _, other in found)


def test_what_ships_again_has_one_datastore(model_folder, tmp_path):
    for _ in range(2):
        ship(model_folder, tmp_path / "out", 0.35)
    written = {path.name for path in (tmp_path / "out" / "datastore").iterdir()}
    manifest = json.loads((tmp_path / "out" / "datastore" / "datastore.json").read_text(encoding="utf-8"))
    assert written == {"datastore.json", *manifest["files"]}
    found = Captioner.from_pretrained(tmp_path / "out")
    assert found.processor.retrieval_score_threshold == 0.35 and found.model.generation_config.rerank == "clap"
    assert found.datastore.captions == Captioner.from_pretrained(model_folder).datastore.captions
