"""`recap demo --export-space`: a folder that is a Hugging Face Space."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from importlib.metadata import requires, version
from pathlib import Path

from .settings import DemoSettings

# In a checkout these packages are outside the folder recap_hf.
_MAPPED = ("modeling", "conversion", "model_cards")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")

_APP = '''"""The page of this Space; `python app.py` serves it here."""

from recap_hf.demo import DemoSettings
from recap_hf.demo.page import launch

launch({settings!r})
'''

_README = """---
title: What does it sound like?
emoji: 👂
colorFrom: green
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
short_description: Audio captions, retrieved from captions you choose
tags:
- audio-captioning
- retrieval-augmented-generation
---

Record or upload a sound and get a caption. The model retrieves captions of similar sounds and generates a new caption
from the sound and from them. Other captions to retrieve from give another caption of the same sound.

Made by `recap demo --export-space`. Recordings stay in the memory of the Space until the page is closed, at most
{keep:g} minutes after they were last used. They are not stored.
"""

_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.npy", "*.flac", "*.faiss")
)


def export_space(folder: str | Path, settings: DemoSettings) -> Path:
    """Writes a Space: `app.py`, `README.md`, `requirements.txt`, this package, and the model and datastores that are
    local; a Hub id is loaded when the Space starts. `hf upload USER/NAME FOLDER --repo-type space` publishes it.

    Raises:
        `FileExistsError`: if the folder is not empty.
        `FileNotFoundError`: if a model or datastore that looks like a path does not exist.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: the folder is not empty; give an empty or a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    model = None if settings.model is None else _bring(settings.model, folder, "model")
    datastores = {
        name: _bring(source, folder, f"datastores/{number}")
        for number, (name, source) in enumerate(settings.datastores.items(), start=1)
    }
    _copy_package(folder / "recap_hf")
    # The device is the Space's.
    app = _APP.format(settings=replace(settings, model=model, datastores=datastores, device=None))
    (folder / "app.py").write_text(app, encoding="utf-8")
    readme = _README.format(gradio=version("gradio"), keep=settings.keep_minutes)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
    (folder / ".gitattributes").write_text(_ATTRIBUTES, encoding="utf-8")
    return folder


def _bring(source: str, folder: Path, name: str) -> str:
    """Copies a local file or folder into the Space and returns its path there; a Hub id stays as it is."""
    path = Path(source)
    if path.is_dir():
        shutil.copytree(path, folder / name, ignore=_LEFT_OUT)
        return name
    if path.is_file():
        target = folder / (name + path.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return name + path.suffix
    if path.suffix or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: neither a folder nor a file here, nor a Hub id such as user/name.")
    return source


def _copy_package(target: Path) -> None:
    package = Path(importlib.util.find_spec("recap_hf").origin).parent
    shutil.copytree(package, target, ignore=_LEFT_OUT)
    for name in _MAPPED:
        source = importlib.util.find_spec(f"recap_hf.{name}").submodule_search_locations[0]
        shutil.copytree(source, target / name, ignore=_LEFT_OUT, dirs_exist_ok=True)


def _requirements() -> list[str]:
    """The requirements of the package and of the page. The Space installs Gradio itself (`sdk_version`)."""
    needed = [requirement for requirement in requires("recap-hf") or () if "extra ==" not in requirement]
    return [*needed, "av>=14", "matplotlib>=3.8"]
