"""Tags: probabilities and times against computations by hand and transformers' own pipeline, and `recap tag`."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_CAPTIONS, tiny_mobilenet_config
from training_parts import make_tokenizer

from recap_cli import main
from recap_hf import default_model_path, examples_path
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel
from recap_hf.tagging import Tag, Tagger, tag_categories
from recap_hf.training.tasks.contrastive import clip_scores

RATE = 16_000
WINDOW = 161_280


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def clap() -> MobileNetClapModel:
    torch.manual_seed(0)
    model = MobileNetClapModel(tiny_mobilenet_config()).eval()
    with torch.no_grad():
        # At its initialisation the head says 0.5 for everything.
        model.classifier.weight.normal_(0, 0.2)
    return model


@pytest.fixture
def recordings(tmp_path) -> Path:
    path = tmp_path / "recordings"
    path.mkdir()
    soundfile.write(path / "a.wav", noise(2.0, 1), RATE)
    (path / "b broken.wav").write_bytes(b"RIFF")
    soundfile.write(path / "c.wav", np.zeros(RATE), RATE)
    return path


def patches_of(clap, extractor, window: np.ndarray) -> torch.Tensor:
    mel = extractor(window, sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        return clap.classify_features(clap.audio_features(mel))


def runs_of(probabilities: np.ndarray, threshold: float, end: float) -> list[tuple[float, float]]:
    """Runs of patches of 0.48 s with at least `threshold`, cut at `end` seconds."""
    padded = np.concatenate([[False], probabilities >= threshold, [False]])
    starts, ends = np.flatnonzero(padded[1:] & ~padded[:-1]), np.flatnonzero(padded[:-1] & ~padded[1:])
    return [(round(a * 0.48, 3), round(min(b * 0.48, end), 3)) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("seconds", [1.0, 10.08])
def test_classes_of_the_head(clap, extractor, seconds):
    waveform = noise(seconds, 3)
    waveform[: len(waveform) // 2] *= np.linspace(0, 1, len(waveform) // 2) ** 4
    patches = patches_of(clap, extractor, waveform)
    scores, threshold = clip_scores(patches)[0], float(patches[0, :2].median())
    [tags] = Tagger(clap, extractor).tag([waveform], threshold=threshold)
    order = [number for number in scores.argsort(descending=True).tolist() if scores[number] >= threshold]
    assert tags and [tag.name for tag in tags] == [["Dog", "Rain", "Bell"][number] for number in order]
    for tag, number in zip(tags, order, strict=True):
        assert tag.probability == pytest.approx(scores[number].item(), abs=1e-6)
        assert tag.times == runs_of(patches[0, :, number].numpy(), threshold, seconds)
    assert Tagger(clap, extractor).tag([waveform], top=1, threshold=0.0)[0][0].name == tags[0].name


def test_a_long_recording_is_read_window_by_window(clap, extractor):
    """25 s are two windows and one that ends with the recording, whose patches up to 20.16 s do not count again."""
    waveform = noise(25.0, 4)
    parts = [patches_of(clap, extractor, waveform[start : start + WINDOW])[0] for start in (0, WINDOW)]
    last = patches_of(clap, extractor, waveform[-WINDOW:])[0]
    starts = 25.0 - 10.08 + 0.48 * np.arange(21)
    kept = starts + 0.48 > 20.16
    everything = torch.cat([*parts, last[torch.from_numpy(kept)]])
    expected = (everything.mean(dim=0) + everything.amax(dim=0)) / 2
    [tags] = Tagger(clap, extractor).tag([waveform], threshold=0.0)
    assert {tag.name: tag.probability for tag in tags} == pytest.approx(
        dict(zip(["Dog", "Rain", "Bell"], expected.tolist(), strict=True)), abs=1e-6
    )
    assert all(tag.times == [(0.0, 25.0)] for tag in tags)


def test_silent_windows_and_silent_recordings(clap, extractor):
    waveform = np.concatenate([noise(10.08, 5), np.zeros(WINDOW, dtype=np.float32), noise(10.08, 6)])
    tagger = Tagger(clap, extractor)
    sounding = torch.cat([patches_of(clap, extractor, waveform[start:][:WINDOW]) for start in (0, 2 * WINDOW)], dim=1)
    [tags, none] = tagger.tag([waveform, np.zeros(RATE, dtype=np.float32)], threshold=0.0)
    expected = clip_scores(sounding)[0]
    assert sorted(tag.probability for tag in tags) == pytest.approx(sorted(expected.tolist()), abs=1e-6)
    assert tags[0].times == [(0.0, 10.08), (20.16, 30.24)]
    assert none == []


def test_memory_does_not_grow_with_the_recording(extractor, monkeypatch):
    """The blocks of an endless source are dropped as windows are tagged: no more than two windows are held."""
    from recap_hf.audio import windows

    def stream(source, rate):
        for seed in range(60):
            yield noise(5.0, seed)

    monkeypatch.setattr(windows, "AudioStream", stream)
    held = [len(window.samples.base) for window in windows.sound_windows("endless", extractor)]
    assert len(held) == 30
    assert max(held) <= 2 * WINDOW + 5 * RATE


def test_labels_are_those_of_the_zero_shot_pipeline(clap, clap_folder, extractor):
    from transformers import pipeline

    classify = pipeline("zero-shot-audio-classification", model=str(clap_folder))
    waveform, labels = noise(14.0, 7), ["a dog", "rain", "a bell"]
    expected = classify(waveform, candidate_labels=labels, hypothesis_template="the sound of {}")
    tagger = Tagger.from_pretrained(clap_folder, labels=labels, template="the sound of {}")
    [tags] = tagger.tag([waveform], threshold=0.0)
    assert {tag.name: tag.probability for tag in tags} == pytest.approx(
        {entry["label"]: entry["score"] for entry in expected}, abs=1e-5
    )
    assert [tag.probability for tag in tags] == sorted((tag.probability for tag in tags), reverse=True)


def test_times_of_labels_are_those_of_their_three_patches(clap, extractor):
    """By hand: each 1.44 s have their own embedding and softmax."""
    tokenizer, labels, waveform = make_tokenizer("clap"), ["a dog", "rain"], noise(4.0, 8)
    waveform[: 2 * RATE] *= 0.01
    mel = extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_features"]
    texts = torch.from_numpy(clap.embed_captions(labels, tokenizer))
    with torch.no_grad():
        features = clap.audio_features(mel)[0, :9]
        probabilities = []
        for start in (0, 3, 6):
            own = features[start : start + 3]
            own = own[(own != 0).any(dim=-1)]
            embed = clap.audio_projection(torch.cat([own.mean(dim=0), own.amax(dim=0)])[None])
            cosines = torch.nn.functional.normalize(embed, dim=-1) @ texts.T
            probabilities.append((cosines / 0.07).softmax(dim=-1)[0])
    probabilities = torch.stack(probabilities).numpy()
    tagger, edges = Tagger(clap, extractor, tokenizer, labels), np.array([0.0, 1.44, 2.88, 4.0])
    [tags] = tagger.tag([waveform], threshold=0.0)
    assert {tag.name: tag.times for tag in tags} == {"a dog": [(0.0, 4.0)], "rain": [(0.0, 4.0)]}
    # Of the more probable label, all parts but the least probable one.
    own = probabilities[:, labels.index(tags[0].name)]
    threshold = float(np.sort(own)[:2].mean())
    kept = own >= threshold
    expected = [(edges[part], edges[part + 1]) for part in np.flatnonzero(kept)]
    if kept[1]:
        # The two that remain meet.
        expected = [(expected[0][0], expected[1][1])]
    [first, *_] = tagger.tag([waveform], threshold=threshold)[0]
    assert first.name == tags[0].name
    assert first.times == expected


def test_a_captioner_with_laions_clap_tags_labels_by_window(model_folder, clips):
    tagger = Tagger.from_pretrained(model_folder, labels=list(TINY_CAPTIONS))
    [tags] = tagger.tag([{"array": clips[2], "sampling_rate": 48_000}], threshold=0.0)
    assert sum(tag.probability for tag in tags) == pytest.approx(1.0, abs=1e-5)
    assert {tag.times[0] for tag in tags} == {(0.0, 24.3)}
    with pytest.raises(ValueError, match="no classification head: give labels"):
        Tagger.from_pretrained(model_folder)


def test_what_cannot_tag_is_refused(clap, extractor):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Tagger(clap, extractor, make_tokenizer("clap"), ["rain", "rain"])
    with pytest.raises(ValueError, match="needs its `tokenizer`"):
        Tagger(clap, extractor, None, ["rain", "dog"])
    with pytest.raises(ValueError, match=r"must hold \{\}"):
        Tagger(clap, extractor, make_tokenizer("clap"), ["rain", "dog"], "a sound")
    with pytest.raises(FileNotFoundError):
        Tagger(clap, extractor).tag(["/nowhere.wav"])


# --------------------------------------------------------------------- command


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main(["tag", *map(str, argv)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_the_command_writes_all_formats(capsys, clap, extractor, clap_folder, recordings, tmp_path):
    options = [recordings, "--model", clap_folder, "--threshold", 0.2, "--top", 2]
    [expected] = Tagger(clap, extractor).tag([recordings / "a.wav"], top=2, threshold=0.2)
    assert expected
    status, out, err = run(capsys, *options, "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert "1 of 3 recordings could not be tagged" in err
    assert [Path(row["file"]).name for row in rows] == ["a.wav", "b broken.wav", "c.wav"]
    found = [Tag(tag["name"], tag["probability"], list(map(tuple, tag["times"]))) for tag in rows[0]["tags"]]
    assert [(tag.name, tag.times) for tag in found] == [(tag.name, tag.times) for tag in expected]
    assert [tag.probability for tag in found] == pytest.approx([tag.probability for tag in expected], abs=1e-4)
    assert "error" in rows[1] and "tags" not in rows[1]
    assert rows[2]["tags"] == []
    assert json.loads(run(capsys, *options, "--format", "json")[1]) == rows
    run(capsys, *options, "--output", tmp_path / "tags.csv")
    table = list(csv.DictReader(io.StringIO((tmp_path / "tags.csv").read_text())))
    assert [row["tag"] for row in table] == [tag.name for tag in expected] + ["", ""]
    assert [float(row["probability"]) for row in table[:-2]] == [tag["probability"] for tag in rows[0]["tags"]]
    assert json.loads(table[0]["times"]) == [list(span) for span in expected[0].times]
    assert table[-2]["error"] == rows[1]["error"]
    status, out, _ = run(capsys, recordings / "a.wav", *options[1:])
    assert status == 0
    first, best = out.splitlines()[:2]
    assert first == str(recordings / "a.wav")
    assert best.startswith(f"    {expected[0].probability:.2f}  {expected[0].name}  (")


def test_the_command_takes_labels(capsys, clap_folder, recordings, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("a dog\n\n rain \na bell\n", encoding="utf-8")
    options = [recordings / "a.wav", "--model", clap_folder, "--labels", labels, "--threshold", 0, "--format", "jsonl"]
    status, out, _ = run(capsys, *options)
    assert status == 0
    tags = json.loads(out)["tags"]
    assert {tag["name"] for tag in tags} == {"a dog", "rain", "a bell"}
    assert sum(tag["probability"] for tag in tags) == pytest.approx(1.0, abs=1e-5)
    other = json.loads(run(capsys, *options, "--template", "no {} at all")[1])["tags"]
    assert [tag["probability"] for tag in other] != [tag["probability"] for tag in tags]


def test_every_class_of_the_default_has_categories():
    classes = set(json.loads((default_model_path() / "config.json").read_text())["clap"]["id2label"].values())
    audioset, ucs = tag_categories("audioset"), tag_categories("ucs")
    assert set(audioset) == classes >= set(ucs)
    # The seven roots of AudioSet's ontology.
    assert {entry["category"] for entry in audioset.values()} == {
        "Human sounds",
        "Animal",
        "Music",
        "Natural sounds",
        "Sounds of things",
        "Source-ambiguous sounds",
        "Channel, environment and background",
    }
    assert len(ucs) == 499
    assert ucs["Dog"] == {"category": "ANIMALS-DOG", "catid": "ANMLDog"}
    assert ucs["Rain"] == {"category": "RAIN-GENERAL", "catid": "RAIN"}
    assert "Echo" not in ucs
    # A name stands for one category, and a category begins with the letters of its group.
    assert len({entry["catid"] for entry in ucs.values()}) == len({entry["category"] for entry in ucs.values()})
    assert all(re.fullmatch("[A-Z]+([A-Z][a-z]+)?", entry["catid"]) for entry in ucs.values())
    with pytest.raises(ValueError, match="must be one of audioset, ucs"):
        tag_categories("dewey")


def test_the_command_adds_categories(capsys, tmp_path):
    clip = examples_path() / "rain.flac"
    status, out, _ = run(capsys, clip, "--categories", "ucs")
    assert status == 0
    assert "Rain  [RAIN-GENERAL RAIN]  (" in out
    run(capsys, clip, "--categories", "audioset", "--output", tmp_path / "tags.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tags.csv").read_text())))
    assert ("Rain", "Natural sounds", "") in {(row["tag"], row["category"], row["catid"]) for row in rows}
    assert "category" not in json.loads(run(capsys, clip, "--format", "jsonl")[1])["tags"][0]


def test_wrong_calls_are_told(capsys, clap, extractor, clap_folder, model_folder, recordings, tmp_path):
    clip = recordings / "a.wav"
    clap.save_pretrained(tmp_path / "no tokenizer")
    extractor.save_pretrained(tmp_path / "no tokenizer")
    for wrong, message in (
        (["--template", "a {}"], "give --labels FILE"),
        (["--labels", clip, "--categories", "ucs"], "those of the model's classes"),
        (["--labels", "/nowhere.txt"], "no such file"),
        (["--labels", clip, "--template", "a"], "must hold {}"),
        (["--output", "tags.srt"], "no format has the suffix .srt"),
    ):
        status, _, err = run(capsys, clip, "--model", clap_folder, *wrong)
        assert (status, message in err) == (2, True), err
    status, _, err = run(capsys, clip, "--model", model_folder)
    assert status == 1
    assert "no classification head: give labels (--labels FILE)" in err
    (tmp_path / "labels.txt").write_text("a dog\nrain\n", encoding="utf-8")
    status, _, err = run(capsys, clip, "--model", tmp_path / "no tokenizer", "--labels", tmp_path / "labels.txt")
    assert status == 1
    assert "no tokenizer, so that it cannot embed captions" in err
    with pytest.raises(SystemExit):
        run(capsys, clip, "--threshold", 2)
