"""`recap live`: nothing is lost, whatever the pipe brings and however slow the model is."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
from conftest import synthetic_clip

from recap_cli import live as command
from recap_cli import main
from recap_hf import Captioner, CaptionOptions, CaptionResult
from recap_hf.audio.live import LiveCaptioner, LiveSound
from recap_hf.audio.pcm import SAMPLE_FORMATS, PcmFormat, pcm_blocks

RATE = 48_000


class Pipe(io.RawIOBase):
    """A file that gives little at a time and cannot seek."""

    def __init__(self, data, portion=997):
        self.data, self.portion = data, portion

    def readable(self):
        return True

    def readinto(self, buffer):
        part = self.data[: min(self.portion, len(buffer))]
        self.data = self.data[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def read(data, raw=None):
    blocks = list(pcm_blocks(Pipe(data), raw))
    assert len({rate for _, rate in blocks}) <= 1
    return np.concatenate([block for block, _ in blocks]), blocks[0][1]


@pytest.mark.parametrize(
    ("name", "subtype", "endian"),
    [
        ("u8", "PCM_U8", "LITTLE"),
        ("s16le", "PCM_16", "LITTLE"),
        ("s16be", "PCM_16", "BIG"),
        ("s24le", "PCM_24", "LITTLE"),
        ("s32le", "PCM_32", "LITTLE"),
        ("f32le", "FLOAT", "LITTLE"),
        ("f64le", "DOUBLE", "LITTLE"),
    ],
)
def test_raw_samples_as_libsndfile_writes_them(name, subtype, endian):
    stereo = np.stack([synthetic_clip(0.5, 1), synthetic_clip(0.5, 2)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, stereo, 44_100, format="RAW", subtype=subtype, endian=endian)
    samples, rate = read(file.getvalue() + b"\x01", PcmFormat(44_100, 2, name))
    file.seek(0)
    options = {"samplerate": 44_100, "channels": 2, "format": "RAW", "subtype": subtype, "endian": endian}
    expected = soundfile.read(file, dtype="float32", **options)[0].mean(axis=1)
    assert rate == 44_100
    np.testing.assert_allclose(samples, expected, atol=1e-6)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_wav_without_seeking(subtype, container):
    clip = np.stack([synthetic_clip(0.4, 1)] * 3, axis=1)
    file = io.BytesIO()
    soundfile.write(file, clip, 16_000, format=container, subtype=subtype)
    data = file.getvalue()
    samples, rate = read(data)
    file.seek(0)
    np.testing.assert_allclose(samples, soundfile.read(file, dtype="float32")[0].mean(axis=1), atol=1e-6)
    assert rate == 16_000
    # What programs write that cannot go back to the header: an unknown length.
    place = data.index(b"data") + 4
    for unknown in (b"\xff\xff\xff\xff", b"\0\0\0\0"):
        np.testing.assert_array_equal(read(data[:place] + unknown + data[place + 4 :])[0], samples)


def test_what_is_no_sound_is_named():
    with pytest.raises(ValueError, match=r"not WAV.*name the format with --rate"):
        read(b"hello, this is a text")
    with pytest.raises(ValueError, match="ends before its samples"):
        read(b"RIFF\0\0\0\0WAVE")
    file = io.BytesIO()
    soundfile.write(file, np.zeros(4000), 8_000, format="WAV", subtype="ULAW")
    with pytest.raises(ValueError, match="got format 7 with 8 bits"):
        read(file.getvalue())
    with pytest.raises(ValueError, match=r"Expected a sample format .* got 'u9'"):
        PcmFormat(48_000, 1, "u9")
    assert set(command.SAMPLE_FORMATS) == set(SAMPLE_FORMATS)


# ------------------------------------------------------------------ captioning


@pytest.fixture
def captioner(tiny_model, tiny_processor):
    return Captioner(tiny_model, tiny_processor, options=CaptionOptions(max_new_tokens=4, num_beams=1))


class Listener:
    """A captioner that keeps what it is given and takes a known time: for tests of the buffer."""

    def __init__(self, captioner, seconds=0.0):
        self.processor, self.sampling_rate, self.seconds = captioner.processor, captioner.sampling_rate, seconds
        self.heard = []

    def caption(self, waveforms):
        time.sleep(self.seconds)
        self.heard += waveforms
        return [CaptionResult("a sound", 0.5, []) for _ in waveforms]


def portions(waveform, seconds=0.1):
    step = round(seconds * RATE)
    return [(waveform[start : start + step], RATE) for start in range(0, len(waveform), step)]


def run(captioner, blocks, buffer_s=600.0, **options):
    sound = LiveSound(blocks, buffer_s).start()
    segments = list(LiveCaptioner(captioner, **options).run(sound))
    assert [segment["start"] for segment in segments] == [0.0, *(segment["end"] for segment in segments[:-1])]
    return segments, sound


def paced(waveform, interval, listener):
    """Blocks that come only when what came before has been captioned: a model that is fast enough."""
    for index, block in enumerate(portions(waveform, interval)):
        while len(listener.heard) < index:
            time.sleep(0.001)
        yield block


def test_a_caption_for_every_interval(captioner):
    waveform, listener = synthetic_clip(7.3, 1), Listener(captioner)
    segments, _ = run(listener, paced(waveform, 2.0, listener), interval_s=2.0)
    assert [(s["start"], s["end"]) for s in segments] == [(0, 2), (2, 4), (4, 6), (6, 7.3)]
    np.testing.assert_array_equal(np.concatenate(listener.heard), waveform)
    assert all(0 <= segment["delay"] < 5 for segment in segments)


def test_a_fast_pipe_loses_nothing_and_is_captioned_in_longer_pieces(captioner):
    waveform = np.concatenate([synthetic_clip(10.0, seed) for seed in range(6)])[: round(57.7 * RATE)]
    listener = Listener(captioner, seconds=0.02)
    segments, sound = run(listener, portions(waveform), interval_s=2.0)
    np.testing.assert_array_equal(np.concatenate(listener.heard), waveform)
    assert segments[-1]["end"] == 57.7
    assert len(segments) < 28
    assert max(segment["end"] - segment["start"] for segment in segments) <= 10.1
    assert not sound.paused


def test_a_slow_model_makes_the_pipe_wait(captioner):
    waveform = np.concatenate([synthetic_clip(10.0, seed) for seed in range(3)])
    listener = Listener(captioner, seconds=0.1)
    segments, sound = run(listener, portions(waveform), buffer_s=4.0, interval_s=2.0, batch_size=1)
    np.testing.assert_array_equal(np.concatenate(listener.heard), waveform)
    assert segments[-1]["end"] == 30.0
    assert sound.paused


def test_captions_are_those_of_the_captioner_and_silence_is_named(captioner):
    quiet = np.zeros(2 * RATE, np.float32)
    first, second = synthetic_clip(2.0, 1), synthetic_clip(1.0, 2)
    released = threading.Event()

    def blocks():
        for index, block in enumerate((first, quiet, second)):
            if index:
                # Not before the block before it is captioned.
                assert released.wait(60)
                released.clear()
            yield block, RATE

    sound, segments = LiveSound(blocks()).start(), []
    for segment in LiveCaptioner(captioner, interval_s=2.0).run(sound):
        segments.append(segment)
        released.set()
    expected = [captioner.caption([first])[0], captioner.caption([second])[0]]
    assert [segment["caption"] for segment in segments] == [expected[0].caption, "silence", expected[1].caption]
    assert segments[0]["retrieved"] == expected[0].retrieved
    assert set(segments[0]) == {"start", "end", "caption", "score", "retrieved", "delay"}
    assert (segments[2]["start"], segments[2]["end"]) == (4.0, 5.0)


def test_other_rates_are_resampled(captioner):
    from recap_hf.modeling.audio_recap import resample

    waveform, listener = synthetic_clip(3.0, 1)[::3].copy(), Listener(captioner)
    run(listener, [(waveform[start : start + 999], 16_000) for start in range(0, len(waveform), 999)])
    expected = resample(waveform, 16_000, RATE)
    np.testing.assert_allclose(np.concatenate(listener.heard), expected, atol=1e-6)


def test_an_error_of_the_source_comes_after_what_it_gave(captioner):
    def blocks():
        yield synthetic_clip(3.0, 1), RATE
        raise ValueError("the cable was pulled")

    sound, segments = LiveSound(blocks()).start(), []
    with pytest.raises(ValueError, match="the cable was pulled"):
        for segment in LiveCaptioner(Listener(captioner), interval_s=2.0).run(sound):
            segments.append(segment)
    assert segments[-1]["end"] == 3.0


def test_stopping_captions_what_came_in(captioner):
    arrived = threading.Event()

    def endless():
        yield synthetic_clip(3.0, 1), RATE
        arrived.set()
        threading.Event().wait(60)

    sound = LiveSound(endless()).start()
    arrived.wait(10)
    sound.stop()
    segments = list(LiveCaptioner(Listener(captioner), interval_s=2.0).run(sound))
    assert segments[-1]["end"] == 3.0


@pytest.mark.parametrize("interval", [0.0, -1.0, 10.5])
def test_intervals_that_cannot_be(captioner, interval):
    with pytest.raises(ValueError, match="The interval must be above"):
        LiveCaptioner(captioner, interval_s=interval)


# ------------------------------------------------------------------ the command


def start(*options, **streams):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command_line = [sys.executable, "-m", "recap_cli", "live", *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command_line, env=environment, **pipes)


def test_what_is_wrong_is_said_before_the_model_is_loaded(capsys):
    _, errors = start("--model", "no/such").communicate(b"hello, this is a text", timeout=300)
    assert b"recap live: error: The sound is not WAV." in errors and b"name the format with --rate" in errors
    assert main(["live", "--model", "no/such", "nowhere.fifo"]) == 1
    assert "No such file or directory: 'nowhere.fifo'" in capsys.readouterr().err
    assert main(["live", "--microphone", "--rate", "48000", "pipe"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pipe_to_its_end():
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([synthetic_clip(10.0, 1), synthetic_clip(4.5, 2)]), RATE, format="WAV")
    process = start("--format", "jsonl", "--interval", "3")
    output, errors = process.communicate(file.getvalue(), timeout=600)
    segments = [json.loads(line) for line in output.splitlines()]
    assert process.returncode == 0, errors
    assert [segment["start"] for segment in segments] == [0.0, *(segment["end"] for segment in segments[:-1])]
    assert segments[-1]["end"] == 14.5
    assert b"14.5 s captioned" in errors


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_with_what_came_in():
    process = start("--rate", "48000", "--interval", "2")
    samples = (synthetic_clip(5.0, 1) * 32767).astype("<i2").tobytes()
    process.stdin.write(samples)
    process.stdin.flush()
    # A caption is out while the pipe is open: lines are flushed.
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(300) == 0
    assert b"5.0 s captioned" in process.stderr.read()
    # All but what the resampling to the model's rate was holding back.
    *_, last = re.findall(rb"--> 00:00:(\d\d\.\d+)\]", first + rest)
    assert 4.98 <= float(last) <= 5.0
