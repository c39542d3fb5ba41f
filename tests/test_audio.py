"""Reading recordings: formats, channels, rates, and every way in which a file can be broken."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import synthetic_clip

from recap_hf import load_audio
from recap_hf.audio import containers, reading
from recap_hf.audio.stream import AudioStream
from recap_hf.modeling.audio_recap import Mixer, is_silent, resample, to_mono

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


@pytest.fixture
def server(tmp_path):
    """A server of the folder; its address, and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_urls(server, tmp_path, monkeypatch):
    address, _ = server
    (tmp_path / "a clip.flac").write_bytes(encode("flac"))
    expected = load_audio(tmp_path / "a clip.flac")[0]
    for url in (f"{address}/a clip.flac", f"{address}/a%20clip.flac", f"file://{tmp_path}/a%20clip.flac"):
        np.testing.assert_array_equal(load_audio(url)[0], expected)
    with pytest.raises(OSError, match="404"):
        load_audio(f"{address}/none.flac")
    with pytest.raises(FileNotFoundError, match="read from http, https and file URLs"):
        load_audio("s3://bucket/clip.flac")
    monkeypatch.setattr(reading, "_MAX_DOWNLOAD", 1_000)
    with pytest.raises(ValueError, match=r"a clip\.flac: 0 MiB came and no end"):
        load_audio(f"{address}/a clip.flac")


def test_pipes_and_devices(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(encode("flac"),), daemon=True).start()
    np.testing.assert_array_equal(load_audio(tmp_path / "pipe")[0], load_audio(encode("flac"))[0])
    monkeypatch.setattr(reading, "_MAX_DOWNLOAD", 1 << 20)
    with pytest.raises(ValueError, match="/dev/zero: 2 MiB came and no end"):
        load_audio("/dev/zero")
    with open("/dev/zero", "rb") as stream, pytest.raises(ValueError, match="/dev/zero: 2 MiB came and no end"):
        load_audio(stream)


def broken_rate(rate):
    data = bytearray(encode("wav"))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


@pytest.mark.parametrize(("rate", "minutes"), [(8_000, 3), (48_000, 3), (96_000, 1.5)])
def test_a_small_file_of_many_hours_is_refused(rate, minutes, tmp_path, monkeypatch):
    """Five minutes where three at 48 kHz are the limit: more of them would fill the memory."""
    monkeypatch.setattr(reading.read_blocks, "__defaults__", (1 << 20, 48_000 * 180))
    soundfile.write(tmp_path / "long.flac", np.zeros(300 * rate, np.float32), rate)
    assert (tmp_path / "long.flac").stat().st_size < 300_000
    with pytest.raises(ValueError, match=rf"long\.flac: longer than {minutes} minutes: .* recap timeline"):
        load_audio(tmp_path / "long.flac")
    assert sum(map(len, AudioStream(tmp_path / "long.flac", rate))) == 300 * rate
    soundfile.write(tmp_path / "short.flac", np.zeros(int(60 * minutes * rate) - 1, np.float32), rate)
    assert load_audio(tmp_path / "short.flac")[0].shape[1] == 60 * minutes * rate - 1


