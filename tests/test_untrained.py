"""`recap assemble`: a CLAP, a GPT-2 and captions, without training, from folders to captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_CAPTIONS, synthetic_clip, tiny_clap_config, tiny_gpt2_config, tiny_mobilenet_config
from training_parts import make_tokenizer
from transformers import AutoModel, ClapConfig, ClapModel, GPT2Config, GPT2LMHeadModel, pipeline

from recap_cli import main
from recap_hf import (
    Captioner,
    CaptionOptions,
    RecapFeatureExtractor,
    RecapForConditionalGeneration,
    RecapProcessor,
)
from recap_hf.conversion import ConversionError
from recap_hf.conversion.untrained import assemble
from recap_hf.evaluation import SYSTEMS, Systems
from recap_hf.explain import explain_caption
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel
from recap_hf.tagging import Tagger


def write_parts(folder: Path, clap: torch.nn.Module, decoder: GPT2LMHeadModel, extractor: RecapFeatureExtractor):
    clap.save_pretrained(folder / "clap")
    extractor.save_pretrained(folder / "clap")
    make_tokenizer("clap").save_pretrained(folder / "clap")
    decoder.save_pretrained(folder / "gpt2")
    make_tokenizer("gpt2").save_pretrained(folder / "gpt2")
    (folder / "captions.txt").write_text("\n".join(TINY_CAPTIONS) + "\n")


@pytest.fixture(scope="module", params=["htsat", "mobilenet"])
def parts(request, tmp_path_factory) -> Path:
    """Folders `clap` and `gpt2` with their tokenizers, and `captions.txt`."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    if request.param == "htsat":
        config = tiny_clap_config()
        config.text_config.vocab_size = 400
        clap, extractor = ClapModel(config), RecapFeatureExtractor()
    else:
        clap = MobileNetClapModel(tiny_mobilenet_config())
        extractor = RecapFeatureExtractor(**MobileNetClapModel.feature_settings(clap.config))
    decoder = GPT2LMHeadModel(tiny_gpt2_config(vocab_size=400))
    write_parts(folder, clap, decoder, extractor)
    return folder


@pytest.fixture(scope="module")
def assembled(parts) -> Path:
    given = ["--clap", parts / "clap", "--decoder", parts / "gpt2", "--datastore", parts / "captions.txt"]
    assert main(["assemble", *map(str, given), "--output", str(parts / "captioner")]) == 0
    return parts / "captioner"


@pytest.fixture(scope="module")
def captioner(assembled) -> Captioner:
    return Captioner.from_pretrained(assembled, options=CaptionOptions(max_new_tokens=6))


def test_the_folder_is_complete_and_says_untrained(parts, assembled):
    model = AutoModel.from_pretrained(assembled)
    assert type(model) is RecapForConditionalGeneration
    assert model.config.conditioning == "none" and model.conditioning_parameters() == []
    assert not [name for name in model.state_dict() if "cross" in name or "prefix" in name]
    stock = GPT2LMHeadModel.from_pretrained(parts / "gpt2").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in model.decoder.state_dict().items())
    assert "untrained" in (assembled / "README.md").read_text().lower()
    result = pipeline("audio-captioning", model=str(assembled))(synthetic_clip(2.0, 1), max_new_tokens=4)
    assert result["untrained"] is True and len(result["retrieved"]) == 4


def test_an_assembly_is_replaced_unless_somebody_edited_its_card(parts, assembled, capsys):
    out = parts / "again"
    shutil.copytree(assembled, out)
    given = ["--clap", parts / "clap", "--decoder", parts / "gpt2", "--datastore", parts / "captions.txt"]
    command = ["assemble", *map(str, given), "--output", str(out), "--overwrite", "--k", "2"]
    assert main(command) == 0
    assert RecapProcessor.from_pretrained(out).num_retrieved_captions == 2
    with open(out / "README.md", "a", encoding="utf-8") as card:
        card.write("Our limits.\n")
    capsys.readouterr()
    assert main(command) == 1
    assert f"{out / 'README.md'} is not a file of a conversion and would be lost" in capsys.readouterr().err
    assert "Our limits." in (out / "README.md").read_text(encoding="utf-8")


