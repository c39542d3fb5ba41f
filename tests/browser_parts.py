"""A page opened in a real browser, for the tests that look at it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")
PROBE = """<script>window.onload = () => {
  const players = [...document.querySelectorAll("audio")];
  const plots = [...document.querySelectorAll("figure svg")].filter(plot => {
    const box = plot.getBoundingClientRect();
    return box.width > 200 && box.height > 80 && plot.querySelectorAll("path, use").length > 5;
  });
  Promise.all(players.map(player => new Promise(done => {
    player.addEventListener("loadedmetadata", () => done(player.duration.toFixed(1)));
    player.addEventListener("error", () => done("error"));
    player.preload = "metadata"; player.load();
  }))).then(lengths => {
    document.title = ["probe", document.documentElement.scrollWidth, plots.length, ...lengths].join(" ");
  });
};</script></body>"""


def look_at(page: str, folder: Path) -> tuple[int, int, list[str], np.ndarray]:
    """A page opened in a browser 500 pixels wide: its width, plots drawn, lengths of its players, and a screenshot."""
    probe = folder / "probe.html"
    probe.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,2000"]
    dumped = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=10000", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    _, width, plots, *lengths = re.search(r"<title>(probe [^<]*)</title>", dumped)[1].split()
    picture = folder / "page.png"
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={picture}", probe.as_uri()], capture_output=True, timeout=300, check=True
    )
    from matplotlib.image import imread

    return int(width), int(plots), lengths, imread(picture)[:, :, :3]


def assert_there_is_something_to_see(pixels: np.ndarray) -> None:
    """Text and plots on a light ground: mostly light, and dark or coloured in places from top to bottom."""
    assert pixels.mean() > 0.8
    assert all((band.min(axis=2) < 0.5).any() for band in np.array_split(pixels, 8))