def floats(audio):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.astype(np.float32), 48_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "the file is empty"),
    "header only": (encode("wav")[:44], "no samples"),
    "text": (b"this is no recording, whatever its name says\n", "not a recording that can be read"),
    "no samples": (encode("wav", CLIP[:0]), "no samples"),
    "nan": (floats(np.where(np.arange(len(CLIP)) == 7, np.nan, CLIP)), "NaN or infinite"),
    "16 bits as floats": (floats(CLIP * 32_768), "has samples up to .*; expected floats from -1 to 1"),
    "huge": (floats(np.stack([CLIP, CLIP], axis=1) * 3e38), "has samples up to"),
    "one hertz": (broken_rate(1), "a sampling rate of 1 Hz is not possible"),
    "gigahertz": (broken_rate(2_000_000_000), "a sampling rate of|not a recording that can be read"),
    "unknown codec": (encode("wav")[:20] + b"\xcd\xab" + encode("wav")[22:], "codec|not a recording"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_a_reason(name, tmp_path):
    data, message = BROKEN[name]
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_audio(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_file_gives_what_is_there_with_a_warning(name, share, tmp_path):
    audio = np.concatenate([CLIP] * 3)
    data, path = encode(name, audio), tmp_path / f"cut.{name}"
    path.write_bytes(data[: int(share * len(data))])
    whole = load_audio(data)[0]
    with pytest.warns(UserWarning, match=rf"cut\.{name}: cut off or damaged .*: \d\.\d s could be read"):
        waveform = load_audio(path)[0]
    # Bytes are spread evenly over time, but for the rate of lossy formats; the last page of Ogg may hold a second.
    assert share - 0.25 < waveform.shape[1] / len(audio) < share + 0.1
    length = waveform.shape[1] - 3_000
    np.testing.assert_allclose(waveform[:, :length], whole[:, :length], atol=1e-3)


@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_a_wav_of_unknown_length_is_read(size):
    # A recorder that crashed leaves 0; `ffmpeg -i ... -f wav -` cannot know the length and writes all ones.
    data = bytearray(encode("wav"))
    position = data.index(b"data") + 4
    data[4:8] = data[position : position + 4] = size
    np.testing.assert_array_equal(load_audio(bytes(data))[0], load_audio(encode("wav"))[0])


def test_a_wav_with_a_long_chunk_before_its_samples():
    data = encode("wav")
    chunk = b"LIST" + struct.pack("<I", 100_000) + b"INFO" + bytes(99_996)
    longer = data[:4] + struct.pack("<I", len(data) - 8 + len(chunk)) + data[8:12] + chunk + data[12:]
    np.testing.assert_array_equal(load_audio(longer)[0], load_audio(data)[0])


@pytest.mark.parametrize("garbage", [b"\xff" * 400_000, b"ID3\x04\0\0\0\0\0\0" * 40_000, b"\xff\xfb" * 200_000])
@pytest.mark.filterwarnings("ignore:.*cut off or damaged")
def test_garbage_in_an_mp3_takes_no_long_time(garbage):
    data = encode("mp3")
    data = data[144_000 * 64 // 48_000 :]
    start = time.monotonic()
    for broken in (garbage + data, data[:3_000] + garbage + data[3_000:], data + garbage):
        with contextlib.suppress(ValueError):
            load_audio(broken)
    assert time.monotonic() - start < 3


def test_an_ogg_without_end_mark_is_read():
    data = bytearray(encode("ogg"))
    page = data.rfind(b"OggS")
    data[page + 5] &= ~4
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = struct.pack("<I", ogg_checksum(data[page:]))
    with pytest.warns(UserWarning, match="the file ends early"):
        np.testing.assert_array_equal(load_audio(bytes(data))[0], load_audio(encode("ogg"))[0])


def ogg_checksum(page):
    """CRC-32 of an Ogg page (RFC 3533): polynomial 0x04c11db7, neither reflected nor inverted."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


@pytest.mark.parametrize("loud_first", [True, False])
@pytest.mark.parametrize("tags", [b"", b"ID3\x04\0\0\0\0\x02\x01" + bytes(257)])
def test_mp3_of_varying_bit_rate_without_a_xing_header(loud_first, tags):
    noise = np.random.default_rng(0).normal(0, 0.2, 3 * 44_100)
    audio = np.concatenate([noise, np.zeros(20 * 44_100)])
    audio = audio if loud_first else audio[::-1]
    buffer = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(buffer, audio, 44_100, **options)
    data = buffer.getvalue()
    assert b"Xing" in data[:200] or b"Info" in data[:200]
    # 144 * bits per second / sampling rate, and a byte of padding: the first frame holds the header alone.
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[2] >> 4]
    bare = tags + data[144_000 * kbps // 44_100 + (data[2] >> 1 & 1) :]
    waveform = load_audio(bare)[0][0]
    # Without the header the delay of encoder and decoder, 1,105 samples, is not cut off.
    assert 0 <= len(waveform) - len(audio) < 3_000
    loud = np.abs(waveform.reshape(-1)[: len(audio)].reshape(-1, 4_410)).max(axis=1) > 0.05
    assert loud.sum() == pytest.approx(30, abs=2)
    assert loud[:29].all() if loud_first else loud[-29:].all()


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


def m4a(layout="mono", channels=1, options=None, container="mp4"):
    av = pytest.importorskip("av", reason='needs pip install "recap-hf[av]"')
    path = tempfile.mktemp(suffix=f".{container}")
    with av.open(path, "w", format=container, options=options or {}) as file:
        stream = file.add_stream("aac", rate=48_000, layout=layout)
        for start in range(0, len(CLIP), 1024):
            block = np.repeat(CLIP[start : start + 1024], channels)[None]
            frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
            frame.sample_rate = 48_000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    data = Path(path).read_bytes()
    Path(path).unlink()
    return data


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("7.1", 8)])
def test_m4a_with_pyav(layout, channels, server, tmp_path):
    (tmp_path / "clip.m4a").write_bytes(m4a(layout, channels))
    for source in (tmp_path / "clip.m4a", f"{server[0]}/clip.m4a"):
        waveform, rate = load_audio(source)
        assert rate == 48_000
        assert waveform.shape[0] == channels
        assert abs(waveform.shape[1] - len(CLIP)) < 4_096
        power = (waveform**2).mean(axis=1)
        # Of 7.1 one channel is for bass alone.
        assert np.isclose(np.sqrt(power), np.sqrt((CLIP**2).mean()), rtol=0.1).sum() >= max(1, channels - 1)


@pytest.mark.parametrize("container", ["mp4", "matroska", "adts"])
def test_cut_files_with_pyav(container, tmp_path):
    options = {"movflags": "faststart"} if container == "mp4" else {}
    data = m4a(options=options, container=container)
    whole = load_audio(data)[0]
    with pytest.warns(UserWarning, match="cut off or damaged"):
        waveform = load_audio(data[: int(0.6 * len(data))])[0]
    assert 0.4 < waveform.shape[1] / whole.shape[1] < 0.75
    np.testing.assert_allclose(waveform, whole[:, : waveform.shape[1]], atol=1e-3)


def test_a_media_file_opens_nothing_else(server):
    pytest.importorskip("av", reason="without PyAV such files are refused anyway")
    address, asked = server
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\n{address}/a.ts\n#EXT-X-ENDLIST\n"
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"
    files = f"ffconcat version 1.0\nfile {address}/a.wav\n"
    for text in (playlist, session, files):
        start = time.monotonic()
        with pytest.raises(ValueError, match="not a recording that can be read"):
            load_audio(text.encode())
        assert time.monotonic() - start < 2
    assert asked == []


def test_integers_are_scaled_by_the_range_that_holds_them():
    sixteen = np.round(CLIP * 32_768 * 0.9)
    twenty_four = np.round(CLIP * 8_388_608 * 0.9)
    expected = 0.9 * CLIP
    for audio in (
        sixteen.astype(np.int16),
        sixteen.astype(np.int32),
        sixteen.astype(np.int64).tolist(),
        torch.from_numpy(sixteen).to(torch.int32),
        sixteen.astype(np.int32) << 16,
        twenty_four.astype(np.int32),
        twenty_four.astype(np.int32) << 8,
        (sixteen + 32_768).astype(np.uint16),
        torch.from_numpy(expected).to(torch.float16),
    ):
        np.testing.assert_allclose(to_mono(audio), expected, atol=5e-4)
    np.testing.assert_allclose(to_mono(torch.from_numpy(expected).bfloat16()), expected, atol=5e-3)
    # One step of 16 bits at the upper end of 32 bits is silence.
    assert is_silent(to_mono(np.array([0, 65_536, -65_536] * 100, np.int32)))


@pytest.mark.parametrize("audio", [CLIP * 32_768, CLIP * 1e20, CLIP.astype(np.float64) * 1e300, [0.1, np.nan]])
def test_impossible_samples_are_refused(audio):
    with pytest.raises(ValueError, match=r"expected floats from -1 to 1|NaN or infinite"):
        to_mono(audio)


def test_channels_that_cancel_each_other():
    np.testing.assert_array_equal(to_mono(np.stack([CLIP, -CLIP])), CLIP)
    np.testing.assert_array_equal(to_mono(np.stack([0.5 * CLIP, -CLIP, 0.52 * CLIP]).T), -CLIP)
    # Only one channel of eight, and independent channels: their mean.
    eight = np.zeros((8, len(CLIP)), np.float32)
    eight[3] = CLIP
    np.testing.assert_allclose(to_mono(eight), CLIP / 8, atol=1e-7)
    other = synthetic_clip(1.5, 2)
    np.testing.assert_allclose(to_mono(np.stack([CLIP, other])), (CLIP + other) / 2, atol=1e-7)


def test_blocks_that_cancel_by_chance_are_mixed_like_the_others():
    stereo = np.stack([CLIP, synthetic_clip(1.5, 2)])
    stereo[1, :10] = -stereo[0, :10]
    mix = Mixer(4_800)
    blocks = [mix(stereo[:, start : start + 10]) for start in range(0, stereo.shape[1], 10)]
    np.testing.assert_allclose(np.concatenate(blocks), stereo.mean(axis=0), atol=1e-7)
    mix, opposite = Mixer(4_800), np.stack([CLIP, -CLIP])
    blocks = [mix(opposite[:, start : start + 1_600]) for start in range(0, len(CLIP), 1_600)]
    np.testing.assert_array_equal(np.concatenate(blocks)[3_200:], CLIP[3_200:])


@pytest.mark.parametrize("order", [1, -1])
def test_a_pair_of_array_and_rate(order):
    waveform, rate = load_audio((16_000, np.stack([CLIP, CLIP], axis=1))[::order])
    assert rate == 16_000
    np.testing.assert_array_equal(waveform, CLIP[None])


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
    # Triangular dither and its rounding reach two steps of 16-bit audio.
    assert is_silent(np.full(10, 2.0**-14, np.float32))
    assert not is_silent(np.full(10, 1.5 * 2.0**-14, np.float32))


def test_an_open_file_is_read_and_not_what_has_its_name_since(tmp_path):
    path, other = tmp_path / "a.wav", tmp_path / "b.wav"
    path.write_bytes(encode("wav"))
    other.write_bytes(encode("wav", CLIP[:24_000]))
    with open(path, "rb") as file:
        other.replace(path)
        assert load_audio(file)[0].shape == (1, len(CLIP))
        path.unlink()
        assert load_audio(file)[0].shape == (1, len(CLIP))
