"""Explanations: measures against independent computations, and the way from cells back to the recording's time."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from recap_hf import Captioner, CaptionOptions
from recap_hf.explain import explain_caption
from recap_hf.explain.attribution import METHODS, Passage, attribute, token_log_probs
from recap_hf.explain.audio_grid import AudioGrid
from recap_hf.explain.explanation import caption_places, caption_tokens
from recap_hf.modeling.options_recap import PAPER_PROMPT
from recap_hf.prompts import OFFICIAL_PROMPT

CAPTION = "a dog barks twice"
WORD_PIECE = re.compile("Ġ?[a-z]+")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(48_000 * seconds)).astype(np.float32) * 0.1


@pytest.fixture
def passage(tiny_model, tiny_processor) -> Passage:
    inputs = tiny_processor(audio=[noise(10)], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        states = tiny_model.encode_audio(**inputs).last_hidden_state
    retrieved = ["rain falls on a roof", "a baby cries"]
    prompt = tiny_processor.build_prompts(retrieved=[retrieved])["decoder_input_ids"]
    target = torch.tensor([tiny_processor.encode_caption(CAPTION)])
    places = caption_tokens(tiny_processor, retrieved)
    return Passage(states, torch.cat([prompt, target], 1), prompt.shape[1], places, (1, 2, 32))


def test_places_of_captions_in_the_prompt(tiny_processor):
    captions = ["A dog barks. ", "", "rain This audio sounds like: falls"]
    for template, last in ((PAPER_PROMPT, "rain falls"), (OFFICIAL_PROMPT, "rain : falls")):
        text = template.build(captions)
        assert [text[start:end] for start, end in caption_places(template, captions)] == ["A dog barks", "", last]
    ids = tiny_processor.build_prompts(retrieved=[captions])["decoder_input_ids"][0]
    texts = [tiny_processor.tokenizer.decode(ids[place]).strip() for place in caption_tokens(tiny_processor, captions)]
    assert [text.removesuffix(",") for text in texts] == ["A dog barks", "", "rain falls"]


def test_gradient_is_what_a_change_of_the_weights_does(tiny_model, passage):
    """Finite differences: one key's weights scaled everywhere move the log-probability as `gradient` says."""
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    gate = {"scale": 1.0, "key": None, "cross": True}

    def gated(module, query, key, value, attention_mask, **kwargs):
        output, weights = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if gate["key"] is not None and module.is_cross_attention:
            change = (gate["scale"] - 1.0) * weights[..., gate["key"], None] * value[..., gate["key"], None, :]
            output = output + change.transpose(1, 2)
        return output, weights

    AttentionInterface.register("gated_for_test", gated)
    AttentionMaskInterface.register("gated_for_test", eager_mask)
    tiny_model.double()
    passage = Passage(passage.states.double(), passage.ids, passage.start, passage.captions, passage.grid)
    tokens = [2, 3]
    result = attribute(tiny_model, passage, [tokens], "gradient").audio.flatten()
    strong, weak = int(result.argmax()), int(result.argmin())
    tiny_model.decoder.config._attn_implementation = "gated_for_test"
    for key in (strong, weak):
        values = []
        for scale in (1 + 1e-4, 1 - 1e-4):
            gate.update(scale=scale, key=key)
            with torch.no_grad():
                values.append(token_log_probs(tiny_model, passage)[0, tokens].sum().item())
        slope = (values[0] - values[1]) / 2e-4
        assert result[key].item() == pytest.approx(max(slope, 0.0), rel=1e-4, abs=1e-9)


