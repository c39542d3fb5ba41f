"""The demo without a browser: what it takes, what it refuses and how, what it shows, forgets and leaves behind."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import synthetic_clip
from test_audio import BROKEN

from recap_cli import main
from recap_hf.demo.settings import DemoSettings, parse_datastores
from recap_hf.modeling.captioning_recap import Captioner

NASTY = "<img src=x onerror=\"alert(1)\"> & 'quoted' {{ 7*7 }} ${7*7} </section><script>alert(2)</script>"


class Tags(HTMLParser):
    """The tags, attributes and text of a piece of the page, as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def text_of(html: str) -> str:
    return " ".join(Tags(html).text.split())


@pytest.fixture
def handlers(tiny_model, tiny_processor, tmp_path):
    pytest.importorskip("matplotlib", reason="the page draws with matplotlib: pip install 'recap-hf[demo]'")
    from recap_hf.demo.captioner import DemoCaptioner
    from recap_hf.demo.handlers import Handlers

    tiny_model.generation_config.max_new_tokens = 6
    example = tmp_path / "example.wav"
    soundfile.write(example, synthetic_clip(2.0, 3), 48_000)
    settings = DemoSettings(max_seconds=12, max_megabytes=3, max_captions=5, max_caption_characters=200)
    return Handlers(DemoCaptioner(Captioner(tiny_model, tiny_processor)), settings, {"Example": example})


