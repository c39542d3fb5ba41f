"""The demo in a real browser, headless: upload, record, own captions, phone width, broken files, markup, no internet.

    pip install -e ".[demo]" playwright && apt-get install chromium && pytest -m slow tests/test_demo_browser.py

`RECAP_SCREENSHOTS=FOLDER` keeps screenshots, `RECAP_PATIENCE_S` is how long a step may take, and
`RECAP_HOSTILE=FOLDER` has more files to upload.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recap_hf import examples_path, load_audio

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'recap-hf[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
# A busy machine needs minutes where an idle one needs seconds.
PATIENCE_MS = 1000 * int(os.environ.get("RECAP_PATIENCE_S", "240"))
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
NASTY = "<img src=x onerror=\"document.title='hacked'\"> {{7*7}} ${7*7} <script>document.title='hacked'</script>"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address and the folder of uploads of `recap demo` as a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-u", "-m", "recap_cli", "demo", "--max-seconds", "30", "--max-megabytes", "4"]
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    address = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    (uploads,) = folder.glob("recap-demo-*")
    yield address, uploads
    process.terminate()
    assert process.wait(timeout=60) == 0
    # Stopping leaves nothing.
    assert not uploads.exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    # What the fake microphone records: one of the examples, as the WAV file that Chromium wants.
    waveform, rate = load_audio(examples_path() / "sea.flac")
    heard = tmp_path_factory.mktemp("microphone") / "sea.wav"
    soundfile.write(heard, waveform.T, rate, subtype="PCM_16")
    with playwright.sync_playwright() as running:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={heard}"]
        browser = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request, browser, server):
    """A page; at its end it has called no other server, no script failed, and nothing sticks out to the right."""
    page = browser.new_page(viewport=request.param)
    page.set_default_timeout(PATIENCE_MS)
    strangers, errors = [], []
    page.on("request", lambda request: strangers.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server[0])
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param["width"]
    if folder := os.environ.get("RECAP_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    page.close()
    assert errors == []
    assert [url for url in strangers if not url.startswith((server[0], "data:", "blob:"))] == []


def caption(page) -> str:
    """The caption, once everything about the recording is there."""
    page.get_by_alt_text(re.compile("plot", re.IGNORECASE)).first.wait_for()
    return page.get_by_label("Caption", exact=True).input_value()


def test_upload_timeline_and_own_captions(page, tmp_path):
    parts = []
    for name in ("sea", "flute"):
        waveform, rate = load_audio(examples_path() / f"{name}.flac")
        parts += [waveform.mean(axis=0)[: 5 * rate], np.zeros(3 * rate)]
    soundfile.write(tmp_path / "two sounds.wav", np.concatenate(parts[:-1]), rate)
    page.set_input_files("input[type=file]", str(tmp_path / "two sounds.wav"))
    first = caption(page)
    assert first.strip()
    # A row of the timeline moves the player.
    page.get_by_role("gridcell").get_by_text("silence").locator("visible=true").first.click()
    page.locator("time").get_by_text("0:05").first.wait_for()
    page.get_by_label("Your own captions, written below").check()
    page.get_by_label("Your own captions, one in each line").fill(
        # Like the recording: a caption that is not is not retrieved.
        f"a whistle is blown\nThe wind is blowing, then a flute plays a slow melody on a flute {NASTY}"
    )
    page.get_by_role("button", name="Caption", exact=True).click()
    # Markup is shown as text.
    page.get_by_role("gridcell").get_by_text("flute <img src=x").locator("visible=true").first.wait_for()
    assert caption(page) != first
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "What does it sound like?"


def test_record(page):
    page.get_by_label("Record audio").first.click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(4_000)
    page.get_by_role("button", name="Stop").first.click()
    assert re.search("sea|wave|ocean|surf|rain|water", caption(page), re.IGNORECASE)


def test_what_is_refused(page, tmp_path):
    page.get_by_role("button", name="Caption", exact=True).click()
    page.get_by_text("Record or upload a sound, or choose an example.").wait_for()
    broken = tmp_path / "<b>broken.wav"
    broken.write_bytes(b"RIFF\x10\x00\x00\x00WAVEfmt nonsense" * 20)
    page.set_input_files("input[type=file]", str(broken))
    page.get_by_text("broken.wav: not a recording that can be read").wait_for()


# ---------------------------------------------------------------- hostile files


def mp4(path: Path, samples: np.ndarray, rate: int) -> Path:
    """A video of a grey picture with a sound track."""
    import av

    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("mpeg4", rate=10), file.add_stream("aac", rate=rate, layout="mono")
        video.width = video.height = 64
        for _ in range(int(10 * len(samples) / rate)):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 128, np.uint8))))
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate = rate
        for stream, last in ((audio, frame), (audio, None), (video, None)):
            file.mux(stream.encode(last))
    return path


def uploaded(page, address: str, path: Path, video: bool = False) -> tuple[str, str]:
    """The caption of an upload, or the message that refuses it; the other one is empty."""
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    page.locator("input[type=file]").nth(int(video)).set_input_files(str(path))
    said, refused = page.get_by_label("Caption", exact=True), page.locator(".toast-body")
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not (said.input_value() or refused.count()):
        assert time.monotonic() < deadline, f"nothing happens with {path.name}"
        page.wait_for_timeout(100)
    return said.input_value(), refused.first.inner_text() if refused.count() else ""


def test_a_video_is_captioned(browser, server, tmp_path):
    waveform, rate = load_audio(examples_path() / "rain.flac")
    path = mp4(tmp_path / "rain.mp4", waveform.mean(axis=0)[: 4 * rate], rate)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    said, _ = uploaded(page, server[0], path, video=True)
    assert "rain" in said.lower() and caption(page) == said
    page.close()


def test_hostile_files_while_another_visitor_captions(browser, server, tmp_path):
    """Each is captioned or refused by name, and the other visitor gets the caption that he gets alone."""
    from test_audio import BROKEN

    hostile = []
    for number, (data, _) in enumerate(BROKEN.values()):
        hostile.append(tmp_path / f"broken {number}.wav")
        hostile[-1].write_bytes(data)
    for name in ("sea.flac", "clock.flac"):
        data = (examples_path() / name).read_bytes()
        hostile.append(tmp_path / f"cut {name}")
        hostile[-1].write_bytes(data[: len(data) // 3])
    soundfile.write(tmp_path / "hours.flac", np.zeros(8_000 * 3_600), 8_000)
    hostile += [tmp_path / "hours.flac", *sorted(Path(os.environ.get("RECAP_HOSTILE", "none")).glob("*"))]
    mine = examples_path() / "sea.flac"
    attacker, visitor = browser.new_page(), browser.new_page()
    for page in (attacker, visitor):
        page.set_default_timeout(PATIENCE_MS)
    alone, _ = uploaded(visitor, server[0], mine)
    for path in hostile:
        visitor.goto(server[0])
        visitor.wait_for_selector("input[type=file]", state="attached")
        visitor.set_input_files("input[type=file]", str(mine))
        said, refused = uploaded(attacker, server[0], path)
        assert said or path.name in refused or "longer than 30 seconds" in refused, path.name
        assert caption(visitor) == alone, path.name
    if said:
        # Nothing is computed when the server is stopped.
        caption(attacker)
    for page in (attacker, visitor):
        page.close()
