"""The recordings that the names on a command line stand for."""

import glob
from collections.abc import Sequence
from pathlib import Path

# fmt: off
AUDIO_SUFFIXES = frozenset((
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf",
    ".w64", ".rf64", ".m4a", ".aac", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wma", ".amr", ".3gp",
))
# fmt: on
STANDARD_INPUT = "-"


def expand_inputs(names: Sequence[str], recursive: bool = True) -> list[str]:
    """The recordings that the names on a command line stand for.

    Args:
        names (`Sequence[str]`): files, folders (all entries with an audio suffix in them and below, sorted, without
            `._` files of macOS, pipes and devices), glob patterns, URLs, and `-` for standard input.
        recursive (`bool`, *optional*, defaults to `True`): whether folders in folders are read, too.

    Raises:
        `ValueError`: if a folder has no recordings, a pattern matches nothing, or a name is empty.
    """
    files: list[str] = []
    for name in names:
        if not name:
            raise ValueError("an empty name was given; expected a file, a folder, a pattern, a URL or -")
        path, found, problem = Path(name), [name], ""
        if name == STANDARD_INPUT or "://" in name or path.is_file():
            pass
        elif path.is_dir() and path.suffix.lower() not in AUDIO_SUFFIXES:
            found = sorted(str(entry) for entry in path.glob("**/*" if recursive else "*") if _may_be_recording(entry))
            problem = f"no recordings in this folder (of {', '.join(sorted(AUDIO_SUFFIXES))})"
        elif glob.has_magic(name):
            found, problem = sorted(glob.glob(name, recursive=True)), "no file matches this pattern"
        if not found:
            raise ValueError(f"{name}: {problem}")
        files += found
    return files


def _may_be_recording(path: Path) -> bool:
    if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith("._"):
        return False
    # Folders named like a recording and broken links are listed: their names are reported with an error.
    return path.is_file() or path.is_dir() or path.is_symlink()


def reason_of(name: str, error: Exception) -> str:
    """Why a recording could not be read, in one line without its name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror[0].lower()}{error.strerror[1:]}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{name}: ")