def upload(tmp_path, data: bytes, name: str = "mine.wav"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def wav(seconds: float, rate: int = 48_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, synthetic_clip(seconds, 1, rate), rate, format="WAV")
    return buffer.getvalue()


def collected(updates) -> dict:
    """The last state of each piece, and all that the status said."""
    pieces: dict = {"said": []}
    for update in updates:
        pieces.update(update)
        if "status" in update:
            pieces["said"].append(text_of(update["status"]))
    return pieces


# ------------------------------------------------------------------ a visit


def test_a_recording_is_described_and_the_page_says_what_it_does(handlers, tmp_path):
    path = upload(tmp_path, wav(2.0))
    page = collected(handlers.receive("visitor", path, "mine.wav"))
    assert not path.exists()
    assert [said.partition(" …")[0] for said in page["said"]][:2] == [
        "Reading the recording",
        "Retrieving captions and generating",
    ]
    assert page["said"][-1] == "Done: “mine.wav” is described."
    assert "0:02.0" in text_of(page["recording"])
    recording = Tags(page["recording"])
    sources = [value[:22] for name, value in recording.attributes if name == "src"]
    assert sources == ["data:audio/mpeg;base64", "data:image/png;base64,"]
    retrieved = handlers.captioner.captioner.processor.datastore.captions
    assert sum(caption in text_of(page["caption"]) for caption in retrieved) == 4
    assert ("data-start", "0.0") in Tags(page["timeline"]).attributes
    assert page["comparison"] == ""


def test_the_file_is_gone_before_anything_else_happens(handlers, tmp_path):
    path = upload(tmp_path, wav(1.0))
    updates = handlers.receive("visitor", path, "mine.wav")
    next(updates)
    assert not path.exists()


def test_own_captions_are_embedded_and_change_what_is_looked_up(handlers):
    collected(handlers.example("visitor", "Example"))
    page = collected(handlers.use_own("visitor", "  church bells   ring\n\na tram squeals\n"))
    assert page["said"][0].startswith("Embedding your captions: 2 of 2 …")
    names, chosen = page["choices"]
    assert chosen == "Your own (2 captions)"
    assert names == ["Built in (8 captions)", "None: the model alone", chosen]
    looked_up = text_of(page["caption"])
    assert "church bells ring" in looked_up
    assert "a tram squeals" in looked_up
    comparison = text_of(page["comparison"])
    assert "Built in (8 captions)" in comparison
    assert chosen in comparison
    # The captioner of everyone else is as it was.
    assert len(handlers.captioner.captioner.processor.datastore) == 8
    other = collected(handlers.example("another visitor", "Example"))
    assert "church bells" not in other["caption"]


def test_the_model_alone(handlers):
    collected(handlers.example("visitor", "Example"))
    page = collected(handlers.choose("visitor", "None: the model alone"))
    assert "No captions were retrieved" in text_of(page["caption"])


def test_captions_can_be_chosen_before_there_is_a_recording(handlers):
    page = collected(handlers.use_own("visitor", "a door slams"))
    assert page["said"][-1] == "Retrieving from: Your own (1 caption). Now record or upload a sound."
    page = collected(handlers.example("visitor", "Example"))
    assert "a door slams" in text_of(page["caption"])


def test_silence(handlers, tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(48_000), 48_000, format="WAV")
    page = collected(handlers.receive("visitor", upload(tmp_path, buffer.getvalue()), "mine.wav"))
    assert "silence" in text_of(page["caption"])
    assert page["explanation"] == ""
    assert page["said"][-1].startswith("Done")


# ---------------------------------------------------------------- escaping


def test_markup_in_captions_and_names_is_shown_as_text(handlers, tmp_path):
    name = "<b onclick=alert(3)>.wav"
    page = collected(handlers.receive("visitor", upload(tmp_path, wav(1.0)), name))
    page |= collected(handlers.use_own("visitor", NASTY))
    assert NASTY in Tags(page["caption"]).text
    assert name in Tags(page["recording"]).text
    for piece in ("caption", "recording", "timeline", "explanation", "comparison", "status"):
        read = Tags(page[piece])
        assert not {"script", "b"} & set(read.tags)
        assert not [attribute for attribute, _ in read.attributes if attribute.startswith("on")]
    assert "img" not in Tags(page["caption"]).tags


def test_a_caption_of_markup_is_text_in_every_view():
    """What the model itself may write, if its datastore does."""
    pytest.importorskip("matplotlib", reason="the page draws with matplotlib: pip install 'recap-hf[demo]'")
    from recap_hf.demo import views

    result = {"caption": NASTY, "score": 1.0, "retrieved": [{"caption": NASTY, "score": -0.5}]}
    segments = [{"start": 0.0, "end": 1.0, "caption": NASTY, "score": 1.0, "retrieved": []}]
    for html in (
        views.render("caption", result=result, choice=NASTY),
        views.render("timeline", segments=segments, seconds=1.0),
        views.render("comparison", captions={NASTY: NASTY, "b": "c"}, current=NASTY),
        views.status(NASTY),
    ):
        assert not {"img", "script"} & set(Tags(html).tags)
        assert Tags(html).text.count("alert(1)") >= 1


def test_an_explanation_says_what_a_word_depends_on(tiny_processor):
    pytest.importorskip("matplotlib", reason="the page draws with matplotlib: pip install 'recap-hf[demo]'")
    from recap_hf.demo import views
    from recap_hf.demo.recordings import Recording
    from recap_hf.explain import CaptionExplanation, WordExplanation

    def word(text, start, audio, captions, place, weights):
        audio_map = np.zeros((2, 4))
        if place is not None:
            audio_map[0, place] = 1.0
        cells = np.zeros((1, 2, 4))
        return WordExplanation(
            text, start, start + len(text), -1.0, audio, captions, audio_map, 0.0, cells, np.array(weights)
        )

    why = CaptionExplanation(
        caption="an <i>owl</i> hoots",
        method="gradient",
        words=[
            # e^2.0 = 7.39, e^-0.7 = 1 / 2.01
            word("an", 0, 5.0, 0.0, 0, [0.5, 0.5]),
            word("owl", 6, 0.01, 1.0, None, [1.0, 0.0]),
            word("hoots", 14, 2.0, -0.7, 2, [0.25, 0.75]),
        ],
        retrieved=[{"caption": NASTY, "score": 0.5}, {"caption": "an owl", "score": 0.4}],
        time_edges_s=np.arange(5.0),
        band_edges_hz=np.array([50.0, 2_000.0, 14_000.0]),
        duration_s=4.0,
    )
    html = views.explanation(why, Recording("a", synthetic_clip(4.0, 1), tiny_processor.feature_extractor))
    said = text_of(html)
    assert "“hoots” depends most on 0:02.0 – 0:03.0, the bright region." in said
    assert (
        "It would be 7.4 times less likely without the sound, and 2.0 times more likely without the retrieved captions"
        in said
    )
    assert "“owl” does not depend on the sound. It would be equally likely without the sound" in said
    # The page begins with the word that the sound matters most to, of those that are no article.
    pressed = re.findall(r'data-word="(\d)" aria-pressed="(\w+)"', html)
    assert [number for number, state in pressed if state == "true"] == ["2"]
    # Only where something was heard is a place shown; elsewhere the whole picture is covered.
    assert re.findall(r'<(?:img|span) class="rc-map( rc-unheard)?" data-map="(\d)"', html) == [
        ("", "0"),
        (" rc-unheard", "1"),
        ("", "2"),
    ]
    # Captions are listed for the one word that would be less likely without them.
    assert html.count("<ul") == 1
    assert "100 %" in said
    assert not {"i", "script"} & set(Tags(html.replace('<i style="width', '<em style="width')).tags)
    assert views.explanation(None, Recording("a", synthetic_clip(1.0, 1), tiny_processor.feature_extractor)) == ""


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_uploads_are_refused_politely_and_removed(handlers, tmp_path, name):
    path = upload(tmp_path, BROKEN[name][0], "broken.wav")
    page = collected(handlers.receive("visitor", path, "broken.wav"))
    assert not path.exists()
    assert page["said"][-1].startswith("“broken.wav” cannot be read: ")
    assert str(tmp_path) not in page["said"][-1]
    assert "pip" not in page["said"][-1]
    assert "rc-refused" in page["status"]


def test_over_long_recordings(handlers, tmp_path):
    data = wav(13.0, 16_000)
    page = collected(handlers.receive("visitor", upload(tmp_path, data), "long.wav"))
    assert page["said"][-1].startswith("“long.wav” is longer than 12 seconds")
    assert page["recording"] == ""


def test_a_small_file_of_many_hours_is_not_unpacked(handlers, tmp_path):
    """Two hours of digital silence are half a megabyte of FLAC and would be 1.4 GB of samples."""
    import resource

    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8_000, 1, format="FLAC") as file:
        block = np.zeros(8_000 * 60, dtype=np.float32)
        for _ in range(120):
            file.write(block)
    data = buffer.getvalue()
    assert len(data) < 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = collected(handlers.receive("visitor", upload(tmp_path, data), "hours.flac"))
    assert "longer than 12 seconds" in page["said"][-1]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200


