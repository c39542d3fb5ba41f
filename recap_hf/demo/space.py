"""`recap demo --export-space`: a folder that is a Hugging Face Space."""

from __future__ import annotations

import importlib.util
import shutil
from importlib.metadata import requires, version
from pathlib import Path

from .settings import DemoSettings

# Sub-packages of their own places in a checkout; inside an installed package they are folders like the others.
_MAPPED = ("modeling", "conversion", "model_cards")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")

_APP = '''"""The page of this Space; `python app.py` serves it here."""

from recap_hf.demo import DemoSettings
from recap_hf.demo.page import launch

launch(
    DemoSettings(
        model={model!r},
        datastores={datastores!r},
        max_seconds={max_seconds!r},
        max_megabytes={max_megabytes!r},
        max_captions={max_captions!r},
        keep_minutes={keep_minutes!r},
    )
)
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
short_description: Sounds described in a sentence, by captions you choose
tags:
- audio-captioning
- retrieval-augmented-generation
---

Record or upload a sound and read it described in a sentence. The captioner looks up what similar sounds have been
called before it writes; change what it looks up, and it calls the same sound something else.

Made by `recap demo --export-space`. Recordings stay in the Space's memory until the page is closed, at most
{keep:g} minutes after they were last used, and are never written to a disk that is kept.
"""

_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.npy", "*.flac", "*.faiss")
)


def export_space(folder: str | Path, settings: DemoSettings) -> Path:
    """Writes everything that a Space needs: `app.py`, `README.md`, `requirements.txt`, this package, what is local.

    The package travels as it is installed here, so that the Space runs what was tried here. A model or datastore that
    is a folder or file is copied; a Hub id stays one and is loaded when the Space starts.

    Args:
        folder: must not exist, or be empty.
        settings ([`DemoSettings`]): what the Space is to run with; its device is the Space's own.

    Returns:
        `Path`: the folder. `hf upload USER/NAME FOLDER --repo-type space` makes a Space of it.

    Raises:
        `FileExistsError`: if there is something in the folder.
        `FileNotFoundError`: if a model or datastore that looks like a path is not there.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: there is something already; name a folder that is empty or not there.")
    folder.mkdir(parents=True, exist_ok=True)
    model = None if settings.model is None else _bring(settings.model, folder, "model")
    datastores = {
        name: _bring(source, folder, f"datastores/{number}")
        for number, (name, source) in enumerate(settings.datastores.items(), start=1)
    }
    _copy_package(folder / "recap_hf")
    app = _APP.format(
        model=model,
        datastores=datastores,
        max_seconds=settings.max_seconds,
        max_megabytes=settings.max_megabytes,
        max_captions=settings.max_captions,
        keep_minutes=settings.keep_minutes,
    )
    (folder / "app.py").write_text(app, encoding="utf-8")
    readme = _README.format(gradio=version("gradio"), keep=settings.keep_minutes)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
    (folder / ".gitattributes").write_text(_ATTRIBUTES, encoding="utf-8")
    return folder


def _bring(source: str, folder: Path, name: str) -> str:
    """Copies what is local into the Space and says where it is there; a Hub id stays itself."""
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
    """What the package itself and its page need, without the package; the Space brings Gradio by `sdk_version`."""
    needed = [requirement for requirement in requires("recap-hf") or () if "extra ==" not in requirement]
    return [*needed, "av>=14", "matplotlib>=3.8"]
