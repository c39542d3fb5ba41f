"""`recap tiny sounds`: what the ear of recap-tiny knows, what only its vocabulary knows, and words it never met."""

import json

import pytest

from recap_hf.cli import main
from recap_hf.tiny.hearing import caption_knowledge, format_captions, format_sounds, words_read
from recap_hf.tiny.lexicon import HEARD, other_sounds, phrases

pytestmark = pytest.mark.filterwarnings("error")


def test_every_sound_stands_in_one_of_the_two_lists():
    heard, only_read = format_sounds().split("What only its vocabulary knows")
    for key in HEARD:
        assert phrases(key)[0] in heard
    flat = " ".join(only_read.split())
    assert all(name in flat for name in other_sounds())
    assert "an unrecognised sound" in heard and "a cat meowing" not in heard


def test_of_a_caption_it_tells_what_is_heard_what_is_read_and_what_is_new():
    captions = [
        "A dog barks while a violin is practised.",
        "a cat meowing and rain falling",
        "A flautist's encore, don't stop!",
        "a door slamming",
    ]
    results = caption_knowledge(captions)
    assert [result.heard for result in results] == [("dog_bark", "violin"), ("rain",), (), ()]
    assert [result.only_read for result in results] == [(), ("a cat meowing",), (), ("a door slamming",)]
    # "don't" is one word, and the "s" of a genitive none.
    assert [result.never_read for result in results] == [(), (), ("flautist", "encore", "don't", "stop"), ()]


def test_the_words_are_those_of_the_training_texts():
    known = words_read()
    # One each of: a phrase of the lexicon, another sound's, a joint, an attribute, a place, a manner, a clause.
    assert {"saxophone", "meowing", "followed", "distance", "harbour", "faintly", "practised"} <= known
    assert not {"flautist", "jazz", "stadium", "s"} & known


def test_the_sum_counts_captions():
    text = format_captions(caption_knowledge(["rain falling", "jazz", "a jazz flute"]))
    assert text.endswith(
        "2 of 3 captions name a sound that it hears; 2 hold a word that it never read, which it may garble."
    )
    assert "jazz\n  names no sound that it knows; words that it never read: jazz" in text


def test_command(tmp_path, capsys):
    assert main(["tiny", "sounds"]) == 0
    assert capsys.readouterr().out == format_sounds() + "\n"
    assert main(["tiny", "sounds", "--format", "json"]) == 0
    lists = json.loads(capsys.readouterr().out)
    assert list(lists["heard"]) == list(HEARD) and len(lists["only_read"]) == len(other_sounds())
    file = tmp_path / "mine.csv"
    file.write_text("caption,source\nSurf rolls in.,me\nA flautist plays.,me\n", encoding="utf-8")
    assert main(["tiny", "sounds", "--datastore", str(file), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["heard"] for row in rows] == [["sea_waves"], []]
    assert rows[1]["never_read"] == ["flautist"]
    written = tmp_path / "told.json"
    assert main(["tiny", "sounds", "--datastore", str(file), "--format", "json", "--output", str(written)]) == 0
    assert capsys.readouterr().out == "" and json.loads(written.read_text(encoding="utf-8")) == rows
    assert main(["tiny", "sounds", "--datastore", str(tmp_path / "none.txt")]) == 1
    assert "no such file of captions" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    assert main(["tiny", "sounds", "--datastore", str(tmp_path / "empty.txt")]) == 1
    assert "holds no captions" in capsys.readouterr().err