def test_too_many_bytes(handlers, tmp_path):
    path = upload(tmp_path, bytes(3_000_001))
    page = collected(handlers.receive("visitor", path, "huge.wav"))
    assert page["said"][-1].startswith("The file is larger than 3 MB.")
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Please write at least one caption, one in each line."),
        (" \n\t\n", "Please write at least one caption, one in each line."),
        ("a\n" * 6, "6 captions: the maximum is 5."),
        ("fine\n" + "x" * 201, "Caption 2 has 201 characters: the maximum is 200."),
    ],
)
def test_own_captions_that_are_refused(handlers, text, message):
    assert collected(handlers.use_own("visitor", text))["said"] == [message]


def test_a_refused_upload_leaves_no_result_of_the_last_one(handlers, tmp_path):
    collected(handlers.example("visitor", "Example"))
    page = collected(handlers.receive("visitor", upload(tmp_path, b"no sound"), "notes.wav"))
    assert page["caption"] == page["recording"] == page["timeline"] == ""
    assert handlers.sessions["visitor"].recording is None


def test_a_fault_of_ours_is_said_without_details(handlers, caplog):
    page = collected(handlers.example("visitor", "no such example"))
    assert page["said"][-1].startswith("An error occurred on this server.")
    assert "KeyError" in caplog.text


# ------------------------------------------------------------- remembering


def test_sessions_are_forgotten():
    from recap_hf.demo.sessions import Sessions

    now = [0.0]
    sessions = Sessions(keep_seconds=10, capacity=2, clock=lambda: now[0])
    sessions["a"].choice = "x"
    now[0] = 9.0
    assert sessions["a"].choice == "x"
    now[0] = 18.0
    assert sessions["a"].choice == "x"
    now[0] = 28.5
    sessions.sweep()
    assert len(sessions) == 0
    for key in "abc":
        sessions[key].choice = key
    assert len(sessions) == 2
    assert sessions["c"].choice == "c"
    sessions.forget("c")
    sessions.forget("never seen")
    assert sessions["c"].choice is None


def test_forgetting_on_request(handlers):
    collected(handlers.use_own("visitor", "a door slams"))
    collected(handlers.example("visitor", "Example"))
    page = collected(handlers.forget("visitor"))
    assert len(handlers.sessions) == 0
    assert page["caption"] == page["recording"] == page["explanation"] == ""
    assert page["choices"] == (["Built in (8 captions)", "None: the model alone"], "Built in (8 captions)")


def test_own_captions_that_were_forgotten(handlers):
    collected(handlers.use_own("visitor", "a door slams"))
    handlers.sessions.forget("visitor")
    page = collected(handlers.choose("visitor", "Your own (1 caption)"))
    assert page["said"] == ["Your own captions have been deleted. Please use them again."]
    assert page["choices"][1] == "Built in (8 captions)"


