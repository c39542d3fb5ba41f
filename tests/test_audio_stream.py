"""Recordings read block by block: the same samples as at once, whatever the block, rate, channels and format."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from conftest import synthetic_clip
from test_audio import FORMATS, encode, m4a

from recap_hf import AudioStream, load_audio
from recap_hf.modeling.audio_recap import resample, to_mono

CLIP = synthetic_clip(3.0, 1)


def joined(source, block_s=5.0, rate=48_000):
    return np.concatenate(list(AudioStream(source, rate, block_s)))


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_same_samples_as_at_once(rate, channels, tmp_path):
    path = tmp_path / "clip.flac"
    rng = np.random.default_rng(channels)
    soundfile.write(path, rng.uniform(-0.5, 0.5, (2 * rate + 17, channels)), rate)
    waveform, source_rate = load_audio(path)
    expected = resample(to_mono(waveform), source_rate, 48_000)
    for block_s in (0.011, 0.37, 60.0):
        np.testing.assert_array_equal(joined(path, block_s), joined(path, 1.0))
    np.testing.assert_allclose(joined(path, 0.37), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [("WAV", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")])
def test_formats(kind, tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, CLIP, 48_000, format=kind[0], subtype=kind[1])
    whole = to_mono(load_audio(buffer.getvalue())[0])
    np.testing.assert_allclose(joined(buffer.getvalue(), 0.25), whole, atol=1e-6)
    np.testing.assert_array_equal(joined(buffer.getvalue(), 0.25), joined(buffer.getvalue(), 5.0))


def test_sound_tracks_of_videos_and_m4a(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    for name, codec in (("clip.m4a", "aac"), ("clip.webm", "libopus"), ("film.mp4", "aac")):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            audio = container.add_stream(codec, rate=48_000, layout="stereo")
            if name == "film.mp4":
                video = container.add_stream("mpeg4", rate=5)
                video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
                for _ in range(10):
                    for packet in video.encode(av.VideoFrame(32, 32, "yuv420p")):
                        container.mux(packet)
            samples = np.ascontiguousarray(np.repeat((CLIP * 32767).astype(np.int16)[:, None], 2, 1).reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            frame.sample_rate = 48_000
            for packet in [*audio.encode(frame), *audio.encode(None)]:
                container.mux(packet)
        waveform, rate = load_audio(path)
        np.testing.assert_array_equal(joined(path), resample(to_mono(waveform), rate, 48_000))


def test_arrays_and_values_of_datasets():
    narrow = CLIP[::3].copy()
    np.testing.assert_array_equal(joined(CLIP, 0.1), CLIP)
    np.testing.assert_array_equal(joined(np.stack([CLIP, CLIP]), 0.1), CLIP)
    value = {"array": narrow, "sampling_rate": 16_000}
    np.testing.assert_allclose(joined(value, 0.1), resample(narrow, 16_000, 48_000), atol=1e-6)
    np.testing.assert_array_equal(joined({"audio": value}), joined(value))
    with pytest.raises(ValueError, match="needs 'array' and 'sampling_rate', or 'bytes', or 'path'"):
        joined({"audio": {"array": None, "path": None}})


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.wav: no such file"):
        joined(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("this is no recording, and nobody will take it for one")
    with pytest.raises(ValueError, match=r"text\.wav: not a recording"):
        joined(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 48_000)
    with pytest.raises(ValueError, match=r"empty\.wav: the recording is empty"):
        joined(tmp_path / "empty.wav")
    with pytest.raises(ValueError, match="NaN or infinite"):
        joined(np.full(100, np.nan, np.float32))
    with pytest.raises(ValueError, match="`block_s` must be a positive"):
        AudioStream("clip.wav", block_s=0)


@pytest.mark.filterwarnings("ignore:.*cut off or damaged")
@pytest.mark.parametrize("name", [*FORMATS, "mp4", "matroska", "adts"])
def test_the_same_files_can_be_read_at_once_and_in_blocks(name):
    data = encode(name) if name in FORMATS else m4a(container=name)

    def seconds(read):
        try:
            return read()
        except ValueError:
            return None

    for share in (1.0, 0.99, 0.9, 0.5, 0.3, 0.02):
        cut = data[: int(share * len(data))]
        whole = seconds(lambda: load_audio(cut)[0].shape[1])  # noqa: B023
        assert whole == seconds(lambda: len(joined(cut, 0.2))), share  # noqa: B023
        assert whole is not None or share < 0.9 or name == "mp4"


def test_a_truncated_file_gives_what_it_holds_and_says_so(tmp_path):
    soundfile.write(tmp_path / "whole.wav", CLIP, 48_000)
    data = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"cut\.wav: cut off or damaged \(the file ends early\): 1\.5 s"):
        blocks = list(AudioStream(tmp_path / "cut.wav", block_s=0.5))
    assert sum(map(len, blocks)) / 48_000 == pytest.approx(1.5, abs=0.01)