def test_hiding_is_leaving_out(tiny_model, passage):
    """A hidden place equals encoder states that lack it; a hidden caption's tokens weigh nothing."""
    tokens = [1, 2]

    def score(states):
        with torch.no_grad():
            logits = tiny_model(encoder_outputs=(states,), decoder_input_ids=passage.ids, use_cache=False).logits[
                0, passage.start - 1 : -1
            ]
        return logits.log_softmax(-1).gather(1, passage.targets[:, None])[tokens, 0].sum()

    alone = []
    for position in range(64):
        cells = [other for other in range(position - 1, position + 2) if other // 32 == position // 32 and other >= 0]
        alone.append(score(passage.states[:, cells]))
    expected = (torch.stack(alone) - torch.stack(alone).mean()).clamp(min=0)
    insertion = attribute(tiny_model, passage, [tokens], "insertion")
    torch.testing.assert_close(insertion.audio.flatten(), expected, rtol=1e-3, atol=1e-4)


def test_hidden_captions(tiny_model, passage):
    """Hidden tokens get no attention: the same as a mask over them, positions as they were."""
    first, second = passage.captions

    def score(*hidden):
        mask = torch.ones_like(passage.ids)
        for place in hidden:
            mask[:, place] = 0
        with torch.no_grad():
            logits = tiny_model(
                encoder_outputs=(passage.states,),
                decoder_input_ids=passage.ids,
                decoder_attention_mask=mask,
                decoder_position_ids=torch.arange(passage.ids.shape[1])[None],
                use_cache=False,
            ).logits[0, passage.start - 1 : -1]
        return logits.log_softmax(-1).gather(1, passage.targets[:, None])[[0, 1], 0].sum()

    insertion = attribute(tiny_model, passage, [[0, 1]], "insertion").captions[0]
    nothing = score(first, second)
    expected = torch.stack([score(second) - nothing, score(first) - nothing]).clamp(min=0)
    torch.testing.assert_close(insertion, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_explanation_of_a_given_caption(tiny_model, tiny_processor, method):
    tiny_model.set_attn_implementation("sdpa")
    explanation = explain_caption(Captioner(tiny_model, tiny_processor), noise(4), caption=CAPTION, method=method)
    assert explanation.caption == CAPTION
    assert [word.text for word in explanation.words] == CAPTION.split()
    assert tiny_model.config.decoder._attn_implementation == "sdpa"
    assert explanation.time_edges_s[-1] == explanation.duration_s == 4.0
    for word in explanation.words:
        assert word.audio_map.shape == (2, 13) and word.audio_map.min() >= 0
        assert word.audio_map.sum() == pytest.approx(1) or word.audio_map.sum() == 0
        assert word.cell_weights.shape == (1, 2, 32)
        assert word.caption_weights.shape == (len(explanation.retrieved),) == (4,)
        assert CAPTION[word.start : word.end] == word.text
    assert sum(word.log_probability for word in explanation.words) < 0
    again = json.loads(json.dumps(explanation.to_dict()))
    assert again["caption"] == CAPTION and len(again["words"][0]["audio_map"][1]) == 13


def test_generated_caption_and_long_recording(tiny_model, tiny_processor):
    clip = noise(23, seed=3)
    # A random model writes control characters; these leave it words.
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(range(300))
    arguments = {"suppress_tokens": [i for i, token in enumerate(tokens) if not WORD_PIECE.fullmatch(token or "")]}
    options = CaptionOptions(max_new_tokens=8, k=3)
    captioner = Captioner(tiny_model, tiny_processor, options=options, generate_kwargs=arguments)
    [result] = captioner.caption([clip])
    explanation = explain_caption(captioner, np.stack([clip, clip]))
    assert explanation.caption == result.caption
    assert [hit["caption"] for hit in explanation.retrieved] == [hit["caption"] for hit in result.retrieved]
    assert len(explanation.retrieved) == 3
    assert explanation.words[0].cell_weights.shape == (3, 2, 32)
    assert explanation.words[0].audio_map.shape == (2, 74)
    total = sum(word.log_probability for word in explanation.words)
    assert np.exp(total) <= 1


def test_frozen_and_training_model_and_inference_mode(tiny_model, tiny_processor):
    captioner = Captioner(tiny_model, tiny_processor)
    expected = explain_caption(captioner, noise(3), caption=CAPTION)
    tiny_model.requires_grad_(False)
    tiny_model.train()
    with torch.inference_mode():
        explanation = explain_caption(captioner, noise(3), caption=CAPTION)
    assert tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    for word, other in zip(explanation.words, expected.words, strict=True):
        np.testing.assert_allclose(word.audio_map, other.audio_map, atol=1e-5)


def test_no_captions_in_the_prompt(tiny_model, tiny_processor):
    captioner = Captioner(tiny_model, tiny_processor, options=CaptionOptions(k=0))
    for method in METHODS:
        explanation = explain_caption(captioner, noise(2), caption=CAPTION, method=method)
        assert explanation.retrieved == [] and explanation.words[0].caption_weights.shape == (0,)


def test_what_is_refused(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="gradient, insertion; got"):
        explain_caption(Captioner(tiny_model, tiny_processor), noise(1), method="magic")
    with pytest.raises(ValueError, match="empty"):
        explain_caption(Captioner(tiny_model, tiny_processor), noise(1), caption=" ")


def grid(duration: float, starts: tuple[float, ...] = (0.0,), padding: str = "repeatpad") -> AudioGrid:
    return AudioGrid(2, 32, 10.0, duration, starts, padding, (0.0, 2000.0, 14_000.0))


def test_even_weights_stay_even_at_any_length():
    for case in (grid(10), grid(3), grid(7.3), grid(4, padding="repeat"), grid(23, (0.0, 10.0, 13.0))):
        folded, _ = case.to_clip(np.ones(case.shape))
        density = folded / np.diff(case.time_edges())
        np.testing.assert_allclose(density, density[0, 0], rtol=0.02)
        assert folded.sum() == pytest.approx(1)


def test_copies_of_a_short_recording_come_together():
    """3 s stand three times in 10 s: 1 s, 4 s and 7 s are one moment, and 9.5 s is padding."""
    case = grid(3.125)
    cells = np.zeros((1, 2, 32))
    for second in (1.0, 4.125, 7.25):
        cells[0, 1, int(second / 0.3125)] = 1.0
    cells[0, 0, 31] = 1.0
    folded, outside = case.to_clip(cells)
    assert folded[1, 3] == pytest.approx(1) and outside == pytest.approx(0.25)


def test_overlapping_windows_come_together():
    case = grid(15, (0.0, 5.0))
    cells = np.zeros((2, 2, 32))
    cells[0, 0, 24] = 1.0  # 7.5 s
    cells[1, 0, 8] = 1.0  # 5 + 2.5 s: the same moment, by the other window
    folded, outside = case.to_clip(cells)
    assert folded[0, 24] == pytest.approx(1) and outside == 0


def test_grid_of_clap(tiny_model, tiny_processor):
    case = AudioGrid.of(tiny_model.config, tiny_processor.feature_extractor, 48_000 * 12)
    assert case.shape == (2, 2, 32) and case.window_starts_s == (0.0, 2.0)
    # Between mel bins 31 and 32 of 64 up to 14 kHz, by the centres that CLAP's filters have.
    filters = tiny_processor.feature_extractor.mel_filters_slaney
    centres = np.linspace(0, 24_000, 513)[filters.argmax(axis=0)]
    assert centres[31] < case.band_edges_hz[1] < centres[32]


def test_states_lie_where_the_grid_says(tiny_model, tiny_processor):
    """A change of the features in one stretch of time and one half of the mel bins moves that cell's state most."""
    inputs = tiny_processor(audio=[noise(10)], sampling_rate=48_000, return_tensors="pt")
    features = inputs["input_features"].clone()
    with torch.no_grad():
        before = tiny_model.encode_audio(input_features=features).last_hidden_state
        cell, band = 20, 1
        frames = slice(int(cell * 1001 / 32) + 6, int((cell + 1) * 1001 / 32) - 6)
        features[:, :, frames, 32 * band : 32 * band + 32] += 20.0
        after = tiny_model.encode_audio(input_features=features).last_hidden_state
    change = (after - before).norm(dim=-1).view(2, 32)
    assert int(change.argmax()) == band * 32 + cell
