"""CLAPScore against transformers' own CLAP, and its refusal of the captioner's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor, ClapModel

from recap_hf import Captioner
from recap_hf.evaluation import EvaluationClips
from recap_hf.evaluation.clap_score import ClapScorer, clap_scores


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory, clap_tokenizer):
    """A random CLAP in a folder, as `ClapModel` and `ClapProcessor` leave it."""
    from conftest import tiny_clap_config

    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(5)
    ClapModel(tiny_clap_config()).eval().save_pretrained(folder)
    clap_tokenizer.save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return str(folder)


def test_scores_are_the_cosines_of_clap(clap_folder, clips, clap_tokenizer):
    scorer = ClapScorer(clap_folder, "cpu")
    waveforms = [clips[0], clips[3]]  # both shorter than a window, which the stock extractor does not crop
    stock = ClapFeatureExtractor.from_pretrained(clap_folder)
    features = stock(waveforms, sampling_rate=48_000, return_tensors="pt")
    tokens = clap_tokenizer(["rain falls", "a dog barks twice"], padding=True, return_tensors="pt")
    model = ClapModel.from_pretrained(clap_folder).eval()
    with torch.no_grad():
        audio = model.get_audio_features(input_features=features["input_features"]).pooler_output
        text = model.get_text_features(**tokens).pooler_output
    expected = torch.nn.functional.cosine_similarity(audio, text).tolist()
    audio_values = [{"array": waveform, "sampling_rate": 48_000} for waveform in waveforms]
    table = EvaluationClips("two clips", ["a", "b"], audio_values, [["x"], ["y"]])
    captions = {"one": ["rain falls", "a dog barks twice"], "empty": ["", "a dog barks twice"]}
    scores = clap_scores(scorer, table, captions, batch_size=1)
    assert scores["one"] == pytest.approx(expected, abs=1e-4)
    assert scores["empty"] == pytest.approx([0, expected[1]], abs=1e-4)


def test_long_clips_count_as_a_whole(clap_folder, clips):
    scorer = ClapScorer(clap_folder, "cpu")
    long = clips[2][: 20 * 48_000]
    halves = scorer.embed_audio([long[: 10 * 48_000], long[10 * 48_000 :]])
    expected = halves.sum(axis=0) / np.linalg.norm(halves.sum(axis=0))
    assert scorer.embed_audio([clips[0], long])[1] == pytest.approx(expected, abs=1e-4)


def test_the_captioners_own_clap_is_refused(clap_folder, tiny_model, tiny_processor, tmp_path, clap_tokenizer):
    captioner = Captioner(tiny_model, tiny_processor)
    ClapScorer(clap_folder, "cpu").refuse_own(captioner)
    tiny_model.clap.save_pretrained(tmp_path)
    clap_tokenizer.save_pretrained(tmp_path)
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is the CLAP that the captioner itself retrieves with"):
        ClapScorer(str(tmp_path), "cpu").refuse_own(captioner)