# -------------------------------------------------------------- datastores


def test_named_datastores(tiny_model, tiny_processor, tmp_path):
    pytest.importorskip("matplotlib", reason="the page draws with matplotlib: pip install 'recap-hf[demo]'")
    from recap_hf.demo.captioner import DemoCaptioner

    (tmp_path / "birds.txt").write_text("an owl hoots\na wren sings\n")
    tiny_processor.datastore.save_pretrained(tmp_path / "folder")
    captioner = DemoCaptioner(
        Captioner(tiny_model, tiny_processor), {"Birds": tmp_path / "birds.txt", "Folder": str(tmp_path / "folder")}
    )
    assert captioner.choices == [
        "Built in (8 captions)",
        "Birds (2 captions)",
        "Folder (8 captions)",
        "None: the model alone",
    ]
    with pytest.raises(FileNotFoundError, match="no such file of captions"):
        DemoCaptioner(Captioner(tiny_model, tiny_processor), {"Missing": "missing.txt"})


def test_datastores_of_a_command_line():
    assert parse_datastores([" My birds = data/birds=2 "]) == {"My birds": "data/birds=2"}
    for text in ("birds", "=folder", "name=", "Your own=folder", "None=folder"):
        with pytest.raises(ValueError, match="--datastore"):
            parse_datastores([text])
    with pytest.raises(ValueError, match="given twice"):
        parse_datastores(["a=b", "a=c"])
    with pytest.raises(ValueError, match="`max_seconds` must be above 0"):
        DemoSettings(max_seconds=0)


# ---------------------------------------------------------------- pictures


def mel(hz):
    """The HTK mel scale."""
    return 2_595 * np.log10(1 + hz / 700)


