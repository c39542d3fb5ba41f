"""The picture of an explanation and `recap explain`."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import soundfile

from recap_cli import main
from recap_hf.explain import CaptionExplanation, WordExplanation, draw_explanation


@pytest.fixture
def made_up() -> CaptionExplanation:
    """Two words of a 4 s recording: the first on its second second below, the second nowhere."""
    audio_map = np.zeros((2, 13))
    audio_map[0, 4] = 1.0
    words = [
        WordExplanation("$a_1", 0, 4, -1.0, 0.5, 0.2, audio_map, 0.0, np.ones((1, 2, 32)), np.array([1.0, 0.0])),
        WordExplanation("b", 5, 6, -1.0, 0.0, 0.0, 0 * audio_map, 0.0, np.zeros((1, 2, 32)), np.zeros(2)),
    ]
    edges = np.append(np.arange(13) * 0.3125, 4.0)
    retrieved = [{"caption": "<b>$x_2$ " + "long " * 40, "score": 0.5, "weight": 1.0}, {"caption": "y", "weight": 0.0}]
    return CaptionExplanation("$a_1 b", "gradient", words, retrieved, edges, np.array([0.0, 2000.0, 14_000.0]), 4.0)


def test_spectrogram_is_that_of_the_encoder_once(tiny_processor):
    """A tone that starts in the middle of a recording of 13 s lies there, in its mel bin; nothing is repeated."""
    from recap_hf.explain.picture import clip_spectrogram

    time = np.arange(13 * 48_000) / 48_000
    tone = np.where(time > 11.5, 0.5 * np.sin(2 * np.pi * 3000 * time), 0).astype(np.float32)
    extractor = tiny_processor.feature_extractor
    spectrogram = clip_spectrogram(tone, 48_000, extractor)
    assert spectrogram.shape == (1300, 64)
    loud = np.flatnonzero(spectrogram.max(axis=1) > -20)
    assert abs(loud[0] - 1150) <= 2 and loud[-1] == 1299
    centres = np.linspace(0, 24_000, 513)[extractor.mel_filters_slaney.argmax(axis=0)]
    assert abs(centres[spectrogram[1250].argmax()] - 3000) < 100
    short = clip_spectrogram(np.stack([tone, tone])[:, -48_000:], 48_000, extractor)
    assert short.shape == (100, 64)


def test_map_is_drawn_at_its_time_and_band(made_up, tiny_processor):
    pytest.importorskip("matplotlib", reason="pictures need the explain extra")
    noise = np.random.default_rng(0).standard_normal(4 * 48_000).astype(np.float32) * 0.1
    figure = draw_explanation(made_up, noise, tiny_processor.feature_extractor)
    top, first, second, table = figure.axes
    image = first.images[-1]
    alpha = image.get_array()[..., 3]
    assert np.argwhere(alpha > 0).tolist() == [[0, 4]]
    assert list(first.get_xlim()) == [0, 4.0]
    assert not second.images[-1].get_array()[..., 3].any()
    assert table.get_yticklabels()[0].get_text().startswith("<b>$x_2$ long")
    assert top.get_title() == "“$a_1 b”"
    figure.canvas.draw()


def test_ticks_lie_at_their_mel_bin(tiny_processor):
    from recap_hf.explain.audio_grid import MelAxis

    extractor = tiny_processor.feature_extractor
    centres = np.linspace(0, 24_000, 513)[extractor.mel_filters_slaney.argmax(axis=0)]
    axis = MelAxis(extractor)
    for hz in (500, 2000, 8000):
        nearest = int(np.abs(centres - hz).argmin())
        # Bin `nearest` is drawn from `nearest` to `nearest + 1`.
        assert abs(axis.place(hz) - (nearest + 0.5)) < 0.8
        assert axis.hz(axis.place(hz)) == pytest.approx(hz)


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need the explain extra")
    from recap_hf import examples_path

    clip = str(examples_path() / "clock.flac")
    picture = tmp_path / "picture.png"
    assert main(["explain", clip, "--caption", "a dog barking", "--output", str(picture), "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["caption"] == "a dog barking" and [word["word"] for word in result["words"]] == [
        "a",
        "dog",
        "barking",
    ]
    assert sum(hit["weight"] for hit in result["retrieved"]) == pytest.approx(1, abs=1e-3)
    assert all("score" in hit for hit in result["retrieved"])
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", header[16:20])[0] > 500
    assert main(["explain", clip, "--method", "insertion", "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{clip}: ") and len([line for line in lines if line[4:6] == "0."]) == 2


def test_command_refuses(tmp_path, capsys):
    from recap_hf import examples_path

    assert main(["explain", str(examples_path() / "rain.flac"), "--output", "picture.doc"]) == 1
    assert "--output is a picture" in capsys.readouterr().err
    assert main(["explain", "clip.wav", "--output", str(tmp_path / "none" / "x.png")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "sound.png").write_bytes(b"an input, whatever its name says")
    assert main(["explain", str(tmp_path / "sound.png"), "--output", str(tmp_path / "sound.png")]) == 1
    assert "--output names the input file" in capsys.readouterr().err
    assert (tmp_path / "sound.png").read_bytes() == b"an input, whatever its name says"
    soundfile.write(tmp_path / "silent.wav", np.zeros(48_000), 48_000)
    assert main(["explain", str(tmp_path / "silent.wav")]) == 1
    assert "no sound" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "none.wav")]) == 1
    assert "none.wav" in capsys.readouterr().err
