"""Writing results: a file is complete or is not there, and an output never replaces an input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes UTF-8 text beside `path` and renames it: an interrupted process leaves the earlier file as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Writes `content` as JSON, like [`write_text`]. Raises `ValueError` for NaN and infinite numbers."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def refuse_input_as_output(output: str | os.PathLike | None, *inputs: str | os.PathLike | None) -> None:
    """Raises `ValueError` if the file `output` is one of the files `inputs`, under whatever name; None is no file."""
    for source in inputs:
        if (
            output
            and source
            and os.path.exists(output)
            and os.path.exists(source)
            and os.path.samefile(output, source)
        ):
            raise ValueError(f"--output names the input file {source}; choose another file")