def test_pictures_show_what_is_there(tiny_processor):
    pytest.importorskip("matplotlib", reason="the page draws with matplotlib: pip install 'recap-hf[demo]'")
    from recap_hf.demo import pictures

    extractor = tiny_processor.feature_extractor
    rate, low, high = extractor.sampling_rate, extractor.frequency_min, extractor.frequency_max
    time = np.arange(2 * rate) / rate
    tone = np.where(time < 1, np.sin(2 * np.pi * 1_000 * time), 0).astype(np.float32)
    levels = pictures.levels(tone, extractor)
    bands, columns = levels.shape
    assert bands == extractor.feature_size
    assert levels[:, : columns // 2 - 5].max() > 0.95
    # Without the end, where the encoder repeats a short recording.
    assert levels[:, columns // 2 + 5 : -5].max() == 0
    # The centres of the bands lie evenly in mel between the lowest and the highest frequency.
    share = (mel(1_000) - mel(low)) / (mel(high) - mel(low))
    assert levels[:, columns // 4].argmax() == pytest.approx(share * (bands + 1) - 1, abs=1.5)
    picture = pictures.draw(tone, extractor)
    assert dict(picture.frequency_marks)["1 kHz"] == pytest.approx(100 * (1 - share), abs=100 / bands)
    assert picture.time_marks[0] == ("0:00.0", 0.0)
    assert picture.time_marks[-1] == ("0:02.0", 100.0)
    assert pictures.clock(3_725) == "1:02:05"
    assert pictures.clock(59.96, decimals=True) == "1:00.0"
    assert pictures.length_in_words(12.96) == "13.0 seconds"
    assert pictures.length_in_words(59.96) == "1:00 minutes"
    assert pictures.length_in_words(65) == "1:05 minutes"
    numbers = [float(number) for number in re.findall(r"[ML](?:[\d.]+),([\d.]+)", pictures.outline(tone))]
    assert min(numbers) == pytest.approx(2, abs=0.5)
    assert max(numbers) == pytest.approx(98, abs=0.5)


def test_the_map_of_a_word_is_open_where_its_weights_are(tiny_processor):
    pytest.importorskip("matplotlib", reason="the page draws with matplotlib: pip install 'recap-hf[demo]'")
    from PIL import Image

    from recap_hf.demo import pictures
    from recap_hf.demo.recordings import Recording

    extractor = tiny_processor.feature_extractor
    low, high = float(extractor.frequency_min), float(extractor.frequency_max)
    clip = Recording("a", np.zeros(4 * extractor.sampling_rate, np.float32), extractor)
    audio_map = np.zeros((2, 4))
    audio_map[1, 2] = 1.0
    uri = pictures.word_map(audio_map, np.arange(5.0), np.array([low, 2_000.0, high]), clip)
    cover = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))[..., 3]
    # Open in the third second, in the upper band: rows count from the top.
    open_rows, open_columns = np.nonzero(cover == 0)
    assert (open_columns.min() / cover.shape[1], (open_columns.max() + 1) / cover.shape[1]) == (0.5, 0.75)
    assert open_rows.min() == 0
    share = (mel(2_000) - mel(low)) / (mel(high) - mel(low))
    assert (open_rows.max() + 1) / cover.shape[0] == pytest.approx(1 - share, abs=0.04)


# ------------------------------------------------------- the page, a Space


def test_the_page_keeps_no_upload_and_calls_no_one(tiny_model, tiny_processor, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'recap-hf[demo]'")
    from recap_hf.demo.captioner import DemoCaptioner
    from recap_hf.demo.page import build_page, inside_uploads, launch_options

    settings = DemoSettings(max_megabytes=2)
    page = build_page(DemoCaptioner(Captioner(tiny_model, tiny_processor)), settings)
    assert page.analytics_enabled is False
    assert page.delete_cache == (60, 300)
    options = launch_options(settings)
    assert options["max_file_size"] == 2_000_000
    assert not options["theme"]._stylesheets
    assert "http" not in options["css"]
    assert "http" not in options["head"]
    folder = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    assert inside_uploads(folder / "a" / "b.wav") == (folder / "a" / "b.wav").resolve()
    for elsewhere in ("/etc/passwd", folder / ".." / "x.wav"):
        with pytest.raises(ValueError, match="outside"):
            inside_uploads(elsewhere)
    # No event may be called as an interface by other programs.
    assert {function.api_visibility for function in page.fns.values()} <= {"private", "undocumented"}


def test_a_space(tmp_path, capsys):
    pytest.importorskip(
        "gradio", reason="the version of Gradio is written into the Space: pip install 'recap-hf[demo]'"
    )
    (tmp_path / "birds.txt").write_text("an owl hoots\n")
    space = tmp_path / "space"
    arguments = ["demo", "--export-space", str(space), "--datastore", f"Birds={tmp_path}/birds.txt"]
    assert main([*arguments, "--max-seconds", "30"]) == 0
    assert capsys.readouterr().out.strip() == str(space)
    app = (space / "app.py").read_text()
    assert "'Birds': 'datastores/1.txt'" in app
    assert "max_seconds=30" in app
    assert "device=None" in app
    assert str(tmp_path) not in app
    assert (space / "datastores" / "1.txt").read_text() == "an owl hoots\n"
    assert (space / "recap_hf" / "modeling" / "pipeline_recap.py").is_file()
    assert (space / "recap_hf" / "assets" / "recap-tiny" / "model.safetensors").is_file()
    readme = (space / "README.md").read_text()
    assert "sdk: gradio" in readme
    requirements = (space / "requirements.txt").read_text().split("\n")
    assert any(line.startswith("torch") for line in requirements)
    assert not [line for line in requirements if line.startswith("recap-hf")]
    # The folder's own package is what app.py imports.
    script = "import recap_hf, recap_hf.modeling; print(recap_hf.__file__); print(recap_hf.modeling.__file__)"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=space, check=True, timeout=120
    ).stdout.split()
    assert all(path.startswith(str(space)) for path in printed)
    assert main(arguments) == 1
    assert "the folder is not empty" in capsys.readouterr().err


def test_the_command_deletes_what_was_left_of_uploads(monkeypatch):
    page = pytest.importorskip("recap_hf.demo.page", reason="the page needs Gradio: pip install 'recap-hf[demo]'")
    folders = []

    def launch(*args, **options):
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        assert folders[0].stat().st_mode & 0o077 == 0
        (folders[0] / "left.wav").write_bytes(b"x")

    monkeypatch.setattr(page, "launch", launch)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/elsewhere")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["demo"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(folders) == 1 and not folders[0].exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--datastore", "birds"], 1, "expects NAME=FOLDER"),
        (["--max-seconds", "0"], 2, "must be at least 1, got 0"),
        (["--export-space", "unused", "--model", "no/such/folder"], 1, "no/such/folder"),
    ],
)
def test_wrong_calls(capsys, arguments, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        actual = main(["demo", *arguments])
    except SystemExit as stop:
        actual = stop.code
    assert actual == status
    assert message in capsys.readouterr().err