def test_the_command_line_says_untrained(assembled, tmp_path, capsys):
    soundfile.write(tmp_path / "clip.wav", synthetic_clip(2.0, 1), 48_000)
    given = [str(tmp_path / "clip.wav"), "--model", str(assembled), "--max-new-tokens", "4"]
    assert main(["caption", *given]) == 0
    assert "(untrained)" in capsys.readouterr().out.splitlines()[0]
    assert main(["caption", *given, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["untrained"] is True


def test_clap_chooses_among_generated_and_retrieved_captions(captioner):
    recordings = [synthetic_clip(seconds, seed, captioner.sampling_rate) for seed, seconds in ((1, 2.0), (2, 24.0))]
    encoding = captioner.encode(recordings)
    retrieved = captioner.retrieve(encoding)
    # The second has fewer captions than the first.
    retrieved[1] = retrieved[1][:1]
    plain = captioner.with_options(CaptionOptions(copy_margin=float("inf"), candidates=4))
    given = zip(captioner.generate(encoding, retrieved), plain.generate(encoding, retrieved), strict=True)
    for row, (result, generated) in enumerate(given):
        captions = [one["caption"] for one in generated.candidates] + [hit["caption"] for hit in retrieved[row]]
        audio = encoding.audio_embeds[row].numpy()
        audio = audio[np.abs(audio).sum(axis=1) > 0]
        texts = captioner.model.embed_captions(captions, captioner.processor)
        cosines = (texts @ audio.T).mean(axis=1)
        assert result.caption == captions[cosines.argmax()]
        assert result.similarity == pytest.approx(cosines.max(), abs=1e-5)
        assert result.copied is (True if cosines.argmax() >= len(generated.candidates) else None)


def test_the_score_of_a_retrieved_caption_is_the_language_models(captioner, parts):
    # A recording to which a retrieved caption is nearer than what the random language model writes.
    clips = (synthetic_clip(2.0, seed, captioner.sampling_rate) for seed in range(10))
    encodings = (captioner.encode([clip]) for clip in clips)
    encoding = next(one for one in encodings if captioner.generate(one, captioner.retrieve(one))[0].copied)
    retrieved = captioner.retrieve(encoding)
    processor, gpt2 = captioner.processor, GPT2LMHeadModel.from_pretrained(parts / "gpt2").eval()
    prompt = processor.tokenizer(processor.prompt.build([hit["caption"] for hit in retrieved[0]]))["input_ids"]
    [result] = captioner.generate(encoding, retrieved)
    assert result.copied and result.untrained
    target = [*processor.tokenizer(" " + result.caption)["input_ids"], processor.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = gpt2(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    assert result.score == pytest.approx(logits[range(len(target)), target].mean().exp().item(), rel=1e-4)


def test_the_recording_reaches_the_caption_by_retrieval_and_choice_alone(captioner):
    encoding = captioner.encode([synthetic_clip(2.0, 1, captioner.sampling_rate)])
    prompts = captioner.processor.build_prompts(encoding.audio_embeds)
    others = type(encoding)(**{**encoding, "last_hidden_state": torch.zeros_like(encoding.last_hidden_state)})
    ids = {"decoder_input_ids": prompts["decoder_input_ids"]}
    logits = [captioner.model(encoder_outputs=one, **ids).logits for one in (encoding, others)]
    assert torch.equal(*logits)


def test_no_captions_leave_the_generated_ones(captioner):
    waveform = synthetic_clip(2.0, 1, captioner.sampling_rate)
    [result] = captioner.with_options(CaptionOptions(k=0)).caption([waveform])
    assert result.retrieved == [] and result.untrained and result.token_ids


def test_what_needs_cross_attention_is_refused(captioner, assembled, tmp_path):
    from recap_hf.conversion import convert_to_stock

    with pytest.raises(ValueError, match="conditioning='none'"):
        explain_caption(captioner, synthetic_clip(2.0, 1))
    with pytest.raises(ConversionError, match="conditioning='none'"):
        convert_to_stock(assembled, tmp_path / "out")


def test_nothing_is_written_if_a_part_is_missing(parts, tmp_path):
    with pytest.raises(OSError):
        assemble(str(parts / "clap"), str(parts / "absent"), parts / "captions.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_processor_of_two_parts(parts, captioner):
    processor = RecapProcessor.from_clap_gpt2_pretrained(parts / "clap", parts / "gpt2", num_retrieved_captions=3)
    processor.check_model(captioner.model)
    assert processor.num_retrieved_captions == 3
    assert processor.feature_extractor.to_dict() == captioner.processor.feature_extractor.to_dict()


def test_systems_beside_a_trained_captioner(assembled, captioner):
    """The assembly inside a captioner with cross-attention is the one that `recap assemble` makes of its parts."""
    model = RecapForConditionalGeneration.from_clap_gpt2_pretrained(captioner.model.clap, captioner.model.decoder)
    trained = Captioner(model, captioner.processor, options=captioner.options)
    recordings = [synthetic_clip(2.0, seed, captioner.sampling_rate) for seed in (1, 2)]
    systems = Systems(trained)
    assert "untrained" not in systems.check(None) and "untrained" in SYSTEMS
    names = systems.check(["untrained", "first_retrieved"])
    found = systems.caption(recordings, ["a", "b"], [[], []], names)
    expected = captioner.caption(recordings)
    assert [result.caption for result in found["untrained"]] == [result.caption for result in expected]
    assert all(result.untrained for result in found["untrained"])


def test_the_tag_template(captioner):
    systems = Systems(captioner)
    if not isinstance(captioner.model.clap, MobileNetClapModel):
        with pytest.raises(ValueError, match="has no classification head"):
            systems.check(["tag_template"])
        return
    waveform = synthetic_clip(2.0, 1, captioner.sampling_rate)
    found = systems.caption([waveform], ["a"], [[]], systems.check(["tag_template"]))["tag_template"]
    [tags] = Tagger(captioner.model.clap, captioner.processor.feature_extractor).tag([waveform])
    assert found[0].caption == "The sound of " + " and ".join(tag.name.lower() for tag in tags[:3])


@pytest.mark.slow
def test_full_size_in_one_command(tmp_path, capsys):
    torch.manual_seed(0)
    write_parts(
        tmp_path, ClapModel(ClapConfig()), GPT2LMHeadModel(GPT2Config(eos_token_id=0)), RecapFeatureExtractor()
    )
    given = ["--clap", tmp_path / "clap", "--decoder", tmp_path / "gpt2", "--datastore", tmp_path / "captions.txt"]
    assert main(["assemble", *map(str, given), "--output", str(tmp_path / "out")]) == 0
    soundfile.write(tmp_path / "clip.wav", synthetic_clip(3.0, 1), 48_000)
    capsys.readouterr()
    assert main(["caption", str(tmp_path / "clip.wav"), "--model", str(tmp_path / "out"), "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)[0]
    assert result["untrained"] is True and len(result["retrieved"]) == 4
