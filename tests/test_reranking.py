"""Best of n: the candidate nearest to its recording, in the pipeline and on the command line."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from recap_cli import main
from recap_hf import AudioCaptioningPipeline, Captioner, CaptionOptions
from recap_hf.modeling.captioning_recap import _Reranking
from recap_hf.modeling.generation_recap import until_end


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(48_000 * seconds)).astype(np.float32) * 0.1


@pytest.fixture
def words_only(tiny_processor) -> dict:
    """A random model writes control characters; this leaves it words."""
    tokens = tiny_processor.tokenizer.convert_ids_to_tokens(range(300))
    barred = [i for i, token in enumerate(tokens) if not re.fullmatch("Ġ?[a-z]+", token or "")]
    return {"suppress_tokens": barred, "max_new_tokens": 6}


def test_similarities_by_hand(tiny_model, tiny_processor):
    """The mean cosine over the windows that a recording has."""
    embeds = torch.zeros(2, 2, 16)
    embeds[0, 0, 3], embeds[0, 1, 5], embeds[1, 0, 0] = 1.0, 1.0, 1.0
    texts = tiny_model.embed_captions(["a dog", "rain"], tiny_processor)
    found = Captioner(tiny_model, tiny_processor).similarities(["a dog", "rain"], embeds)
    np.testing.assert_allclose(found, [(texts[0, 3] + texts[0, 5]) / 2, texts[1, 0]], atol=1e-6)
    # A caption without a word.
    silence = tiny_model.embed_captions(["silence"], tiny_processor)[0]
    found = Captioner(tiny_model, tiny_processor).similarities([""], embeds[1:])
    np.testing.assert_allclose(found, [silence[0]], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_the_nearest_of_the_candidates_is_returned(tiny_model, tiny_processor, words_only, options):
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, **words_only)
    clips = [noise(3), noise(14, seed=1)]
    torch.manual_seed(0)
    results = pipe(clips, rerank="clap", candidates=5, batch_size=2, **options)
    for clip, result in zip(clips, results, strict=True):
        inputs = tiny_processor(audio=[clip], sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            embeds = tiny_model.encode_audio(**inputs).audio_embeds[0].numpy()
        for candidate in result["candidates"]:
            text = tiny_model.embed_captions([candidate["caption"]], tiny_processor)[0]
            assert candidate["similarity"] == pytest.approx(float((embeds @ text).mean()), abs=1e-4)
        similarities = [candidate["similarity"] for candidate in result["candidates"]]
        assert similarities == sorted(similarities, reverse=True) and len(similarities) <= 5
        assert result["candidates"][0]["caption"] == result["caption"]
        assert result["similarity"] == pytest.approx(max(similarities), abs=1e-5)
        assert len({candidate["caption"] for candidate in result["candidates"]}) == len(similarities)


def test_candidates_are_the_beams(tiny_model, tiny_processor, words_only):
    clip = noise(3)
    inputs = tiny_processor(audio=[clip], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        encoding = tiny_model.encode_audio(**inputs)
    prompts = tiny_processor.build_prompts(encoding.audio_embeds)
    ids = tiny_model.generate(encoder_outputs=encoding, **prompts, num_beams=4, num_return_sequences=4, **words_only)
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, **words_only)
    result = pipe(clip, rerank="clap", candidates=4)
    assert {candidate["caption"] for candidate in result["candidates"]} == set(tiny_processor.batch_decode(ids))
    # The score is that of the chosen caption, whichever beam it was.
    row = tiny_processor.batch_decode(ids).index(result["caption"])
    score = tiny_model.score_captions(encoding, ids[row : row + 1], prompts)[0]
    assert result["score"] == pytest.approx(score, rel=1e-4)


def test_one_candidate_is_no_reranking(tiny_model, tiny_processor, words_only):
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, **words_only)
    plain, single = pipe(noise(3)), pipe(noise(3), rerank="clap", candidates=1)
    assert plain["caption"] == single["caption"] and plain["score"] == pytest.approx(single["score"], rel=1e-4)
    assert "similarity" not in plain and "candidates" not in plain


def test_what_is_refused(tiny_model, tiny_processor):
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor)
    with pytest.raises(ValueError, match="`rerank` must be one of clap"):
        pipe(noise(1), rerank="bleu")
    with pytest.raises(ValueError, match="`candidates` must be an integer of at least 1, got 0"):
        pipe(noise(1), rerank="clap", candidates=0)


def test_command_line(tmp_path, capsys):
    from recap_hf import examples_path

    clip = str(examples_path() / "sea.flac")
    assert main(["caption", clip, "--rerank", "clap", "--candidates", "4", "--format", "json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["candidates"][0]["caption"] == result["caption"]
    output = tmp_path / "captions.csv"
    assert main(["caption", clip, "--rerank", "clap", "--format", "csv", "--output", str(output)]) == 0
    with open(output, newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["similarity"]) > 0 and row["error"] == ""
    assert main(["caption", clip, "--candidates", "4", "--rerank", "none"]) == 2
    assert "Without reranking `candidates` cannot be chosen" in capsys.readouterr().err
    captions = {}
    for weight in ("0", "inf"):
        assert main(["caption", clip, "--rerank", "clap", "--rerank-weight", weight, "--format", "json"]) == 0
        (captions[weight],) = json.loads(capsys.readouterr().out)
    largest = max(one["similarity"] for one in captions["0"]["candidates"])
    assert captions["inf"]["similarity"] == pytest.approx(largest, abs=1e-5)
    assert captions["0"]["similarity"] <= captions["inf"]["similarity"]


def test_scores_of_the_search_by_hand():
    """log p over length ** penalty: two captions of 2 and 4 tokens, the end counted, and one that never ended."""
    targets = torch.tensor([[5, 9, 9, 9], [5, 6, 7, 9], [5, 6, 7, 8]])
    lengths = until_end(targets, 9).sum(dim=1).numpy()
    assert lengths.tolist() == [2, 4, 4] and until_end(targets, [9, 6]).sum(dim=1).tolist() == [2, 2, 2]
    config = GenerationConfig(length_penalty=0.5)
    rerank = _Reranking.of(CaptionOptions(rerank="clap", rerank_weight=2.0), config)
    found = rerank.values([0.5, 0.25, 0.25], np.array([0.1, 0.2, 0.3]), lengths, config)
    searched = [2 * np.log(0.5) / 2**0.5, 4 * np.log(0.25) / 2, 4 * np.log(0.25) / 2]
    np.testing.assert_allclose(found, np.add(searched, [0.2, 0.4, 0.6]))


def test_a_weight_lies_between_the_search_and_clap(tiny_model, tiny_processor, words_only):
    """0 leaves the search's order, inf that of the similarities; between them the sum decides."""
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, **words_only, num_beams=5)
    clip = noise(3)
    plain, nearest = pipe(clip), pipe(clip, rerank="clap")
    assert pipe(clip, rerank="clap", rerank_weight=0.0)["caption"] == plain["caption"]
    assert pipe(clip, rerank="clap", rerank_weight=float("inf"))["caption"] == nearest["caption"]
    assert nearest["caption"] != plain["caption"], "the case shows nothing"
    inputs = tiny_processor(audio=[clip], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        encoding = tiny_model.encode_audio(**inputs)
        prompts = tiny_processor.build_prompts(encoding.audio_embeds)
        sequences = tiny_model.generate(
            encoder_outputs=encoding, **prompts, **words_only, num_beams=5, num_return_sequences=5
        )
        start = prompts["decoder_input_ids"].shape[1]
        values = []
        for row, text in zip(sequences, tiny_processor.batch_decode(sequences), strict=True):
            [score] = tiny_model.score_captions(encoding, row[None], prompts)
            said = row[start:].tolist()
            end = tiny_model.config.eos_token_id
            length = said.index(end) + 1 if end in said else len(said)
            similarity = Captioner(tiny_model, tiny_processor).similarities([text], encoding.audio_embeds)[0]
            penalty = tiny_model.generation_config.length_penalty
            values.append((np.log(score) * length / length**penalty, similarity, text))
    for weight in (1.0, 10.0, 100.0):
        expected = max(values, key=lambda value: value[0] + weight * value[1])[2]
        result = pipe(clip, rerank="clap", rerank_weight=weight)
        assert result["caption"] == expected


def test_a_retrieved_caption_that_is_nearer_by_the_margin_is_the_caption(tiny_model, tiny_processor, words_only):
    """Both sides of the margin; the second recording is long, and its similarity the mean over its windows."""
    captioner = Captioner(tiny_model, tiny_processor, generate_kwargs=words_only)
    copied = 0
    for clip in (noise(3), noise(14, seed=1), noise(3, seed=2)):
        encoding = captioner.encode([clip])
        retrieved = captioner.retrieve(encoding)
        reranked = captioner.with_options(CaptionOptions(rerank="clap"))
        [plain] = reranked.generate(encoding, retrieved)
        windows = encoding.audio_embeds[0].numpy()
        texts = tiny_model.embed_captions([hit["caption"] for hit in retrieved[0]], tiny_processor)
        cosines = (texts @ windows.T).mean(axis=1)
        best = int(cosines.argmax())
        ahead = float(cosines[best]) - plain.similarity
        if ahead <= 1e-3:
            continue
        copied += 1
        above, below = (
            captioner.with_options(CaptionOptions(rerank="clap", candidates=3, copy_margin=ahead + change))
            for change in (1e-4, -1e-4)
        )
        [kept], [taken] = (each.generate(encoding, retrieved) for each in (above, below))
        assert (kept.copied, kept.similarity) == (None, pytest.approx(plain.similarity, abs=1e-5))
        assert (taken.copied, taken.caption) == (True, retrieved[0][best]["caption"])
        assert taken.similarity == pytest.approx(float(cosines[best]), abs=1e-5)
        assert taken.candidates[0]["caption"] == taken.caption and taken.candidates[1:] == kept.candidates
        assert tiny_processor.tokenizer.decode(taken.token_ids, skip_special_tokens=True).strip() == taken.caption
        assert taken.to_dict()["copied"] is True and taken.retrieved == kept.retrieved
        # Its score is the decoder's, as that of a generated caption.
        prompts = tiny_processor.build_prompts(retrieved=retrieved)
        ids = torch.tensor([prompts["decoder_input_ids"][0].tolist() + taken.token_ids])
        prompts = {name: prompts[name] for name in ("decoder_input_ids", "decoder_attention_mask")}
        [score] = tiny_model.score_captions(encoding, ids, prompts)
        assert taken.score == pytest.approx(score, rel=1e-4)
    assert copied == 3, "the case shows nothing"


def test_what_the_decoder_can_write_is_not_copied(tiny_model, tiny_processor, words_only, monkeypatch):
    """A decoder that gives a retrieved caption a score of 2 % could have written it."""
    captioner = Captioner(tiny_model, tiny_processor, generate_kwargs=words_only)
    captioner = captioner.with_options(CaptionOptions(rerank="clap", copy_margin=0.0))
    [copied] = captioner.caption([noise(3)])
    assert copied.copied and copied.score < 0.02
    score_captions = type(tiny_model).score_captions
    for score, expected in ((0.0201, None), (0.0199, True)):

        def scored(self, encoding, sequences, prompts, score=score):
            return [score] if len(sequences) == 1 else score_captions(self, encoding, sequences, prompts)

        monkeypatch.setattr(type(tiny_model), "score_captions", scored)
        [found] = captioner.caption([noise(3)])
        assert (found.copied, found.caption == copied.caption) == (expected, bool(expected))


def test_rows_of_a_batch_are_copied_as_alone(tiny_model, tiny_processor, words_only):
    options = CaptionOptions(rerank="clap", copy_margin=0.0)
    captioner = Captioner(tiny_model, tiny_processor, options=options, generate_kwargs=words_only)
    clips = [noise(3), noise(14, seed=1), noise(3, seed=2)]
    together, alone = captioner.caption(clips), [captioner.caption([clip])[0] for clip in clips]
    assert any(one.copied for one in together)
    for one, other in zip(together, alone, strict=True):
        assert (one.caption, one.copied) == (other.caption, other.copied)
        assert one.score == pytest.approx(other.score, rel=1e-4)


def test_a_checkpoint_may_rerank_by_itself(tiny_model, tiny_processor, words_only):
    config = tiny_model.generation_config
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, **words_only, num_beams=5)
    clip = noise(3)
    plain, nearest = pipe(clip), pipe(clip, rerank="clap")
    config.rerank = "clap"
    found = pipe(clip)
    assert found["caption"] == nearest["caption"] != plain["caption"]
    assert "candidates" not in found, "only who asks for reranking is told the others"
    assert pipe(clip, rerank="none")["caption"] == plain["caption"]
    # Who asks for a sample gets the one that was drawn.
    torch.manual_seed(0)
    sampled = pipe(clip, do_sample=True)
    config.rerank = None
    torch.manual_seed(0)
    assert pipe(clip, do_sample=True)["caption"] == sampled["caption"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rerank": "fense"}, "`rerank` must be one of clap, none, got 'fense'"),
        ({"rerank": "clap", "candidates": 0}, "`candidates` must be an integer of at least 1, got 0"),
        ({"candidates": 4}, "Without reranking `candidates` cannot be chosen: set `rerank` to 'clap', or leave"),
        ({"rerank_weight": 1.0, "copy_margin": 0.1}, "Without reranking `rerank_weight` and `copy_margin` cannot be"),
        ({"rerank": "clap", "copy_margin": -0.1}, "`copy_margin` must be a number of at least 0, got -0.1"),
        ({"rerank": "clap", "rerank_weight": -1.0}, "`rerank_weight` must be a number of at least 0, got -1.0"),
        ({"rerank": "clap", "rerank_weight": float("nan")}, "`rerank_weight` must be a number of at least 0, got nan"),
    ],
)
def test_choices_that_are_none(tiny_model, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _Reranking.of(CaptionOptions(**given), tiny_model.generation_config)
