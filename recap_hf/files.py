"""Writing results: a file is complete or is not there."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`; what was written to it replaces `path` at the end of the block.

    An error or an interruption leaves the earlier file as it was.
    """
    path = Path(path)
    # Names may be as long as the file system takes.
    name = f"{path.name[:40]}.{zlib.crc32(os.fsencode(path.name)):08x}"
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes UTF-8 text like [`replacing`]."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Writes `content` as JSON, like [`write_text`]. Raises `ValueError` for NaN and infinite numbers."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
