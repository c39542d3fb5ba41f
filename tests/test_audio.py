"""Reading recordings: formats, channels, rates, and every way in which a file can be broken."""

from __future__ import annotations

import io
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
from conftest import synthetic_clip

from recap_hf import load_audio
from recap_hf.audio import containers
from recap_hf.modeling.audio_recap import is_silent, resample, to_mono

CLIP = synthetic_clip(1.5, 1)
FORMATS = {
    "wav": ("WAV", "PCM_16", 1e-4),
    "wav24": ("WAV", "PCM_24", 1e-6),
    "flac": ("FLAC", "PCM_16", 1e-4),
    "ogg": ("OGG", "VORBIS", 0.2),
    "opus": ("OGG", "OPUS", 0.2),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.3),
    "aiff": ("AIFF", "PCM_16", 1e-4),
}


def encode(name, audio=CLIP, rate=48_000):
    container, subtype, _ = FORMATS[name]
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    data = encode(name)
    (tmp_path / f"clip.{name}").write_bytes(data)
    waveform, rate = load_audio(tmp_path / f"clip.{name}")
    assert rate == 48_000
    assert waveform.dtype == np.float32
    assert waveform.shape[0] == 1
    length = min(len(CLIP), waveform.shape[1])
    assert abs(waveform.shape[1] - len(CLIP)) < 3_000
    # Lossy formats shift and blur: the energy is what must be there.
    energy = np.sqrt((waveform[0, :length] ** 2).mean()) / np.sqrt((CLIP[:length] ** 2).mean())
    assert energy == pytest.approx(1.0, abs=FORMATS[name][2])
    np.testing.assert_array_equal(load_audio(data)[0], waveform)


def test_channels_and_rates():
    stereo = np.stack([CLIP, -0.5 * CLIP], axis=1)
    waveform, rate = load_audio(encode("flac", stereo, 192_000))
    assert (waveform.shape[0], rate) == (2, 192_000)
    np.testing.assert_allclose(to_mono(waveform), 0.25 * CLIP, atol=1e-4)


def test_datasets_values():
    data = encode("wav")
    assert load_audio({"bytes": data, "path": None})[1] == 48_000
    waveform, rate = load_audio({"array": CLIP, "sampling_rate": 16_000})
    assert rate == 16_000
    np.testing.assert_array_equal(waveform[0], CLIP)
    with pytest.raises(ValueError, match="needs its 'sampling_rate'"):
        load_audio({"array": CLIP})
    with pytest.raises(ValueError, match=r"keys \['text'\]"):
        load_audio({"text": 1})


def test_a_torchcodec_decoder():
    class Samples:
        data, sample_rate = np.stack([CLIP, CLIP]), 22_050

    class Decoder:
        def get_all_samples(self):
            return Samples

    waveform, rate = load_audio(Decoder())
    assert waveform.shape == (2, len(CLIP))
    assert rate == 22_050


def test_a_url(tmp_path):
    (tmp_path / "clip.flac").write_bytes(encode("flac"))

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/clip.flac"
        np.testing.assert_array_equal(load_audio(url)[0], load_audio(tmp_path / "clip.flac")[0])
        with pytest.raises(OSError, match="404"):
            load_audio(f"http://127.0.0.1:{server.server_port}/none.flac")
    finally:
        server.shutdown()
        server.server_close()


def broken_rate(rate):
    data = bytearray(encode("wav"))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


def not_a_number():
    buffer = io.BytesIO()
    audio = CLIP.copy()
    audio[7] = np.nan
    soundfile.write(buffer, audio, 48_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "the file is empty"),
    "header only": (encode("wav")[:44], "truncated"),
    "half a wav": (encode("wav")[: len(CLIP)], "truncated"),
    "half a flac": (encode("flac")[: len(encode("flac")) // 2], "not a recording that can be read"),
    "half an ogg": (encode("ogg")[: len(encode("ogg")) // 2], "truncated"),
    "half an mp3": (encode("mp3")[: len(encode("mp3")) // 2], "truncated"),
    "half an aiff": (encode("aiff")[: len(CLIP)], "truncated"),
    "text": (b"this is no recording, whatever its name says\n", "not a recording that can be read"),
    "no samples": (encode("wav", CLIP[:0]), "no samples"),
    "nan": (not_a_number(), "NaN or infinite"),
    "one hertz": (broken_rate(1), "a sampling rate of 1 Hz is not possible"),
    "gigahertz": (broken_rate(2_000_000_000), "a sampling rate of|not a recording that can be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_a_reason(name, tmp_path):
    data, message = BROKEN[name]
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_audio(path)
    assert str(path) in str(caught.value)


def test_a_streamed_wav_of_unknown_length_is_read():
    # `ffmpeg -i ... -f wav -` cannot know the length when it writes the header.
    data = bytearray(encode("wav"))
    position = data.index(b"data") + 4
    data[4:8] = data[position : position + 4] = b"\xff\xff\xff\xff"
    assert load_audio(bytes(data))[0].shape[1] == len(CLIP)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_audio(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        load_audio(3)


@pytest.mark.parametrize(
    ("head", "named"), [(b"\0\0\0\x20ftypM4A ", "m4a"), (b"\x1a\x45\xdf\xa3", "webm"), (b"\xff\xf1\x50\x80", "AAC")]
)
def test_a_format_that_needs_an_extra_names_it(head, named, monkeypatch):
    monkeypatch.setattr(containers, "av", None)
    with pytest.raises(ImportError, match=named) as caught:
        load_audio(head + bytes(200))
    assert 'pip install "recap-hf[av]"' in str(caught.value)


def test_m4a_and_video_with_pyav(tmp_path):
    av = pytest.importorskip("av", reason='needs pip install "recap-hf[av]"')
    path = tmp_path / "clip.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        for start in range(0, len(CLIP), 1024):
            block = CLIP[start : start + 1024][None]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="mono")
            frame.sample_rate = 48_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    waveform, rate = load_audio(path)
    assert rate == 48_000
    assert abs(waveform.shape[1] - len(CLIP)) < 4_096
    assert np.sqrt((waveform**2).mean()) == pytest.approx(np.sqrt((CLIP**2).mean()), rel=0.1)


def test_resampling_keeps_a_tone():
    time = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 1_000 * time).astype(np.float32)
    resampled = resample(tone, 44_100, 48_000)
    assert len(resampled) == 48_000
    expected = np.sin(2 * np.pi * 1_000 * np.arange(48_000) / 48_000)
    np.testing.assert_allclose(resampled[2_000:-2_000], expected[2_000:-2_000], atol=1e-3)
    assert resample(np.ones(1, np.float32), 192_000, 48_000).size == 1


def test_silence():
    assert is_silent(np.zeros(10, np.float32))
    assert is_silent(np.full(10, 2.0**-15, np.float32))
    assert not is_silent(np.full(10, 2.0**-14, np.float32))
