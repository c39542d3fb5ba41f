"""The demo without a browser: what it describes, what it refuses, what it leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import synthetic_clip
from test_audio import BROKEN

from recap_cli import main
from recap_hf.modeling.captioning_recap import Captioner

demo = pytest.importorskip("recap_hf.demo", reason="the page needs Gradio: pip install 'recap-hf[demo]'")


@pytest.fixture
def captioner(tiny_model, tiny_processor, tmp_path):
    tiny_model.generation_config.max_new_tokens = 6
    (tmp_path / "birds.txt").write_text("an owl hoots\na wren sings\n")
    settings = demo.DemoSettings(datastores={"Birds": str(tmp_path / "birds.txt")}, max_seconds=12, max_megabytes=3)
    return demo.DemoCaptioner(Captioner(tiny_model, tiny_processor), settings)


def saved(tmp_path, samples, rate: int = 48_000, name: str = "mine.wav") -> str:
    soundfile.write(tmp_path / name, samples, rate)
    return str(tmp_path / name)


def described(captioner, path: str, choice: str | None = None, own: str = "") -> dict:
    """All parts of the page, each as it is at the end."""
    parts: dict = {}
    for update in captioner.describe(path, choice or captioner.choices[0], own):
        parts |= update
    return parts


def test_a_recording_is_described_part_by_part(captioner, tmp_path):
    path = saved(tmp_path, np.concatenate([synthetic_clip(2.0, 1), np.zeros(96_000, np.float32)]))
    updates = list(captioner.describe(path, captioner.choices[0]))
    assert list(updates[0]) == ["caption", "retrieved"]
    expected = captioner.captioner.caption([captioner.captioner.read(path)])[0]
    assert updates[0]["caption"] == expected.caption
    assert [text for _, text in updates[0]["retrieved"]] == [hit["caption"] for hit in expected.retrieved]
    timeline = updates[-2]["timeline"]
    assert timeline[0][0] == 0
    assert timeline[-1][1:] == [4.0, "silence"]
    # The spectrogram, and a picture for each word.
    words = expected.caption.split()
    assert len(updates[-1]["explanation"].axes) >= 1 + len([word for word in words if word.isalpha()])


def test_the_choices(captioner, tmp_path):
    assert captioner.choices == [
        "Built in (8 captions)",
        "Birds (2 captions)",
        "None: the model alone",
        "Your own captions, written below",
    ]
    path = saved(tmp_path, synthetic_clip(2.0, 3))
    birds = described(captioner, path, captioner.choices[1])
    assert {text for _, text in birds["retrieved"]} == {"an owl hoots", "a wren sings"}
    assert described(captioner, path, captioner.choices[2])["retrieved"] == []
    own = described(captioner, path, captioner.choices[3], "  church bells   ring\n\na tram squeals\n")
    assert {text for _, text in own["retrieved"]} == {"church bells ring", "a tram squeals"}
    # The captioner of everyone else is as it was.
    assert len(captioner.captioner.datastore) == 8
    with pytest.raises(FileNotFoundError, match="no such file of captions"):
        demo.DemoCaptioner(captioner.captioner, demo.DemoSettings(datastores={"Missing": "missing.txt"}))


def test_silence_has_no_explanation(captioner, tmp_path):
    page = described(captioner, saved(tmp_path, np.zeros(48_000)))
    assert page["caption"] == "silence"
    assert page["explanation"] is None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_uploads_are_refused_without_their_path(captioner, tmp_path, name):
    path = tmp_path / "broken.wav"
    path.write_bytes(BROKEN[name][0])
    with pytest.raises(demo.RefusedError) as refused:
        described(captioner, str(path))
    assert str(tmp_path) not in str(refused.value)


def test_a_small_file_of_many_hours_is_not_unpacked(captioner, tmp_path):
    """Two hours of digital silence are half a megabyte of FLAC and would be 1.4 GB of samples."""
    import resource

    path = tmp_path / "hours.flac"
    with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC") as file:
        block = np.zeros(8_000 * 60, dtype=np.float32)
        for _ in range(120):
            file.write(block)
    assert path.stat().st_size < 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(demo.RefusedError, match="longer than 12 seconds"):
        described(captioner, str(path))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200


@pytest.mark.parametrize("text", ["", " \n\t\n", "a\n" * 501, "fine\n" + "x" * 301])
def test_own_captions_that_are_refused(captioner, tmp_path, text):
    with pytest.raises(demo.RefusedError, match="Write 1 to 500 captions"):
        described(captioner, saved(tmp_path, synthetic_clip(1.0, 1)), demo.OWN_CAPTIONS, text)


# -------------------------------------------------------- page and command


def test_the_page_deletes_uploads_and_calls_no_one(captioner):
    page = demo.build_page(captioner)
    assert page.analytics_enabled is False
    assert page.delete_cache == (60, 1800)
    options = demo.launch_options(captioner.settings)
    assert options["max_file_size"] == 3_000_000
    assert not options["theme"]._stylesheets
    # No event may be called as an interface by other programs.
    assert {function.api_visibility for function in page.fns.values()} <= {"private", "undocumented"}


def test_the_command_deletes_what_was_left_of_uploads(monkeypatch, model_folder):
    calls = []

    def launch(settings, host, port, share, captioner):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "left.wav").write_bytes(b"x")
        calls.append((folder, settings.datastores, settings.max_seconds, torch.get_num_threads()))

    monkeypatch.setattr(demo, "launch", launch)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/elsewhere")
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    arguments = ["demo", "--model", model_folder, "--datastore", "My birds=data/birds=2", "--max-seconds", "9"]
    try:
        assert main([*arguments, "--threads", "3"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
        torch.set_num_threads(threads)
    ((folder, datastores, seconds, threads),) = calls
    assert not folder.exists()
    assert (datastores, seconds, threads) == ({"My birds": "data/birds=2"}, 9, 3)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--datastore", "birds"], 1, "expects NAME=FOLDER"),
        (["--datastore", "=folder"], 1, "expects NAME=FOLDER"),
        (["--max-seconds", "0"], 2, "must be at least 1, got 0"),
    ],
)
def test_wrong_calls(capsys, arguments, status, message):
    try:
        actual = main(["demo", *arguments])
    except SystemExit as stop:
        actual = stop.code
    assert actual == status
    assert message in capsys.readouterr().err
