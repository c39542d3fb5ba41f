"""`Captioner`: one way from recordings to captions, which changes nothing that it was given."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_CAPTIONS, same_results, synthetic_clip
from transformers import GenerationConfig

from recap_hf import (
    AudioCaptioningPipeline,
    CaptionDatastore,
    Captioner,
    CaptionOptions,
    RecapForConditionalGeneration,
    RecapProcessor,
    streaming,
)
from recap_hf.fast_generation import SharedPromptSearch
from recap_hf.modeling.captioning_recap import _decoding_batches
from recap_hf.modeling.generation_recap import RecapEncoderOutput

OTHERS = ["church bells ring", "glass breaks", "a tram brakes"]


@pytest.fixture
def captioner(tiny_model, tiny_processor):
    return Captioner(tiny_model, tiny_processor, options=CaptionOptions(max_new_tokens=6))


def as_dicts(results):
    return [result.to_dict() for result in results]


def test_the_steps_by_hand(captioner, clips):
    model, processor = captioner.model, captioner.processor
    inputs = processor(audio=clips, sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        encoding = model.encode_audio(**inputs)
        prompts = processor.build_prompts(encoding.audio_embeds)
        retrieved = prompts.pop("retrieved")
        ids = model.generate(encoder_outputs=encoding, **prompts, max_new_tokens=6)
        scores = model.score_captions(encoding, ids, prompts)
    results = captioner.caption(clips)
    assert [result.caption for result in results] == processor.batch_decode(ids)
    assert [result.score for result in results] == pytest.approx(scores, rel=1e-4)
    assert [result.retrieved for result in results] == retrieved
    start = prompts["decoder_input_ids"].shape[1]
    end = model.config.eos_token_id
    for result, tokens in zip(results, ids[:, start:].tolist(), strict=True):
        assert result.token_ids == tokens[: tokens.index(end) + 1 if end in tokens else None]
    assert "token_ids" not in results[0].to_dict()


def test_alone_and_in_batches(captioner, clips):
    expected = as_dicts(captioner.caption(clips))
    assert same_results([captioner.caption([clip])[0].to_dict() for clip in clips], expected)
    for size in (1, 3):
        assert same_results(as_dicts(captioner.caption(clips, batch_size=size)), expected)


def test_silence_is_a_result(captioner, clips):
    silent = np.zeros(48_000, np.float32)
    results = captioner.caption([silent, clips[0]])
    assert results[0].to_dict() == {"caption": "silence", "score": 1.0, "retrieved": []}
    assert same_results(results[1].to_dict(), captioner.caption(clips[:1])[0].to_dict())


def test_silent_windows_are_neither_attended_to_nor_retrieved_for(captioner, clips):
    """A sound padded with silence by whole windows is encoded as the sound alone."""
    sound = np.resize(clips[1], 480_000)
    padded = np.concatenate([sound, np.zeros(2 * 480_000, np.float32)])
    assert same_results(captioner.caption([padded])[0].to_dict(), captioner.caption([sound])[0].to_dict())


# ------------------------------------------------------------------ no hidden state


def test_nothing_of_the_callers_is_changed(tiny_model, tiny_processor, clips):
    config, generation = tiny_model.config.to_dict(), tiny_model.generation_config.to_dict()
    strides = [parameter.stride() for parameter in tiny_model.parameters()]
    settings = tiny_processor.to_dict()
    given = {"no_repeat_ngram_size": 2}
    captioner = Captioner(
        tiny_model, tiny_processor, OTHERS, CaptionOptions(k=1, num_beams=2, max_new_tokens=4), generate_kwargs=given
    )
    captioner.caption(clips[:2])
    assert given == {"no_repeat_ngram_size": 2}
    assert tiny_model.config.to_dict() == config
    assert tiny_model.generation_config.to_dict() == generation
    assert [parameter.stride() for parameter in tiny_model.parameters()] == strides
    assert tiny_processor.to_dict() == settings
    assert tiny_processor.datastore.captions == list(TINY_CAPTIONS)


def test_captioners_on_one_model_do_not_change_each_other(tiny_model, tiny_processor, clips):
    def captions(captioner):
        return {hit["caption"] for hit in captioner.caption(clips[:1])[0].retrieved}

    first = Captioner(tiny_model, tiny_processor, ["surf rolls in"])
    assert captions(first) == {"surf rolls in"}
    second = Captioner(tiny_model, tiny_processor, ["an engine idles"])
    third = Captioner(tiny_model, tiny_processor)
    assert captions(second) == {"an engine idles"}
    assert captions(first) == {"surf rolls in"}
    assert captions(third) < set(TINY_CAPTIONS)
    assert captions(third.with_options(CaptionOptions(k=0))) == set()
    assert captions(third.with_datastore(OTHERS)) == set(OTHERS)
    assert captions(third) < set(TINY_CAPTIONS)


def test_a_model_in_training_mode_captions_in_evaluation_mode(tiny_model, tiny_processor, clips):
    tiny_model.config.decoder.resid_pdrop = 0.9
    for module in tiny_model.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    captioner = Captioner(tiny_model, tiny_processor, options=CaptionOptions(max_new_tokens=6))
    expected = as_dicts(captioner.caption(clips[:2]))
    tiny_model.train()
    tiny_model.clap.eval()
    assert same_results(as_dicts(captioner.caption(clips[:2])), expected)
    assert tiny_model.training and tiny_model.decoder.transformer.h[0].training
    assert not any(module.training for module in tiny_model.clap.modules())


def test_threads_stay_as_they_are(tiny_processor, clips):
    import threading

    before = torch.get_num_threads()
    threads = [
        threading.Thread(target=tiny_processor, kwargs={"audio": clips, "sampling_rate": 48_000}) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_num_threads() == before


# ----------------------------------------------------------------------- saving


@pytest.mark.parametrize("datastore", ["own", "another", "none"])
def test_saved_and_loaded_it_captions_the_same(tiny_model, tiny_processor, clips, tmp_path, datastore):
    tiny_model.generation_config.max_new_tokens = 6
    if datastore == "none":
        tiny_processor.datastore = None
    # An older processor with a datastore was saved there.
    RecapProcessor.from_config(
        tiny_model.config,
        tiny_processor.tokenizer,
        tiny_processor.clap_tokenizer,
        datastore=CaptionDatastore.from_captions(["an older caption"], tiny_model, tiny_processor),
    ).save_pretrained(tmp_path)
    pipe = AudioCaptioningPipeline(
        model=tiny_model,
        processor=tiny_processor,
        datastore=OTHERS if datastore == "another" else None,
        retrieval_diversity=0.4,
        k=2,
    )
    expected = pipe(clips)
    assert len(expected[0]["retrieved"]) == (0 if datastore == "none" else 2)
    pipe.save_pretrained(tmp_path)
    loaded = Captioner(
        RecapForConditionalGeneration.from_pretrained(tmp_path), RecapProcessor.from_pretrained(tmp_path)
    )
    assert same_results(as_dicts(loaded.caption(clips)), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_caption_the_same(tiny_model, tiny_processor, clips, duplicate):
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, max_new_tokens=4, datastore=OTHERS)
    expected = pipe(clips[0])
    assert same_results(duplicate(pipe)(clips[0]), expected)
    processor = duplicate(tiny_processor)
    assert processor.datastore.captions == list(TINY_CAPTIONS)
    result = Captioner(tiny_model, processor, OTHERS, CaptionOptions(max_new_tokens=4)).caption(clips[:1])[0]
    assert same_results(result.to_dict(), expected)


# ---------------------------------------------------------------------- options


def test_a_penalty_on_repetition_does_not_count_the_prompt(tiny_model, tiny_processor, clips):
    """A processor of the caption's tokens alone, written out, against `repetition_penalty`."""
    from transformers import LogitsProcessor, LogitsProcessorList

    inputs = tiny_processor(audio=clips[:2], sampling_rate=48_000, return_tensors="pt")
    encoding = tiny_model.encode_audio(**inputs)
    prompts = tiny_processor.build_prompts(encoding.audio_embeds)
    start = prompts["decoder_input_ids"].shape[1]

    class Penalty(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            for row, ids in enumerate(input_ids[:, start:].tolist()):
                for token in set(ids):
                    scores[row, token] *= 3.0 if scores[row, token] < 0 else 1 / 3.0
            return scores

    settings = {"num_beams": 1, "max_new_tokens": 8}
    arguments = {"encoder_outputs": encoding, **prompts, **settings}
    expected = tiny_model.generate(**arguments, logits_processor=LogitsProcessorList([Penalty()]))
    assert torch.equal(tiny_model.generate(**arguments, repetition_penalty=3.0), expected)
    assert not torch.equal(tiny_model.generate(**arguments), expected), "the premise: the penalty changes the caption"
    tiny_model.generation_config.repetition_penalty = 3.0
    assert torch.equal(tiny_model.generate(**arguments), expected)
    assert tiny_model.generation_config.repetition_penalty == 3.0
    once = tiny_model.generate(**arguments, no_repeat_ngram_size=1, repetition_penalty=1.0)[:, start:].tolist()
    assert all(len(set(ids)) == len(ids) for ids in once)


def test_a_caption_holds_one_token_of_a_group(tiny_model, tiny_processor, clips):
    """Against a processor written out; token 0 and others without a group may come again."""
    from transformers import LogitsProcessor, LogitsProcessorList

    inputs = tiny_processor(audio=clips[:2], sampling_rate=48_000, return_tensors="pt")
    encoding = tiny_model.encode_audio(**inputs)
    prompts = tiny_processor.build_prompts(encoding.audio_embeds)
    start = prompts["decoder_input_ids"].shape[1]
    groups = [token % 30 for token in range(tiny_model.config.decoder.vocab_size)]

    class OneOfAGroup(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            for row, ids in enumerate(input_ids[:, start:].tolist()):
                said = {groups[token] for token in ids}
                for token, group in enumerate(groups):
                    if group and group in said:
                        scores[row, token] = -torch.inf
            return scores

    arguments = {"encoder_outputs": encoding, **prompts, "num_beams": 3, "max_new_tokens": 12}
    expected = tiny_model.generate(**arguments, logits_processor=LogitsProcessorList([OneOfAGroup()]))
    assert not torch.equal(tiny_model.generate(**arguments), expected), "the premise: groups change the caption"
    assert torch.equal(tiny_model.generate(**arguments, no_repeat_token_groups=groups), expected)
    tiny_model.generation_config.no_repeat_token_groups = groups
    assert torch.equal(tiny_model.generate(**arguments), expected)
    assert torch.equal(tiny_model.generate(**arguments, custom_generate=SharedPromptSearch()), expected)
    assert tiny_model.generation_config.no_repeat_token_groups == groups


def test_a_generation_config_of_the_caller_leaves_the_rest_to_the_checkpoint(tiny_model, tiny_processor, clips):
    """Whatever the caller's configuration does not set is that of the checkpoint, as in transformers."""
    groups = [token % 30 for token in range(tiny_model.config.decoder.vocab_size)]
    for settings in (
        {"rerank": "clap", "rerank_weight": 1.0, "num_beams": 4, "no_repeat_token_groups": groups},
        {"num_beams": 2, "repetition_penalty": 3.0},
        {"num_beams": 1, "no_repeat_ngram_size": 1},
    ):
        for name, value in settings.items():
            setattr(tiny_model.generation_config, name, value)
        captioner = Captioner(tiny_model, tiny_processor)
        expected = as_dicts(
            Captioner(tiny_model, tiny_processor, generate_kwargs={"max_new_tokens": 9}).caption(clips)
        )
        given = GenerationConfig(max_new_tokens=9)
        captioner.generate_kwargs = {"generation_config": given}
        assert same_results(as_dicts(captioner.caption(clips)), expected)
        assert given.num_beams is None and given.max_new_tokens == 9
        encoding = captioner.encode(clips)
        prompts = tiny_processor.build_prompts(encoding.audio_embeds)
        ids = tiny_model.generate(encoder_outputs=encoding, **prompts, generation_config=given)
        assert torch.equal(ids, tiny_model.generate(encoder_outputs=encoding, **prompts, max_new_tokens=9))
        for name in settings:
            setattr(tiny_model.generation_config, name, None)


def test_a_caption_ends_where_the_positions_do(tiny_model, tiny_processor, clips):
    positions = tiny_model.config.decoder.n_positions
    for settings in ({}, {"do_sample": True}, {"num_beams": 2}):
        options = CaptionOptions(max_new_tokens=10 * positions, **settings)
        given = {"min_new_tokens": positions, "suppress_tokens": [tiny_model.config.eos_token_id]}
        captioner = Captioner(tiny_model, tiny_processor, options=options, generate_kwargs=given)
        (result,) = captioner.caption(clips[:1])
        prompt = tiny_processor.build_prompts(retrieved=[result.retrieved])["decoder_input_ids"]
        assert prompt.shape[1] + len(result.token_ids) == positions


def test_every_end_token_ends_a_caption(tiny_model, tiny_processor, clips):
    """Two end tokens, through transformers' search: what lies behind the first of them is not counted."""
    plain = Captioner(tiny_model, tiny_processor, options=CaptionOptions(max_new_tokens=8, num_beams=1))
    other = plain.caption(clips[:1])[0].token_ids[2]
    ends = [tiny_model.config.eos_token_id, other]
    given = {"eos_token_id": ends, "num_beam_groups": 1, "repetition_penalty": 1.0001}
    captioner = Captioner(tiny_model, tiny_processor, options=plain.options, generate_kwargs=given)
    alone = [captioner.caption([clip])[0] for clip in clips]
    assert alone[0].token_ids[-1] == other and len(alone[0].token_ids) <= 3
    together = captioner.caption(clips)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.score for result in together] == pytest.approx([result.score for result in alone], rel=1e-4)


def test_several_sequences_are_returned_as_candidates(tiny_model, tiny_processor, clips):
    captioner = Captioner(tiny_model, tiny_processor, generate_kwargs={"num_return_sequences": 3, "max_new_tokens": 6})
    encoding = captioner.encode(clips[:1])
    prompts = tiny_processor.build_prompts(encoding.audio_embeds)
    ids = tiny_model.generate(
        encoder_outputs=encoding, **prompts, num_beams=3, num_return_sequences=3, max_new_tokens=6
    )
    texts = tiny_processor.batch_decode(ids)
    result = captioner.caption(clips[:1])[0]
    assert [candidate["caption"] for candidate in result.candidates] == list(dict.fromkeys(texts))
    scores = tiny_model.score_captions(encoding, ids, prompts)
    assert [candidate["score"] for candidate in result.candidates] == pytest.approx(
        [scores[texts.index(candidate["caption"])] for candidate in result.candidates], rel=1e-4
    )


def test_k_of_a_thousand_and_captions_that_do_not_fit(tiny_processor):
    long = "a dog barks " * 100
    prompts = tiny_processor.build_prompts(retrieved=[[long, "rain", *(f"wind {row}" for row in range(3_000))]])
    kept = prompts["retrieved"][0]
    assert kept[0] == "rain" and len(kept) > 5 and kept == ["rain", *(f"wind {row}" for row in range(len(kept) - 1))]
    length = prompts["decoder_input_ids"].shape[1]
    longer = tiny_processor.prompt.build([*kept, f"wind {len(kept) - 1}"])
    assert length <= tiny_processor.max_prompt_tokens < len(tiny_processor.tokenizer(longer)["input_ids"])


# ----------------------------------------------------------------------- streams


@pytest.fixture
def files(tmp_path):
    names = [str(tmp_path / f"{seed}.wav") for seed in range(11)]
    for seed, name in enumerate(names):
        soundfile.write(name, synthetic_clip(0.4 + 0.1 * seed, seed, 16_000), 16_000)
    return names


@pytest.fixture
def encoded_together(tiny_model, monkeypatch):
    sizes, encode = [], tiny_model.encode_audio
    monkeypatch.setattr(
        tiny_model, "encode_audio", lambda **inputs: (sizes.append(len(inputs["input_features"])), encode(**inputs))[1]
    )
    return sizes


def test_files_are_encoded_together_and_come_in_their_order(captioner, files, tmp_path, encoded_together):
    names = [*files[:3], str(tmp_path / "missing.wav"), *files[3:]]
    expected = [captioner.caption([captioner.read(name)])[0].to_dict() for name in files]
    encoded_together.clear()
    before = set(threading.enumerate())
    found = list(captioner.caption_stream(names, 2))
    # A thread that still held the model when Python ends would abort the process.
    assert not set(threading.enumerate()) - before
    # Four batches of two, then the rest.
    assert encoded_together == [8, 3]
    assert [name for name, _ in found] == names
    assert isinstance(found[3][1], FileNotFoundError)
    assert same_results([result.to_dict() for _, result in found[:3] + found[4:]], expected)


def test_long_recordings_are_not_gathered(captioner, files, encoded_together, monkeypatch):
    monkeypatch.setattr(streaming, "_SECONDS_TOGETHER", 0.8)
    results = list(captioner.caption_stream(files[:4], 2))
    assert not any(isinstance(result, Exception) for _, result in results)
    assert encoded_together == [2, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_an_interrupt_does_not_wait_for_a_recording(captioner, tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    before = set(threading.enumerate())
    # Processes that run a part of the tests ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(captioner.caption_stream([str(tmp_path / "pipe.wav")]))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 1.3
    # Python does not wait for them when it ends.
    readers = set(threading.enumerate()) - before
    assert readers and all(thread.daemon for thread in readers)
    (tmp_path / "pipe.wav").open("wb").close()


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


def test_like_lengths_are_decoded_together_without_padding():
    encoding, prompts = made_up([3, 9, 4, 8, 3])
    batches = list(_decoding_batches(encoding, prompts, 2))
    assert [rows for rows, _, _ in batches] == [[1, 3], [2, 0], [4]]
    assert [part["decoder_input_ids"].shape for _, _, part in batches] == [(2, 9), (2, 4), (1, 3)]
    for rows, part, part_prompts in batches:
        assert part.audio_embeds[:, 0, 0].tolist() == rows
        assert part_prompts["decoder_input_ids"][:, -1].tolist() == [row + 1 for row in rows]
        assert (part_prompts["decoder_input_ids"] > 0).equal(part_prompts["decoder_attention_mask"] > 0)


@pytest.mark.parametrize("size", [None, 5, 100])
def test_a_batch_that_fits_stays_as_it_is(size):
    encoding, prompts = made_up([3, 9, 4, 8, 3])
    ((rows, part, part_prompts),) = _decoding_batches(encoding, prompts, size)
    assert rows == [0, 1, 2, 3, 4] and part is encoding
    assert torch.equal(part_prompts["decoder_input_ids"], prompts["decoder_input_ids"])


def test_what_does_not_belong_together_is_refused(tiny_model, tiny_processor):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in other.clap.text_projection.parameters():
            parameter.copy_(torch.randn_like(parameter))
    store = CaptionDatastore.from_captions(OTHERS, other, tiny_processor)
    with pytest.raises(ValueError, match="made by another CLAP"):
        Captioner(tiny_model, tiny_processor, store)
    with pytest.raises(ValueError, match="made by another CLAP"):
        Captioner(other, tiny_processor)


def test_a_datastore_costs_one_pass_of_the_text_tower(tiny_model, tiny_processor, monkeypatch):
    """The processor's own datastore is not searched beside another one, and not checked."""
    passes, embed = [], type(tiny_model.clap).embed_captions

    def counted(clap, captions, *args, **kwargs):
        passes.append(len(captions))
        return embed(clap, captions, *args, **kwargs)

    other = CaptionDatastore.from_captions(OTHERS, tiny_model, tiny_processor)
    monkeypatch.setattr(type(tiny_model.clap), "embed_captions", counted)
    assert tiny_processor.datastore is not None
    Captioner(tiny_model, tiny_processor, other)
    Captioner(tiny_model, tiny_processor)
    assert passes == [4, 4], "the four texts that tell encoders apart, once for each captioner"
