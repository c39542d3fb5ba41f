"""Where a conversion writes: a folder that appears only when everything in it has been checked."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_OTHERS = ("*_recap.py", "cross_attention.safetensors", "*.onnx", "*.onnx.data", "recap_onnx.json", "mel_filters.npy")
_OTHERS += ("datastore.json", "captions*.jsonl", "embeddings*.npy", "index*.faiss", "vocab.txt")


def _written() -> set[str]:
    """Names, without folders, of what conversions write."""
    from recap_hf.hub.push import CHECKPOINT_FILES, DOCUMENTS

    return {Path(name).name for name in CHECKPOINT_FILES if name not in DOCUMENTS} | {*_OTHERS}


def _is_card(path: Path) -> bool:
    """Whether a file is a card that the package made and nobody edited."""
    from recap_hf.hub.cards import is_unedited

    return path.name == "README.md" and is_unedited(path)


def check_replaceable(out: str | Path, overwrite: bool, documents: Sequence[str] = ()) -> None:
    """Refuses a folder that [`finished_folder`] could not make or replace; see there."""
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise FileExistsError(f"{out} exists; name an empty folder, or pass --overwrite to replace a folder")
    files = (path for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir())
    written = _written() | {*documents}
    foreign = [path for path in files if not any(map(path.match, written)) and not _is_card(path)]
    if foreign:
        raise FileExistsError(f"{foreign[0]} is not a file of a conversion and would be lost; name an empty folder")


@contextlib.contextmanager
def finished_folder(out: str | Path, overwrite: bool = False, documents: Sequence[str] = ()) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends without an error.

    Args:
        out: the folder to make; it must not hold anything yet.
        overwrite: replace a folder that an earlier conversion made.
        documents: names of further files that the caller writes, and may replace.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty and `overwrite` is false, or has files that no
            conversion writes, such as a card that somebody edited.
    """
    out = Path(out)
    check_replaceable(out, overwrite, documents)
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
