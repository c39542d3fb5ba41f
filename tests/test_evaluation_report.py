"""The HTML page about a run: complete, self-contained, and safe whatever stands in a caption."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from browser_parts import assert_there_is_something_to_see, look_at, needs_browser

from recap_cli import main
from recap_hf import CaptionResult
from recap_hf.evaluation import EvaluationFolder, score_folder

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pycocoevalcap", "matplotlib")),
    reason='needs pycocoevalcap and matplotlib: pip install "recap-hf[eval,report]"',
)
SCRIPT = "<script>alert('caption')</script>"
CAPTIONS = ("a dog barks", "rain falls on a roof", SCRIPT, "a violin plays", "a clock ticks", "wind & waves")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of two systems on six clips, one with markup in its captions."""
    path = tmp_path_factory.mktemp("run")
    captioner = {"options": {"k": 1, "num_beams": 3}, "datastore": {"captions": 6}}
    names = {"model": "a model", "datastore": "a datastore"}
    run = EvaluationFolder(
        path, {"num_clips": 6, "captioner": captioner, "names": names}, ["recap", "first_retrieved"], 6
    )
    hits = [{"caption": text, "score": 0.1 * number, "source": "shop"} for number, text in enumerate(CAPTIONS)]
    rotated = [*CAPTIONS[1:], CAPTIONS[0]]
    run.append(
        [f"clip {number}.wav" for number in range(6)],
        [[text, text + " today"] for text in CAPTIONS],
        {
            "recap": [
                CaptionResult(text, 0.5, [hit]) for text, hit in zip((*CAPTIONS[:4], *rotated[4:]), hits, strict=True)
            ],
            "first_retrieved": [CaptionResult(text, 0.5, [hit]) for text, hit in zip(rotated, hits, strict=True)],
        },
    )
    score_folder(run, "six clips", resamples=100, metrics=("bleu", "rouge_l", "cider_d"), pretokenized=True)
    generator = np.random.default_rng(0)
    for number in range(5):
        soundfile.write(path / f"clip {number}.wav", 0.1 * generator.normal(size=(8_000, 2)), 16_000)
    return path


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(folder):
    output = folder / "page.html"
    assert main(["report", str(folder), "--output", str(output), "--audio-dir", str(folder), "--clips", "3"]) == 0
    return output.read_text(encoding="utf-8")


def test_page_needs_nothing_from_elsewhere(page):
    parsed = Page(page)
    assert all(source.startswith(("data:", "#")) for source in parsed.sources)
    assert "http://" not in re.sub(
        r'xmlns[^"]*="[^"]*"|"http://www\.w3\.org[^"]*"|http://purl[^"<]*|http://creativecommons[^"<]*', "", page
    )


def test_page_holds_tables_plots_and_clips(page):
    parsed = Page(page)
    assert parsed.tags.count("svg") == 3 and parsed.tags.count("article") == 6
    text = " ".join(parsed.texts)
    for expected in (
        "six clips",
        "first_retrieved",
        "CIDEr-D",
        "Best clips",
        "Worst clips",
        "a datastore",
        "shop",
        "today",
    ):
        assert expected in text, expected
    assert "spice" not in text


def test_players_play_the_recordings(page):
    players = re.findall(r'<audio[^>]*src="data:audio/mpeg;base64,([^"]+)"', page)
    # Five of the six recordings are there.
    assert len(players) == 5
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(players[0])))
    assert rate == 32_000 and len(waveform) / rate == pytest.approx(0.5, abs=0.1)


def test_captions_are_escaped(page):
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;" in page and "wind &amp; waves" in page


def test_page_is_the_same_every_time(folder, page):
    again = folder / "again.html"
    assert main(["report", str(folder), "--output", str(again), "--audio-dir", str(folder), "--clips", "3"]) == 0
    assert again.read_text(encoding="utf-8") == page


def test_a_file_of_the_run_is_no_output(folder, capsys):
    before = (folder / "scores.json").read_bytes()
    assert main(["report", str(folder), "--output", str(folder / "scores.json")]) == 1
    assert "--output names the input file" in capsys.readouterr().err
    assert (folder / "scores.json").read_bytes() == before


def test_folder_without_scores_is_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({}))
    assert main(["report", str(tmp_path)]) == 1
    assert "has no scores.json: run `recap evaluate` there first" in capsys.readouterr().err


@pytest.mark.slow
@needs_browser
def test_page_in_a_browser(page, tmp_path):
    """Players decode, plots are drawn, nothing is wider than a phone, and there is something to see."""
    width, plots, lengths, pixels = look_at(page, tmp_path)
    assert width <= 500 and plots == 3
    assert lengths == ["0.5"] * 5
    assert_there_is_something_to_see(pixels)
