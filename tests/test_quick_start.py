"""A quick start: what is passed by, that it is there when it is used, and that captions come out the same."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from recap_hf.assets import examples_path
from recap_hf.loading import load_from_folder, load_pair
from recap_hf.quick_start import DEFERRED, DeferredName, quick_start

HEAVY = """
    LOADED = True
    class Thing:
        pass
    class Child(Thing):
        pass
    def double(number):
        return 2 * number
    def louder(function):
        return lambda *args: function(*args) + 100
    __version__ = "1.2"
"""


@pytest.fixture
def heavy(tmp_path, monkeypatch):
    """A package that must not be imported early, and a module that takes names from it as transformers' do."""
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("from heavy_package.parts import *\n")
    (package / "parts.py").write_text(textwrap.dedent(HEAVY))
    (tmp_path / "light_module.py").write_text(
        textwrap.dedent("""
        import heavy_package.parts
        from heavy_package.parts import Thing, double, louder

        def is_thing(value: Thing | None = None):
            return isinstance(value, Thing)

        class Holder:
            @louder
            def number(self):
                return 7
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith(("heavy_package", "light_module"))]:
        del sys.modules[name]


def test_names_wait_until_they_are_used(heavy):
    with quick_start(["heavy_package"]):
        import light_module
    assert "heavy_package" not in sys.modules and "heavy_package.parts" not in sys.modules
    assert light_module.is_thing(3) is False
    assert "heavy_package.parts" not in sys.modules, "nothing can be an instance of what nobody has imported"
    assert light_module.double(4) == 8
    import heavy_package.parts

    assert heavy_package.parts.LOADED
    assert light_module.is_thing(heavy_package.parts.Child()) is True
    assert issubclass(heavy_package.parts.Child, light_module.Thing)
    # As a method: `self` arrives.
    assert light_module.Holder().number() == 107


def test_what_is_needed_inside_is_imported_inside(heavy):
    with quick_start(["heavy_package"]):
        from heavy_package import parts
        from heavy_package.parts import Thing

        assert isinstance(Thing, DeferredName)

        class Other(Thing):
            pass

        assert parts.double(2) == 4
    assert Other.__mro__[1].__name__ == "Thing"


def test_a_version_is_asked_of_the_package_itself(heavy):
    with quick_start(["heavy_package"]):
        import heavy_package.parts as parts

        assert parts.__version__ == "1.2"
        with pytest.raises(AttributeError):
            _ = parts.__wrapped__


def test_nothing_is_left_behind(heavy):
    finders, enabled = list(sys.meta_path), gc.isenabled()
    with pytest.raises(KeyError), quick_start(["heavy_package"]):
        import heavy_package  # noqa: F401

        assert not gc.isenabled()
        raise KeyError
    assert sys.meta_path == finders and gc.isenabled() == enabled
    assert "heavy_package" not in sys.modules


def test_what_is_imported_already_stays(heavy):
    import heavy_package.parts

    with quick_start(["heavy_package"]):
        from heavy_package.parts import double
    assert double is heavy_package.parts.double


def test_recap_caption_imports_neither_compiler_nor_sympy(sound_example):
    """In a process of its own, as a user has it, and with the caption that the pipeline gives."""
    code = f"""
        import json, sys
        from recap_hf.cli import main
        status = main(["caption", {str(sound_example)!r}, "--device", "cpu", "--format", "json"])
        names = [*{DEFERRED!r}, "sympy"]
        print(json.dumps([status, [name for name in names if name in sys.modules]]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []]
    from recap_hf import AudioCaptioningPipeline

    model, processor = load_pair(device="cpu")
    expected = AudioCaptioningPipeline(model, processor=processor)(str(sound_example))
    assert json.loads("\n".join(printed))[0]["caption"] == expected["caption"]


@pytest.fixture
def sound_example():
    """A recording that comes with the package."""
    return examples_path() / "sea.flac"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_folder_is_loaded_as_from_pretrained_does(model_folder, dtype):
    from recap_hf import RecapForConditionalGeneration

    found = load_from_folder(model_folder, dtype)
    expected = RecapForConditionalGeneration.from_pretrained(model_folder, **({"dtype": dtype} if dtype else {}))
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (found, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert found.decoder.lm_head.weight is found.decoder.transformer.wte.weight
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config == expected.generation_config
    assert found.dtype == expected.dtype and found.name_or_path == expected.name_or_path


def test_what_does_not_fit_is_left_to_from_pretrained(model_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    assert load_from_folder(str(tmp_path)) is None
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_attn.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    assert load_from_folder(str(folder)) is None
    save_file({**weights, "more": torch.zeros(1)}, folder / "model.safetensors")
    assert load_from_folder(str(folder)) is None
