"""`pipe(..., return_timestamps=True)`: every input, batches, parameters, and the timeline that comes of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import soundfile
from conftest import same_results, synthetic_clip

from recap_hf import AudioCaptioningPipeline, Captioner, CaptionOptions, TimelineSummary, caption_timeline


@pytest.fixture
def captioner(tiny_model, tiny_processor):
    return AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, max_new_tokens=6, num_beams=1)


@pytest.fixture(scope="module")
def recording():
    """3 s of sound, 2 s of silence, 5 s of another sound."""
    silence = np.zeros(2 * 48_000, np.float32)
    return np.concatenate([synthetic_clip(3.0, 1), silence, synthetic_clip(5.0, 2)])


def test_a_timeline_is_plain_python_without_gaps(captioner, recording):
    result = captioner(recording, return_timestamps=True)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"caption", "score", "retrieved", "duration", "sounds", "segments"}
    assert result["duration"] == 10.0
    segments = result["segments"]
    assert (segments[0]["start"], segments[-1]["end"]) == (0.0, 10.0)
    for before, after in itertools.pairwise(segments):
        assert before["end"] == after["start"]
    assert all(set(segment) == {"start", "end", "caption", "score", "retrieved"} for segment in segments)
    silent = [segment for segment in segments if segment["caption"] == "silence"]
    assert silent == [{"start": 3.0, "end": 5.0, "caption": "silence", "score": 1.0, "retrieved": []}]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_sound_of_80_ms_is_no_silence_if_it_is_all_there_is(captioner, batch_size):
    short = synthetic_clip(0.08, 1)
    result = captioner(short, return_timestamps=True, batch_size=batch_size)
    assert [segment["caption"] for segment in result["segments"]] == [captioner(short)["caption"]]
    assert result["segments"][0]["retrieved"]
    pause = np.zeros(5 * 48_000, np.float32)
    among = captioner(np.concatenate([pause, short, pause]), return_timestamps=True, batch_size=batch_size)
    assert [segment["caption"] for segment in among["segments"]] == ["silence"]


def test_every_kind_of_input_and_several_at_once(captioner, recording, tmp_path):
    path = tmp_path / "recording.wav"
    soundfile.write(path, recording, 48_000, subtype="FLOAT")
    expected = captioner(recording, return_timestamps=True)
    sources = [str(path), path, path.read_bytes(), {"array": recording, "sampling_rate": 48_000}]
    for source in (*sources, {"audio": {"path": str(path), "bytes": None}}):
        assert same_results([captioner(source, return_timestamps=True)], [expected])
    for batch_size in (1, 4):
        results = captioner([str(path), recording], return_timestamps=True, batch_size=batch_size)
        assert same_results(results, [expected, expected])
    assert same_results(list(captioner((s for s in [str(path)]), return_timestamps=True)), [expected])


def test_settings_and_parameters(captioner, recording):
    whole = captioner(recording, return_timestamps=True, timeline={"novelty": 2.0, "silence_db": -120.0}, k=2)
    assert [(s["start"], s["end"]) for s in whole["segments"]] == [(0.0, 10.0)]
    assert len(whole["segments"][0]["retrieved"]) == 2
    assert whole["segments"][0]["caption"] == captioner(recording, k=2)["caption"]
    with pytest.raises(TypeError, match="novelties"):
        captioner(recording, return_timestamps=True, timeline={"novelties": 1.0})
    with pytest.raises(ValueError, match="`novelty` must lie between 0 and 2"):
        captioner(recording, return_timestamps=True, timeline={"novelty": 0})
    assert set(captioner(recording)) == {"caption", "score", "retrieved"}


def test_a_recording_that_cannot_be_read_is_skipped(captioner, recording, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    names = [str(tmp_path / "broken.wav"), recording]
    broken, whole = captioner(names, return_timestamps=True, on_error="skip")
    assert set(broken) == {"error"} and "not a recording" in broken["error"]
    assert same_results([whole], [captioner(recording, return_timestamps=True)])
    with pytest.raises(ValueError, match="not a recording"):
        captioner(names, return_timestamps=True)


def test_the_summary_merges_as_the_segments_do(captioner, recording):
    result = captioner(recording, return_timestamps=True, timeline={"same_caption": -1.0})
    assert len([sound for sound in result["sounds"] if sound["caption"] != "silence"]) == 1


def test_caption_timeline_equals_the_pipeline(captioner, recording):
    summary, options = TimelineSummary(), CaptionOptions(max_new_tokens=6, num_beams=1)
    own = Captioner(captioner.model, captioner.processor, options=options)
    segments = list(caption_timeline(own, recording, summary=summary))
    assert same_results([{**summary.result(), "segments": segments}], [captioner(recording, return_timestamps=True)])
