"""Several readings of a recording mixed at every token, in our search as in transformers'."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_CAPTIONS, tiny_clap_config, tiny_gpt2_config
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from recap_hf import (
    AudioCaptioningPipeline,
    CaptionDatastore,
    RecapConfig,
    RecapForConditionalGeneration,
    RecapProcessor,
)
from recap_hf.cli import main
from recap_hf.modeling.cache_name_recap import CACHE
from recap_hf.modeling.fixed_decoding_recap import FixedDecoding
from recap_hf.modeling.outputs_recap import RecapEncoderOutput
from recap_hf.modeling.readings_recap import WEIGHTS

# With these as ends the tiny model's random captions have many lengths.
ENDS = list(range(0, 300, 9))


@pytest.fixture
def bare(tiny_processor):
    """Token ids of the prompt without captions."""
    return tiny_processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0]


class ByProbabilities(LogitsProcessor):
    """The mixture written down again, in double precision: probabilities, not their logarithms, clip by clip."""

    def __init__(self, model, encoding, prompts, bare, listening, reading):
        self.model, self.encoding, self.prompts, self.bare = model, encoding, prompts, bare
        self.listening, self.reading = listening, reading

    def __call__(self, input_ids, scores):
        states, rows = self.encoding.last_hidden_state, []
        start = self.prompts["decoder_input_ids"].shape[1]
        for index, ids in enumerate(input_ids):
            clip = index * len(states) // len(input_ids)
            said = ids[start:]
            heard = self.model(
                encoder_outputs=(states[clip : clip + 1],),
                attention_mask=self.encoding.attention_mask[clip : clip + 1],
                decoder_input_ids=torch.cat([self.bare, said])[None],
            ).logits[0, -1]
            own = self.prompts["decoder_input_ids"][clip][self.prompts["decoder_attention_mask"][clip] == 1]
            read = self.model.decoder(torch.cat([own, said])[None]).logits[0, -1]
            whole = scores[index].double().exp()
            shares = (1 - self.listening - self.reading, self.listening, self.reading)
            parts = (whole / whole.sum(), heard.double().softmax(dim=0), read.double().softmax(dim=0))
            mixed = sum(share * part for share, part in zip(shares, parts, strict=True))
            rows.append(mixed.log().float())
        return torch.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 4, "early_stopping": False, "length_penalty": 1.0},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.7, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "penalty", "never"],
)
@pytest.mark.parametrize("shares", [(0.6, 0.0), (0.0, 0.6), (0.3, 0.4)], ids=["promptless", "soundless", "both"])
@torch.no_grad()
def test_equals_the_mixture_in_transformers_search(tiny_model, encoded, bare, settings, shares):
    encoding, prompts = encoded
    prompts.pop("retrieved")
    settings = {"max_new_tokens": 12, "eos_token_id": ENDS, **settings}
    reference = ByProbabilities(tiny_model, encoding, prompts, bare, *shares)
    expected = GenerationMixin.generate(
        tiny_model,
        encoder_outputs=RecapEncoderOutput(**encoding),
        logits_processor=LogitsProcessorList([reference]),
        **prompts,
        **settings,
    )
    options = dict(zip(WEIGHTS, shares, strict=True)) | {"promptless_input_ids": bare}
    options |= {"return_dict_in_generate": True, **settings}
    found = tiny_model.generate(encoder_outputs=encoding, **prompts, **options)
    assert found[CACHE].sequence_log_probs is not None, "transformers' search has run"
    assert torch.equal(found.sequences, expected)
    plain = tiny_model.generate(encoder_outputs=encoding, **prompts, **settings)
    assert plain.shape != expected.shape or not torch.equal(plain, expected), "the weight changed nothing"
    # What our search does not take over goes the other way, and arrives at the same.
    slow = tiny_model.generate(encoder_outputs=encoding, **prompts, **options, output_logits=True)
    assert slow[CACHE].sequence_log_probs is None
    assert torch.equal(slow.sequences, expected)


def test_steps_in_fixed_tensors_say_the_same(tiny_model, encoded, bare):
    encoding, prompts = encoded
    settings = {"num_beams": 3, "max_new_tokens": 12, "eos_token_id": ENDS}
    options = {"promptless_weight": 0.3, "soundless_weight": 0.4, "promptless_input_ids": bare, **settings}
    expected = tiny_model.generate(encoder_outputs=encoding, **prompts, **options)
    tiny_model.fixed_decoding = FixedDecoding()
    assert torch.equal(tiny_model.generate(encoder_outputs=encoding, **prompts, **options), expected)


def test_a_mask_apart_from_the_encoding(tiny_model, encoded, bare):
    """Of clips of several lengths: both searches see what the mask leaves, and nothing else."""
    encoding, prompts = encoded
    assert not encoding.attention_mask.all()
    settings = {"num_beams": 3, "max_new_tokens": 12, "eos_token_id": ENDS}
    options = {"promptless_weight": 0.3, "soundless_weight": 0.4, "promptless_input_ids": bare, **settings}
    expected = tiny_model.generate(encoder_outputs=encoding, **prompts, **options)
    apart = {"encoder_outputs": (encoding.last_hidden_state,), "attention_mask": encoding.attention_mask}
    for more in ({}, {"max_time": 600.0}):
        assert torch.equal(tiny_model.generate(**apart, **prompts, **options, **more), expected)


@torch.no_grad()
def test_a_captioner_that_hears_by_a_prefix(decoder_tokenizer, clap_tokenizer, clips):
    torch.manual_seed(0)
    config = RecapConfig(clap=tiny_clap_config(), decoder=tiny_gpt2_config(), conditioning="prefix", prefix_length=4)
    model = RecapForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("clap"):
            parameter.mul_(6.0)
    processor = RecapProcessor.from_config(config, decoder_tokenizer, clap_tokenizer)
    processor.datastore = CaptionDatastore.from_captions(TINY_CAPTIONS, model, processor)
    encoding = model.encode_audio(**processor(audio=clips[:1], sampling_rate=48_000, return_tensors="pt"))
    ids = processor.build_prompts(encoding.audio_embeds)["decoder_input_ids"][0]
    alone = processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0]
    said: list[int] = []
    for _ in range(6):
        probabilities = []
        for prompt in (ids, alone):
            so_far = torch.cat([prompt, torch.tensor(said, dtype=torch.long)])[None]
            logits = model(encoder_outputs=encoding, decoder_input_ids=so_far).logits[0, -1]
            probabilities.append(logits.double().softmax(dim=0))
        said.append(int((0.4 * probabilities[0] + 0.6 * probabilities[1]).argmax()))
    options = {"promptless_weight": 0.6, "num_beams": 1, "min_new_tokens": 6, "max_new_tokens": 6}
    found = model.generate(encoder_outputs=encoding, processor=processor, **options)
    assert found[0, len(ids) :].tolist() == said


def test_scores_are_those_of_a_pass_over_the_captions(tiny_model, encoded, bare):
    encoding, prompts = encoded
    tiny_model.config.eos_token_id = ENDS[1]
    options = {"promptless_weight": 0.4, "soundless_weight": 0.2, "promptless_input_ids": bare}
    settings = {"num_beams": 3, "eos_token_id": ENDS[1], "max_new_tokens": 12}
    sequences, scores = tiny_model.generate_with_scores(encoding, prompts, **settings, **options)
    assert scores == pytest.approx(tiny_model.score_captions(encoding, sequences, prompts, **options), rel=1e-4)
    # Sampling leaves our search: the scores come from a pass.
    torch.manual_seed(0)
    sampled = {"do_sample": True, "num_beams": 1, "max_new_tokens": 6, "eos_token_id": ENDS[1]}
    sequences, scores = tiny_model.generate_with_scores(encoding, prompts, **sampled, **options)
    assert scores == pytest.approx(tiny_model.score_captions(encoding, sequences, prompts, **options), rel=1e-4)


@torch.no_grad()
def test_score_of_a_caption_by_hand(tiny_model, encoded, bare):
    encoding, prompts = encoded
    alone = RecapEncoderOutput(**{name: value[:1] for name, value in encoding.items()})
    own = prompts["decoder_input_ids"][0][prompts["decoder_attention_mask"][0] == 1]
    caption, end = [11, 42, 7], tiny_model.config.eos_token_id
    total = 0.0
    for position, token in enumerate([*caption, end]):
        probability = 0.0
        for prompt, hears, share in ((own, True, 0.45), (bare, True, 0.25), (own, False, 0.3)):
            ids = torch.cat([prompt, torch.tensor(caption[:position], dtype=torch.long)])[None]
            read = tiny_model(encoder_outputs=alone, decoder_input_ids=ids) if hears else tiny_model.decoder(ids)
            probability += share * read.logits[0, -1].double().softmax(dim=0)[token].item()
        total += math.log(probability)
    single = {"decoder_input_ids": own[None], "decoder_attention_mask": torch.ones_like(own)[None]}
    sequence = torch.cat([own, torch.tensor([*caption, end])])[None]
    [score] = tiny_model.score_captions(
        alone,
        sequence,
        single,
        promptless_weight=0.25,
        soundless_weight=0.3,
        promptless_input_ids=bare.tolist(),
    )
    assert score == pytest.approx(math.exp(total / 4), rel=1e-5)


def test_what_is_forbidden_stays_forbidden(tiny_model, encoded, bare):
    encoding, prompts = encoded
    options = {"promptless_weight": 0.5, "promptless_input_ids": bare}
    end = ENDS
    start = prompts["decoder_input_ids"].shape[1]
    exactly = {"min_new_tokens": 9, "max_new_tokens": 9, "eos_token_id": end}
    for more in ({"num_beams": 3}, {"num_beams": 1, "do_sample": True}):
        ids = tiny_model.generate(encoder_outputs=encoding, **prompts, **options, **exactly, **more)
        assert not torch.isin(ids[:, start : start + 8], torch.tensor(end)).any()


def test_a_clip_alone_and_in_a_batch(tiny_model, encoded, bare):
    encoding, prompts = encoded
    options = {"promptless_weight": 0.3, "soundless_weight": 0.3, "promptless_input_ids": bare}
    options |= {"num_beams": 3, "eos_token_id": ENDS}
    together = tiny_model.generate(encoder_outputs=encoding, **prompts, **options, max_new_tokens=12)
    start = prompts["decoder_input_ids"].shape[1]
    for row in range(3):
        one = RecapEncoderOutput(**{name: value[row : row + 1] for name, value in encoding.items()})
        ids = prompts["decoder_input_ids"][row][prompts["decoder_attention_mask"][row] == 1][None]
        alone = tiny_model.generate(encoder_outputs=one, decoder_input_ids=ids, **options, max_new_tokens=12)
        said, expected = together[row, start:].tolist(), alone[0, ids.shape[1] :].tolist()
        assert said[: len(expected)] == expected


def test_the_processor_gives_the_prompt(tiny_model, tiny_processor, encoded, bare):
    encoding, prompts = encoded
    settings = {"promptless_weight": 0.5, "max_new_tokens": 8}
    expected = tiny_model.generate(encoder_outputs=encoding, **prompts, promptless_input_ids=bare, **settings)
    found = tiny_model.generate(encoder_outputs=encoding, processor=tiny_processor, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weight", [1.0, -0.1, "0.5", True, float("nan")])
def test_a_weight_outside_its_range(tiny_model, encoded, bare, weight):
    with pytest.raises(ValueError, match=r"`promptless_weight` must be a number of at least 0 and below 1, got"):
        tiny_model.generate(
            encoder_outputs=encoded[0], **encoded[1], promptless_weight=weight, promptless_input_ids=bare
        )


def test_weights_that_leave_nothing(tiny_model, encoded, bare):
    weights = {"promptless_weight": 0.5, "soundless_weight": 0.5, "promptless_input_ids": bare}
    with pytest.raises(ValueError, match="they add up to 1, and must stay below 1"):
        tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], **weights)


def test_a_checkpoint_says_how_it_is_decoded(tiny_model, tiny_processor, encoded, bare, clips, tmp_path):
    """What its generation_config.json has is the default of generate, of scores and of the pipeline."""
    encoding, prompts = encoded
    settings = {"max_new_tokens": 8, "num_beams": 3}
    weights = {"promptless_weight": 0.4, "soundless_weight": 0.3}
    options = {**weights, "promptless_input_ids": bare.tolist()}
    expected, scores = tiny_model.generate_with_scores(encoding, prompts, **options, **settings)
    plain = tiny_model.generate(encoder_outputs=encoding, **prompts, **settings)
    for name, value in options.items():
        setattr(tiny_model.generation_config, name, value)
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model = RecapForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(model.generate(encoder_outputs=encoding, **prompts, **settings), expected)
    assert model.score_captions(encoding, expected, prompts) == pytest.approx(scores, rel=1e-4)
    off = dict.fromkeys(weights, 0.0)
    assert torch.equal(model.generate(encoder_outputs=encoding, **prompts, **settings, **off), plain)
    assert not torch.equal(plain, expected)
    pipe = AudioCaptioningPipeline(model=model, processor=RecapProcessor.from_pretrained(tmp_path))
    results = pipe(clips, batch_size=len(clips), **settings)
    assert [result["caption"] for result in results] == tiny_processor.batch_decode(expected)


def test_another_datastore_is_taken_at_its_word(tiny_model, tiny_processor, clips, tmp_path):
    """Listening without captions speaks in the words of the training: not by default where captions are brought."""
    tiny_model.generation_config.promptless_weight = 0.6
    tiny_model.generation_config.max_new_tokens = 8
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model = RecapForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = RecapProcessor.from_pretrained(tmp_path)
    pipe = AudioCaptioningPipeline(model=model, processor=processor)

    def captions(**weights):
        return [pipe(clip, max_new_tokens=8, **weights)["caption"] for clip in clips]

    assert processor.has_own_datastore
    assert captions() == captions(promptless_weight=0.6) != captions(promptless_weight=0.0)
    own, processor.datastore = processor.datastore, CaptionDatastore.from_captions(TINY_CAPTIONS, model, processor)
    assert not processor.has_own_datastore
    assert captions() == captions(promptless_weight=0.0) != captions(promptless_weight=0.6)
    assert "_own_datastore" not in processor.to_dict() and not processor.has_own_datastore
    processor.datastore = own
    assert processor.has_own_datastore
    assert captions() == captions(promptless_weight=0.6)
    assert not RecapProcessor.from_pretrained(tmp_path, datastore=own).has_own_datastore


def test_nothing_to_read(tiny_model, tiny_processor, clips):
    """Without captions the reader has no say: what it would read is the same as what is heard."""
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor)
    settings = {"k": 0, "max_new_tokens": 8}
    found, plain = pipe(clips[0], soundless_weight=0.6, **settings), pipe(clips[0], **settings)
    assert (found["caption"], found["score"]) == (plain["caption"], pytest.approx(plain["score"]))
    explained = tiny_model.explain(clips[0], tiny_processor, sampling_rate=48_000, soundless_weight=0.6, **settings)
    assert explained.caption.strip() == plain["caption"].strip()


def test_a_weight_without_its_prompt(tiny_model, encoded):
    with pytest.raises(ValueError, match="needs the prompt without captions: pass `processor=processor`"):
        tiny_model.generate(encoder_outputs=encoded[0], **encoded[1], promptless_weight=0.5)


def test_pipeline(tiny_model, tiny_processor, clips, encoded, bare):
    encoding, prompts = encoded
    settings = {"promptless_weight": 0.6, "max_new_tokens": 8}
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor)
    expected, scores = tiny_model.generate_with_scores(encoding, prompts, promptless_input_ids=bare, **settings)
    texts = tiny_processor.batch_decode(expected)
    results = pipe(clips, batch_size=len(clips), **settings)
    assert [result["caption"] for result in results] == texts
    assert [result["score"] for result in results] == pytest.approx(scores, rel=1e-4)
    # The scores of reranked captions are the mixture's, too.
    one = pipe(clips[0], rerank="clap", candidates=1, num_beams=3, **settings)
    assert (one["caption"], one["score"]) == (texts[0], pytest.approx(scores[0], rel=1e-4))


def test_explanation_of_the_mixtures_caption(tiny_model, tiny_processor, clips):
    settings = {"promptless_weight": 0.6, "max_new_tokens": 8}
    inputs = tiny_processor(audio=clips[:1], sampling_rate=48_000, return_tensors="pt")
    [expected] = tiny_processor.batch_decode(tiny_model.generate(**inputs, processor=tiny_processor, **settings))
    explained = tiny_model.explain(clips[0], tiny_processor, sampling_rate=48_000, **settings)
    assert explained.caption.strip() == expected.strip()


def test_command_line(tmp_path, capsys, clips):
    soundfile.write(tmp_path / "a.wav", np.stack([clips[0]] * 2, axis=1), 48_000)
    scores = []
    for weight in ("0", "0.5"):
        assert main(["caption", str(tmp_path / "a.wav"), "--promptless-weight", weight, "--format", "json"]) == 0
        [row] = json.loads(capsys.readouterr().out)
        scores.append(row["score"])
    assert scores[1] != pytest.approx(scores[0])


def test_live_command_line(tmp_path, capsys, clips):
    """The same sound heard twice: what its captions are sure of depends on the weight."""
    soundfile.write(tmp_path / "a.wav", clips[0], 48_000, subtype="PCM_16")
    scores = []
    for weight in ("0", "0.5"):
        assert main(["live", str(tmp_path / "a.wav"), "--promptless-weight", weight, "--format", "jsonl"]) == 0
        scores.append([json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()])
    assert len(scores[0]) == len(scores[1]) > 0
    assert scores[1] != pytest.approx(scores[0])
