"""Batches for the decoder out of a larger one for the encoder: like lengths together, the same captions."""

from __future__ import annotations

import pytest
import soundfile
import torch
from conftest import same_results, synthetic_clip

from recap_hf import AudioCaptioningPipeline
from recap_hf.captioning import caption_files
from recap_hf.modeling.batching_recap import decoding_batches
from recap_hf.modeling.outputs_recap import RecapEncoderOutput


def made_up(lengths: list[int]):
    """Prompts whose tokens are their row's number, and an encoding that says the same."""
    rows, longest = len(lengths), max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    encoding = RecapEncoderOutput(
        last_hidden_state=torch.arange(rows).view(rows, 1, 1).float(),
        attention_mask=torch.ones(rows, 1, dtype=torch.long),
        audio_embeds=torch.arange(rows).view(rows, 1, 1).float(),
    )
    ids = torch.arange(1, rows + 1)[:, None] * mask
    return encoding, {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def test_like_lengths_come_together_without_padding():
    encoding, prompts = made_up([3, 9, 4, 8, 3])
    batches = list(decoding_batches(encoding, prompts, 2))
    assert [rows for rows, _, _ in batches] == [[1, 3], [2, 0], [4]]
    assert [part["decoder_input_ids"].shape for _, _, part in batches] == [(2, 9), (2, 4), (1, 3)]
    for rows, part, part_prompts in batches:
        assert part.audio_embeds[:, 0, 0].tolist() == rows
        assert part_prompts["decoder_input_ids"][:, -1].tolist() == [row + 1 for row in rows]
        assert (part_prompts["decoder_input_ids"] > 0).equal(part_prompts["decoder_attention_mask"] > 0)


@pytest.mark.parametrize("size", [None, 5, 100])
def test_a_batch_that_fits_stays_as_it_is(size):
    encoding, prompts = made_up([3, 9, 4, 8, 3])
    ((rows, part, part_prompts),) = decoding_batches(encoding, prompts, size)
    assert rows == [0, 1, 2, 3, 4] and part is encoding
    assert torch.equal(part_prompts["decoder_input_ids"], prompts["decoder_input_ids"])


@pytest.mark.parametrize("options", [{}, {"rerank": "clap", "num_beams": 2}], ids=["plain", "rerank"])
def test_captions_do_not_depend_on_the_batches(tiny_model, tiny_processor, clips, options):
    captioner = AudioCaptioningPipeline(tiny_model, processor=tiny_processor, max_new_tokens=6, **options)
    expected = captioner(clips, batch_size=7)
    for size in (1, 3):
        assert same_results(captioner(clips, batch_size=7, decoding_batch_size=size), expected)


def test_files_are_heard_together_and_come_in_their_order(tiny_model, tiny_processor, tmp_path, monkeypatch):
    names = []
    for seed in range(11):
        names.append(str(tmp_path / f"{seed}.wav"))
        soundfile.write(names[-1], synthetic_clip(0.4 + 0.1 * seed, seed, 16_000), 16_000)
    names.insert(3, str(tmp_path / "missing.wav"))
    captioner = AudioCaptioningPipeline(tiny_model, processor=tiny_processor, max_new_tokens=4)
    expected = [captioner(name) for name in names if "missing" not in name]
    heard, encode = [], tiny_model.encode_audio
    monkeypatch.setattr(
        tiny_model, "encode_audio", lambda **inputs: (heard.append(len(inputs["input_features"])), encode(**inputs))[1]
    )
    found = list(caption_files(captioner, names, 2))
    # Four batches of two, then what is left.
    assert heard == [8, 3]
    assert [entry.name for entry in found] == names
    assert [entry.name for entry in found if entry.error] == [names[3]]
    assert same_results([entry.result for entry in found if not entry.error], expected)


def test_long_recordings_are_not_gathered(tiny_model, tiny_processor, tmp_path, monkeypatch):
    import recap_hf.captioning as captioning

    names = [str(tmp_path / f"{seed}.wav") for seed in range(4)]
    for seed, name in enumerate(names):
        soundfile.write(name, synthetic_clip(1.0, seed, 16_000), 16_000)
    monkeypatch.setattr(captioning, "_SECONDS_TOGETHER", 1.9)
    captioner = AudioCaptioningPipeline(tiny_model, processor=tiny_processor, max_new_tokens=2)
    heard, encode = [], tiny_model.encode_audio
    monkeypatch.setattr(
        tiny_model, "encode_audio", lambda **inputs: (heard.append(len(inputs["input_features"])), encode(**inputs))[1]
    )
    assert all(entry.result for entry in caption_files(captioner, names, 2))
    assert heard == [2, 2]


def test_a_pipeline_on_a_cpu_lays_its_weights_out(tiny_model, tiny_processor):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    AudioCaptioningPipeline(tiny_model, processor=tiny_processor)
    assert not tiny_model.decoder.transformer.h[0].mlp.c_fc.weight.is_contiguous()
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
