"""The README's snippets run and print what it says they print; its commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from recap_cli import COMMANDS, build_parser

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    text = "\n".join(body for language, body in BLOCKS if language == "bash").replace("\\\n", " ")
    lines = [line.partition("  #")[0] for line in text.splitlines()]
    return [part.strip() for line in lines for part in re.split(r"&&|\|", line) if part.strip()]


def test_snippets_print_what_the_readme_says(tmp_path):
    """All Python blocks in one process, in order; a text block after one of them is its output."""
    script, expected = [], []
    for index, (language, body) in enumerate(BLOCKS):
        if language == "python":
            script.append(f"{body}\nprint('---', {index})")
        elif language == "text":
            expected.append((index - 1, body.strip()))
    assert len(expected) >= 2
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    printed = {}
    for chunk in re.finditer(r"(.*?)^--- (\d+)$\n?", process.stdout, flags=re.MULTILINE | re.DOTALL):
        printed[int(chunk[2])] = chunk[1].strip()
    for index, text in expected:
        assert printed[index] == text


RECAP_COMMANDS = [command for command in commands() if re.match(r"(\.venv/bin/)?recap ", command)]


@pytest.mark.parametrize("command", RECAP_COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command.partition(" > ")[0])[1:]
    args = build_parser(words[0]).parse_args(words)
    assert args.command == words[0]


def test_training_flags_are_those_of_recap_train():
    launched = [command for command in commands() if command.startswith("accelerate launch train.py")]
    assert launched
    for command in launched:
        words = ["train", *shlex.split(command)[3:]]
        assert build_parser("train").parse_args(words).command == "train"


def test_the_readme_shows_most_commands():
    shown = {command.split()[1] for command in RECAP_COMMANDS}
    assert {"caption", "train", "score", "evaluate", "push", "convert"} <= shown <= set(COMMANDS)


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        path, _, heading = target.partition("#")
        assert (REPOSITORY / path).exists(), target
        if heading:
            text = (REPOSITORY / path).read_text(encoding="utf-8")
            assert heading in {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines()}, target
