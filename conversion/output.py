"""Where a conversion writes: a folder that appears only when everything in it has been checked."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def finished_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends without an error.

    Args:
        out: the folder to make; it must not hold anything yet.
        overwrite: replace a folder that is there.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty and `overwrite` is false.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise FileExistsError(f"{out} exists; name an empty folder, or pass --overwrite to replace a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        # mkdtemp makes private folders; the result gets the rights that a plain mkdir would give.
        shutil.copymode(out if out.is_dir() else out.parent, scratch)
        yield scratch
        if out.is_dir():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
