"""What an installed wheel holds, and that the files about the project tell the truth of today."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import REPOSITORY

from recap_hf import __version__


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


def listed(section: str, key: str) -> list[str]:
    return setup_cfg()[section][key].split()


def test_every_python_folder_is_a_listed_package():
    """`packages` is written by hand: a new folder would silently stay out of the wheel."""
    folders = {
        "recap_cli": "recap_cli",
        "recap_hf": "recap_hf",
        "modeling": "recap_hf.modeling",
        "conversion": "recap_hf.conversion",
    }
    expected = set()
    for folder, package in folders.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.parent.relative_to(REPOSITORY / folder).parts
            if "assets" not in parts and "__pycache__" not in parts:
                expected.add(".".join([package, *parts]))
    data_packages = {"recap_hf.assets", "recap_hf.model_cards"}
    # A folder of data files inside a package, as the evaluate module's, is package data.
    package_data = {"recap_hf.scoring.caption_scores"}
    assert set(listed("options", "packages")) - data_packages == expected - package_data


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## \[?([\d.]+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first
    assert first[1] == __version__


def test_the_licence_is_apache():
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")[:200]


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_their_data(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
        timeout=600,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "modeling/modeling_recap.py",
        "conversion/laion_clap.py",
        "py.typed",
        "assets/recap-tiny/config.json",
    ):
        assert f"recap_hf/{name}" in names
    assert "recap_cli/caption.py" in names
    # Nothing stands at the top but the two packages: benchmarks and recipes are in the repository only.
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"recap_cli", "recap_hf"}
