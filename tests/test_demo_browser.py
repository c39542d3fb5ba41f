"""The demo in a real browser, headless: upload, record, own captions, phone width, broken files, markup, no internet.

    pip install -e ".[demo]" playwright && apt-get install chromium && pytest -m slow tests/test_demo_browser.py

`RECAP_SCREENSHOTS=FOLDER` keeps a screenshot of each stage, `RECAP_PATIENCE_S` is how long a step may take, and `-s`
shows how long the stages took.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
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
# fmt: off
FLAGS = [
    f"--{flag}"
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream",
    )
]
# fmt: on


def wait_until(condition, seconds: float = PATIENCE_MS / 1000):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`recap demo` as a process of its own, with a temporary folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "domestic.txt").write_text("a kettle boils\na tap drips\na drum is played\n")
        command = [sys.executable, "-m", "recap_cli", "demo", "--max-seconds", "30", "--max-megabytes", "4"]
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(free_port()), "--datastore", f"Domestic={folder / 'domestic.txt'}"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TMPDIR": str(self.temporary), "HF_HUB_OFFLINE": "1"},
            )
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.log.read_text()

    def files(self) -> list[Path]:
        """What lies in the folder of uploads."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("demo"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    # What the fake microphone hears: one of the examples, as the WAV file that Chromium wants.
    waveform, rate = load_audio(examples_path() / "sea.flac")
    heard = tmp_path_factory.mktemp("microphone") / "sea.wav"
    soundfile.write(heard, waveform.T, rate, subtype="PCM_16")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--use-file-for-fake-audio-capture={heard}"]
        )
        yield browser
        browser.close()


