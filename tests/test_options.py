"""One description of the options: a field that is added to `CaptionOptions` is known everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

FIELD = '    zest: int | None = _option(DECODING, int, "a new option", minimum=3)\n'
CAPTIONING = ("caption", "timeline", "live", "explain", "evaluate")
SCRIPT = """
import json, sys

from recap_cli import build_parser

parsers = {}
for command in json.loads(sys.argv[1]):
    actions = build_parser(command)._subparsers._group_actions[0].choices[command]._actions
    parsers[command] = [action.help for action in actions if "--zest" in action.option_strings]

from recap_hf.evaluation.grid_config import make_grid
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.modeling.pipeline_recap import AudioCaptioningPipeline

pipeline = AudioCaptioningPipeline.__new__(AudioCaptioningPipeline)
_, forward, _ = AudioCaptioningPipeline._sanitize_parameters(pipeline, zest=5)
try:
    CaptionOptions.from_dict({"zest": 2})
    error = None
except ValueError as refused:
    error = str(refused)
print(json.dumps({
    "parsers": parsers,
    "from_dict": CaptionOptions.from_dict({"zest": 5}).to_dict(),
    "generate": CaptionOptions(zest=5).generate_kwargs(),
    "pipeline": repr(forward),
    "yaml": make_grid({"domains": {"a": {"dataset": "clotho"}}, "evaluation": {"zest": 5}}).caption_options.to_dict(),
    "error": error,
}))
"""


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What a copy of the packages says about an option that is added to `CaptionOptions` alone."""
    root = tmp_path_factory.mktemp("copy")
    no_weights = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npy", "*.flac")
    shutil.copytree(REPOSITORY / "recap_cli", root / "recap_cli", ignore=no_weights)
    shutil.copytree(REPOSITORY / "recap_hf", root / "recap_hf", ignore=no_weights)
    for name in ("modeling", "conversion"):
        shutil.copytree(REPOSITORY / name, root / "recap_hf" / name, ignore=no_weights)
    options = root / "recap_hf" / "modeling" / "options_recap.py"
    text = options.read_text(encoding="utf-8")
    place = text.index("    rerank: str | None")
    options.write_text(text[:place] + FIELD + text[place:], encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CAPTIONING)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("command", CAPTIONING)
def test_every_command_that_captions_has_the_flag(known, command):
    assert known["parsers"][command] == ["a new option"]


def test_the_pipeline_takes_the_keyword(known):
    assert "zest=5" in known["pipeline"]


def test_the_yaml_of_a_grid_takes_the_key(known):
    assert known["yaml"] == {"zest": 5}


def test_mappings_and_generation_know_it(known):
    assert known["from_dict"] == known["generate"] == {"zest": 5}
    assert known["error"] == "`zest` must be an integer of at least 3, got 2."
