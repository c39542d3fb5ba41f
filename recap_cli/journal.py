"""Results that are done, in a file beside the output, so that an interrupted run goes on.

This module imports the standard library only.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    # Windows.
    fcntl = None


class Journal(contextlib.AbstractContextManager):
    """The results of a run: its settings in the first line, then a line for each group of recordings that were
    captioned together. A line that a kill cut off is dropped with its whole group: the groups of the next run, and
    with them the last digits of its scores, are those of a run without interruption.

    Args:
        path: of the file, which is made if it is not there.
        settings: names and values that change results; compared with those in the file.
        anyway: go on with other settings than those of the file.

    Raises:
        `ValueError`: for other settings, a file of another kind, or one that another run writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], anyway: bool = False) -> None:
        self.path = path
        self.changed = ""
        # Of each recording the place of its line, and of its result in it.
        self._places: dict[str, tuple[int, int]] = {}
        self._failed: set[str] = set()
        self._line: tuple[int, list[Any]] = (-1, [])
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            self._open(dict(settings), anyway)
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _open(self, settings: dict[str, Any], anyway: bool) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"{self.path}: another run writes there: wait for its end") from error
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                # Cut off by a kill.
                break
            try:
                content = json.loads(line)
                if number == 0:
                    self._compare(content["settings"], settings, anyway)
                else:
                    self._index(place, content["results"])
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                hint = "delete it to start over, or give another --output"
                raise ValueError(f"{self.path}, line {number + 1}: not written by --resume: {hint}") from error
            place += len(line)
        self._file.truncate(place)
        if place == 0:
            self._append({"settings": settings})

    def _compare(self, earlier: dict[str, Any], settings: dict[str, Any], anyway: bool) -> None:
        names = [name for name in {**settings, **earlier} if settings.get(name) != earlier.get(name)]
        default = "the default"
        pairs = ((name, earlier.get(name, default), settings.get(name, default)) for name in names)
        self.changed = "; ".join(f"{name} was {before}, is {now}" for name, before, now in pairs)
        if self.changed and not anyway:
            hint = f"--resume-anyway goes on with both, and without {self.path} the run starts over"
            raise ValueError(f"--resume: the earlier results have other settings ({self.changed}): {hint}")

    def _index(self, place: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            self._places[row["file"]] = (place, number)
            (self._failed.add if "error" in row else self._failed.discard)(row["file"])

    def left(self, names: Iterable[str]) -> list[str]:
        """The recordings that have no caption yet; one that could not be read is tried again."""
        return [name for name in dict.fromkeys(names) if name not in self._places or name in self._failed]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds the results of recordings that were captioned together, each with its `file`; on the disk at once."""
        self._index(self._append({"results": list(rows)}), rows)

    def _append(self, content: Any) -> int:
        place = self._file.seek(0, os.SEEK_END)
        # ASCII: a file name may hold bytes that are not UTF-8.
        self._file.write(json.dumps(content).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return place

    def row(self, name: str) -> dict[str, Any]:
        """The result of a recording."""
        place, number = self._places[name]
        if self._line[0] != place:
            self._file.seek(place)
            self._line = (place, json.loads(self._file.readline())["results"])
        return {key: value for key, value in self._line[1][number].items() if key != "file"}
