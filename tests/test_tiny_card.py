"""The card of recap-tiny, from an evaluation of the layout that `recap tiny evaluate` writes."""

from __future__ import annotations

import copy

import pytest
from huggingface_hub import ModelCard

from recap_hf import examples_path, load_audio
from recap_hf.hub import ModelDescription, render_model_card
from recap_hf.loading import load_pair
from recap_hf.tiny.card import tiny_card_facts
from recap_hf.tiny.lending import DATASTORES, lend

FIGURES = {"precision": 0.8, "recall": 0.7, "f1": 0.75, "exact_set": 0.6, "events_per_caption": 1.1}
INTERVAL = {name: [value - 0.05, value + 0.05] for name, value in FIGURES.items()}
RECORDINGS = [
    {"source": "ESC-10", "licence": "CC BY 3.0"},
    {"source": "ESC-10", "licence": "CC BY 3.0"},
    {"source": "FSDKaggle2018", "licence": "CC0"},
]
TRANSFER = [
    {
        "held_out": ["rain", "violin"],
        "clips": 15,
        "recall_without": 0.0,
        "recap": {"recall": 0.7, "f1": 0.6},
        "language_model": {"f1": 0.55},
        "named_elsewhere": 0.01,
        "decoys_named": 0.02,
    }
]

LENT = [
    {
        "datastore": "seven captions",
        "rain": {"caption": "a cat", "score": 0.25},
        "flute": {"caption": "a cat", "score": -0.1},
        "bass_drum": {"caption": "a train", "score": 0.5},
    }
]


@pytest.fixture
def evaluation():
    control = {name: value / 2 for name, value in FIGURES.items()}
    row = {"figures": FIGURES, "interval": INTERVAL}
    rows = {"first retrieved caption": {"figures": control, "interval": INTERVAL}, "RECAP": row}
    return {
        "fold": 5,
        "text_prompt_accuracy": {
            "not_instruments_macro": 0.9,
            "all_macro": 0.8,
            "per_event": {"dog_bark": 1.0, "violin": 0.5},
        },
        "first_caption": {"exact": 0.5, "superset": 0.25},
        "singles": {"rows": rows, "clips": 154},
        "mixtures": {
            "rows": rows,
            "clips": 300,
            "hash": "abc123",
            "overlap": {"f1": 0.4},
            "sequence": {"f1": 0.6},
            "order": {"named_both": 80, "share": 0.75},
        },
        "no_events": {"silence": {"clips": 5, "false_naming": 0.2}, "all": {"clips": 5, "false_naming": 0.2}},
        "degraded": {"-30 dB": {"f1": 0.72}},
    }


def test_the_card_has_the_controls_the_licences_and_the_limits(evaluation):
    facts = tiny_card_facts(evaluation, RECORDINGS, {"a language model": TRANSFER}, LENT)
    card = render_model_card("user/recap-tiny", ModelDescription({"decoder": "GPT-2"}, "prompt", 4), facts)
    text = str(card)
    assert "Sound events, fold 5: single sounds (test split), 154 clips:" in text
    assert "| first retrieved caption | 0.400 [0.750, 0.850] |" in text
    assert "| **this model** | 0.800 [0.750, 0.850] | 0.700 [0.650, 0.750] | 0.750 [0.700, 0.800] |" in text
    assert "mixtures of two sounds (test split), 300 clips, clip list `abc123`:" in text
    assert "| [ESC-10](https://github.com/karolpiczak/ESC-50) | 2 | – | CC BY 3.0 | all three stages |" in text
    assert "accuracy 0.90 over the eleven sounds that are no instruments, 0.80 over all 21" in text
    assert "exactly what is there in 50% of the single sounds" in text
    assert "a dog barking (1.00)" in text and "a violin playing (0.50)" in text
    assert "| silence | 5 | 20% |" in text and "| -30 dB | 0.720 |" in text
    assert "| rain, violin | 15 | 0.000 | 0.700 |" in text
    assert "With a language model:" in text
    assert "| seven captions | a cat (0.25) | a cat (-0.10) | a train (0.50) |" in text
    assert "It has heard 21 kinds of sounds" in text
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and len(data.eval_results) == 8
    assert {result.metric_value for result in data.eval_results} == {0.8, 0.7, 0.75, 0.6}


def test_a_quick_evaluation_gives_a_shorter_card(evaluation):
    for key in ("mixtures", "no_events", "degraded"):
        del evaluation[key]
    facts = tiny_card_facts(evaluation)
    text = str(render_model_card("user/recap-tiny", ModelDescription({"decoder": "GPT-2"}, "prompt", 4), facts))
    assert "mixtures of two" not in text and "Quiet, loud" not in text
    assert "What it was trained on is not recorded." in text


def test_lent_datastores_are_asked_and_given_back():
    model, processor = load_pair(None, "cpu", quiet=True)
    own = processor.datastore
    rows = lend(model, processor)
    assert processor.datastore is own
    assert [row["datastore"] for row in rows] == ["its own", *DATASTORES]
    # What is most similar is so by the text tower: computed here without a datastore.
    audio, rate = load_audio(examples_path() / "rain.flac")
    embeds = model.encode_audio(**processor(audio=[audio], sampling_rate=rate, return_tensors="pt")).audio_embeds[0, 0]
    for row, captions in zip(rows[1:], DATASTORES.values(), strict=True):
        similarity = model.embed_captions(list(captions), processor) @ embeds.detach().numpy()
        assert row["rain"]["score"] == pytest.approx(similarity.max(), abs=1e-3)
        assert row["rain"]["caption"]


def test_the_card_shows_what_the_same_commands_made_again(evaluation):
    again = copy.deepcopy(evaluation)
    del again["mixtures"]
    again["singles"]["rows"]["RECAP"]["figures"] = {**FIGURES, "f1": 0.725}
    section = tiny_card_facts(evaluation, again=again).sections[-1]
    assert section.title == "Made again from the folder of sounds"
    assert "| single sounds, event F1 | 0.750 [0.700, 0.800] | 0.725 |" in section.text
    assert "mixtures" not in section.text.split("|", 1)[1] and "order" not in section.text.split("|", 1)[1]


def test_the_card_shows_text_prompts_and_order_of_what_was_made_again(evaluation):
    again = copy.deepcopy(evaluation)
    again["text_prompt_accuracy"]["all_macro"] = 0.61
    evaluation["mixtures"]["order"] = {"named_both": 80, "right": 60, "share": 0.75}
    again["mixtures"]["order"] = {"named_both": 90, "right": 54, "share": 0.6}
    text = tiny_card_facts(evaluation, again=again).sections[-1].text
    assert f"| text prompts, all 21 | {evaluation['text_prompt_accuracy']['all_macro']:.3f} | 0.610 |" in text
    assert "| sequences that name both, order right | 60 of 80 | 54 of 90 |" in text