class Visit:
    """A page of its own, that notes whom it called and what went wrong in it."""

    def __init__(self, browser, server: Server, size: dict[str, int]) -> None:
        self.size = size
        self.page = browser.new_page(viewport=size)
        self.page.set_default_timeout(PATIENCE_MS)
        self.strangers: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self._note(request.url, server.address))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.address)
        self.page.wait_for_selector("#rc-upload input[type=file]", state="attached")

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.strangers.append(url)

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#rc-upload input[type=file]", str(path))

    def status(self) -> str:
        return self.page.locator(".rc-status-text").inner_text()

    def until_described(self, name: str) -> str:
        """The caption, once everything about the recording is there."""
        self.page.wait_for_selector(f"text=Done: “{name}” is described.")
        return self.page.locator(".rc-caption").inner_text()

    def looked_up(self) -> list[str]:
        return self.page.locator(".rc-result .rc-text").all_inner_texts()

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("RECAP_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            # Scrolling and fading come to rest first.
            self.page.wait_for_timeout(600)
            self.page.screenshot(path=Path(folder) / f"{name}-{self.size['width']}.png", full_page=True)

    def overflow(self) -> list[str]:
        """Elements that stick out of the page to the right."""
        return self.page.evaluate(
            """[...document.querySelectorAll("body *")]
               .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && e.offsetParent)
               .map((e) => `${e.tagName}.${e.className}`)"""
        )

    def close(self) -> None:
        self.page.close()
        assert self.errors == []
        assert self.strangers == []


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def visit(request, browser, server):
    visit = Visit(browser, server, request.param)
    yield visit
    visit.close()


@pytest.fixture
def three_sounds(tmp_path) -> Path:
    """Sea, a pause, a flute."""
    parts = []
    for name in ("sea", "flute"):
        waveform, rate = load_audio(examples_path() / f"{name}.flac")
        parts += [waveform.mean(axis=0)[: 5 * rate], np.zeros(3 * rate)]
    path = tmp_path / "two sounds.wav"
    soundfile.write(path, np.concatenate(parts[:-1]), rate)
    return path


def test_upload_caption_timeline_explanation_and_own_captions(visit, server, three_sounds):
    visit.screenshot("1-empty")
    start = time.monotonic()
    visit.upload(three_sounds)
    for stage in ("recording", "result", "timeline", "explanation"):
        visit.page.wait_for_selector(f".rc-{stage}")
        print(f"\n{stage} after {time.monotonic() - start:.1f} s")
    caption = visit.until_described("two sounds.wav")
    assert caption.strip()
    assert len(visit.looked_up()) == 4
    # Nothing of the upload is left on the disk, while the page shows and plays it.
    assert server.files() == []
    visit.screenshot("2-described")

    segments = visit.page.locator("button.rc-segment")
    assert segments.count() >= 3
    assert "silence" in segments.nth(1).inner_text()
    segments.nth(2).focus()
    visit.page.keyboard.press("Enter")
    now = "document.querySelector('.rc-player').currentTime"
    wait_until(lambda: visit.page.evaluate(now) > 7.5)
    wait_until(lambda: visit.page.locator(".rc-segment.rc-playing").count() == 1)

    words = visit.page.locator(".rc-words button")
    words.last.click()
    assert words.last.get_attribute("aria-pressed") == "true"
    last = words.count() - 1
    shown = visit.page.locator(f".rc-explanation div[data-map='{last}']")
    assert shown.is_visible()
    assert visit.page.locator(".rc-explanation div[data-map]:visible").count() == 1
    visit.screenshot("3-another-word")

    visit.page.get_by_label("Your own captions, one in each line").fill("a whistle is blown\nchurch bells ring")
    visit.page.get_by_role("button", name="Use my captions").click()
    visit.page.wait_for_selector(".rc-comparison .rc-current")
    visit.until_described("two sounds.wav")
    assert set(visit.looked_up()) == {"a whistle is blown", "church bells ring"}
    compared = visit.page.locator(".rc-comparison dd").all_inner_texts()
    assert compared[0] == caption
    assert compared[1] == visit.page.locator(".rc-caption").inner_text() != caption
    visit.screenshot("4-own-captions")

    visit.page.get_by_label("Domestic (3 captions)").check()
    visit.page.wait_for_selector(".rc-current >> text=Domestic")
    visit.until_described("two sounds.wav")
    assert "a tap drips" in visit.looked_up()
    assert visit.overflow() == []
    visit.page.get_by_role("button", name="Delete this recording").click()
    visit.page.wait_for_selector("text=Deleted.")
    assert not visit.page.locator(".rc-recording").count()


def test_record(visit, server):
    visit.page.get_by_role("tab", name="Record").click()
    visit.page.locator("#rc-record").get_by_role("button", name=re.compile("record", re.IGNORECASE)).first.click()
    visit.page.wait_for_timeout(4_000)
    visit.screenshot("5-recording")
    visit.page.locator("#rc-record").get_by_role("button", name=re.compile("stop", re.IGNORECASE)).first.click()
    caption = visit.until_described("Your recording")
    assert re.search("sea|wave|ocean|surf|rain|water", caption), caption
    assert visit.page.locator(".rc-recording").get_attribute("data-seconds") > "2"
    assert server.files() == []
    assert visit.overflow() == []
    visit.screenshot("6-recorded")


def test_markup_is_shown_as_text(visit):
    visit.page.get_by_label("Your own captions, one in each line").fill(NASTY)
    visit.page.get_by_role("button", name="Use my captions").click()
    visit.page.wait_for_selector("text=Retrieving from: Your own (1 caption)")
    visit.page.get_by_role("button", name="Flute").click()
    visit.until_described("Flute")
    assert visit.looked_up() == [NASTY]
    assert visit.page.locator("img[src=x]").count() == 0
    assert visit.page.title() == "What does it sound like?"
    assert visit.overflow() == []
    visit.screenshot("7-markup")


def test_what_is_refused(visit, server, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF\x10\x00\x00\x00WAVEfmt nonsense" * 20)
    visit.upload(tmp_path / "broken.wav")
    visit.page.wait_for_selector("text=“broken.wav” cannot be read")
    visit.screenshot("8-broken")
    waveform, rate = load_audio(examples_path() / "sea.flac")
    soundfile.write(tmp_path / "long.wav", np.tile(waveform.T[:, :1], (4, 1))[::3], rate // 3)
    visit.upload(tmp_path / "long.wav")
    visit.page.wait_for_selector("text=“long.wav” is longer than 30 seconds")
    assert visit.page.locator(".rc-recording").count() == 0
    wait_until(lambda: server.files() == [])
    assert visit.overflow() == []


DROP_A_FILE = """([name, size]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(size)], name, { type: "audio/wav" }));
    const box = document.querySelector("#rc-upload button");
    for (const type of ["dragenter", "dragover", "drop"])
        box.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def test_an_upload_that_is_too_large_is_refused_aloud_and_not_sent(visit, server, tmp_path):
    sent = []
    visit.page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    notice = visit.page.get_by_role("alert")
    assert notice.count() == 0
    (tmp_path / "huge.wav").write_bytes(bytes(5_000_000))
    visit.upload(tmp_path / "huge.wav")
    visit.page.wait_for_selector("text=“huge.wav” has 5.0 MB; this page accepts 4 MB at most.")
    assert notice.is_visible()
    visit.screenshot("9-huge")
    assert visit.overflow() == []
    # Dropped instead of chosen; markup in a file's name stays text.
    visit.page.evaluate(DROP_A_FILE, ["<b>larger</b>.wav", 4_000_001])
    visit.page.wait_for_selector("text=“<b>larger</b>.wav” has 4.1 MB")
    assert [url for url in sent if "upload" in url] == []
    assert visit.page.locator(".rc-recording").count() == 0
    assert server.files() == []
    # What is small enough is taken as ever, and the notice goes.
    visit.upload(examples_path() / "bass_drum.flac")
    visit.until_described("bass_drum.flac")
    assert not notice.is_visible()
    assert [url for url in sent if "upload" in url]


def test_the_keyboard_reaches_everything_in_order_and_everything_has_a_name(browser, server):
    visit = Visit(browser, server, DESKTOP)
    visit.page.get_by_role("button", name="Sea").click()
    visit.until_described("Sea")
    # The next Tab goes on from what was clicked last: the top of the page.
    visit.page.mouse.click(2, 2)
    reached = []
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        reached.append(
            visit.page.evaluate(
                """(() => { const e = document.activeElement;
                     const name = e.getAttribute("aria-label") || (e.labels && e.labels[0]?.innerText) || e.innerText
                       || e.title || "";
                     return [e.tagName, name.trim().split("\\n")[0]]; })()"""
            )
        )
        if reached[-1][0] == "BODY":
            break
    names = [name for _, name in reached]
    for expected in ("Upload a file", "Sea", "Play Sea", "Your own captions, one in each line", "Use my captions"):
        assert expected in names, reached
    assert [tag for tag, name in reached if not name and tag not in ("BODY", "DIV")] == [], reached
    # What the page is doing is read out.
    region = visit.page.locator("#rc-status")
    assert region.get_attribute("role") == "status"
    assert region.get_attribute("aria-live") == "polite"
    visit.close()


def test_closing_stops_and_leaves_nothing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    server = Server(folder)
    (uploads,) = server.temporary.glob("recap-demo-*")
    (uploads / "left.wav").write_bytes(b"x")
    server.stop()
    assert server.process.returncode == 0
    assert not uploads.exists()
