"""Input and output of commands: standard streams, result files, text for terminals and spreadsheets.

This module imports the standard library only.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

# Control characters, which terminals obey, and the surrogates of bytes in a file name that are not UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SUFFIXES = {f".{name}": name for name in ("json", "jsonl", "csv", "srt", "vtt", "m3u", "edl")}
_SUFFIXES |= {".txt": "text", ".m3u8": "m3u"}
# Formats that have no suffix of their own.
_WRITTEN_AS = {"label-studio": "json"}
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def standard_input() -> IO[bytes]:
    """Standard input in bytes. Raises `OSError` if it is closed."""
    if sys.stdin is None:
        raise OSError("standard input is closed: give a file instead of -")
    return sys.stdin.buffer


def check_output(output: str | Path | None, *inputs: str | Path | None, suffix: str | None = None) -> None:
    """Raises `ValueError` if the file `output` is one of the input files, is a folder, has another suffix than
    `suffix`, or its folder does not exist. `None` is no file."""
    if output is None:
        return
    target = Path(output)
    if not target.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {target.parent}: make it first")
    if target.is_dir():
        raise ValueError(f"--output {output} is a folder: give a file")
    for each in filter(None, inputs):
        if target.exists() and os.path.exists(each) and os.path.samefile(each, target):
            raise ValueError(f"--output names the input file {each}: give another file")
    if suffix and target.suffix.lower() != suffix:
        raise ValueError(f"--output {output}: a {suffix} file is written; give it that suffix")


def format_of(output: str | None, given: str | None, formats: Collection[str]) -> str:
    """The format of results: `given` (`--format`), else that of the suffix of the file `output`, else text.

    Raises:
        `ValueError`: for a suffix of none of `formats`, or of another than `given`.
    """
    suffix = Path(output or "").suffix.lower()
    inferred = _SUFFIXES.get(suffix)
    if given is None and suffix and inferred not in formats:
        hint = f"give --format {'|'.join(formats)}"
        hint = "recap timeline writes subtitles" if inferred in ("srt", "vtt") else hint
        raise ValueError(f"--output {output}: no format has the suffix {suffix}: {hint}")
    if given is not None and inferred not in (None, given, _WRITTEN_AS.get(given), "text"):
        raise ValueError(f"--output {output} and --format {given} contradict each other: change one of them")
    return given or inferred or "text"


class NoResult(Exception):
    """Raised in the block of `open_output`, which ends then without an error: no recording gave a result."""


@contextlib.contextmanager
def open_output(path: str | os.PathLike | None) -> Iterator[IO[str]]:
    """A text file for results, UTF-8; standard output if `path` is `None`.

    The results are written to `PATH.partial`, which becomes `PATH` at the end. After Ctrl-C or an error an older
    file is as it was, and the results so far, if there are any, stay in `PATH.partial`. After [`NoResult`] an older
    file is as it was, too.

    Raises:
        `OSError`: if standard output is closed, or the file cannot be written.
    """
    if path is None:
        if sys.stdout is None:
            raise OSError("standard output is closed: give --output FILE")
        with contextlib.suppress(NoResult):
            yield sys.stdout
        return
    # A link stays a link, and a device or a pipe is written to directly.
    target = Path(path).resolve()
    special = target.exists() and not target.is_file()
    partial = target if special else target.with_name(f"{target.name}.partial")
    try:
        # Line by line: a killed run leaves all that it had.
        with open(partial, "w", buffering=1, encoding="utf-8", newline="") as file:
            yield file
    except NoResult:
        if target.is_file() and not special:
            partial.unlink()
            print(f"{printable(str(target))} stays as it was: there is no result to write", file=sys.stderr)
            return
    except BaseException:
        if not special and partial.is_file():
            if partial.stat().st_size:
                print(f"The results so far are in {printable(str(partial))}", file=sys.stderr)
            else:
                partial.unlink()
        raise
    if not special:
        os.replace(partial, target)


def printable(text: str) -> str:
    """`text` in one line without control characters: they are shown as escapes, such as `\\x1b`."""
    return _UNPRINTABLE.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    # A surrogate from a file name stands for one byte.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def json_text(value: Any, file: IO[str]) -> str:
    """JSON in one line, with `\\uXXXX` for control characters, surrogates, and all that is not ASCII where the
    encoding of `file` is not UTF-8."""
    text = json.dumps(value, ensure_ascii=(file.encoding or "utf-8").lower().replace("-", "") != "utf8")
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def encodable(text: str, file: IO[str]) -> str:
    """`text` with escapes for the characters that the encoding of `file` lacks."""
    encoding = file.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def spreadsheet_cell(text: str) -> str:
    """A CSV cell that no spreadsheet runs as a formula: `'` stands before a leading `=`, `+`, `-` or `@`."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
