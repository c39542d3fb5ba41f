"""SPICE through the jar of `pycocoevalcap`, if the CoreNLP models of its parser are present.

`pycocoevalcap`'s own class downloads those models (about 400 MB), writes its caches into site-packages and fails on
Java 17 and later. Here nothing is downloaded, and newer versions of Java get the flags that they need.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .java import JavaRuntime

MODEL_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# From Java 16 on, the serialisation library of SPICE (FST) needs access to these packages.
_OPENED_PACKAGES = ["lang", "lang.reflect", "math", "net", "nio", "text", "time"]
_OPENED_PACKAGES += ["util", "util.concurrent", "util.concurrent.atomic"]


class SpiceUnavailable(RuntimeError):
    """SPICE cannot be computed here; the message is the reason."""


def find_spice_models(folder: str | os.PathLike | None = None) -> list[Path]:
    """The two CoreNLP 3.6.0 jars, in `folder` or where `pycocoevalcap` keeps them.

    Raises:
        SpiceUnavailable: if a jar is missing; the message says how to get it.
    """
    import pycocoevalcap.spice

    place = Path(folder).expanduser() if folder else Path(pycocoevalcap.spice.__file__).parent / "lib"
    jars = [place / name for name in MODEL_JARS]
    missing = [jar.name for jar in jars if not jar.is_file()]
    if missing:
        raise SpiceUnavailable(
            f"{' and '.join(missing)} not found in {place}: get stanford-corenlp-full-2015-12-09.zip from "
            "https://nlp.stanford.edu/software/, unpack both jars and name their folder (--spice-models DIR)"
        )
    return jars


def spice_command(java: JavaRuntime, jars: Sequence[Path], source: Path, target: Path) -> list[str]:
    """Command line of one SPICE run from the JSON file `source` to `target`."""
    import pycocoevalcap.spice

    home = Path(pycocoevalcap.spice.__file__).parent
    classpath = os.pathsep.join([str(home / "spice-1.0.jar"), str(home / "lib" / "*"), *map(str, jars)])
    opened = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPENED_PACKAGES]
    memory = [*(opened if java.major >= 16 else []), "-Xmx8G"]
    arguments = ["edu.anu.spice.SpiceScorer", str(source), "-out", str(target), "-subset", "-silent"]
    return java.command(*memory, "-cp", classpath, *arguments)


def spice(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    java: JavaRuntime,
    models: str | os.PathLike | None = None,
    timeout_s: float = 3600.0,
) -> np.ndarray:
    """(num_clips,) SPICE F-scores (Anderson et al., 2016) of tokenized captions.

    Args:
        captions, references: one caption and any number of references per clip.
        java: the Java to run; SPICE is known to work with 11.
        models: folder of the CoreNLP jars; default: where `pycocoevalcap` keeps them.
        timeout_s: longest run in seconds.

    Raises:
        SpiceUnavailable: if the models are missing, or the jar fails, times out or leaves out a clip.
    """
    jars = find_spice_models(models)
    pairs = enumerate(zip(captions, references, strict=True))
    clips = [{"image_id": number, "test": caption, "refs": list(refs)} for number, (caption, refs) in pairs]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "captions.json"), Path(folder, "scores.json")
        source.write_text(json.dumps(clips), encoding="utf-8")
        command = spice_command(java, jars, source, target)
        try:
            done = subprocess.run(
                command, cwd=folder, env=java.environment, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise SpiceUnavailable(f"its jar was still running after {timeout_s:g} s") from error
        if done.returncode or not target.is_file():
            said = done.stderr.decode(errors="replace").strip()
            reason = next((line for line in said.splitlines() if "Exception" in line or "Error" in line), said[-300:])
            raise SpiceUnavailable(f"its jar failed on Java {java.version} (exit status {done.returncode}): {reason}")
        return read_spice_output(target, len(captions))


def read_spice_output(path: str | os.PathLike, num_clips: int) -> np.ndarray:
    """(num_clips,) F-scores of all tuples from the JSON file that the jar writes, in order of `image_id`.

    Raises:
        SpiceUnavailable: if a clip has no score.
    """
    values = np.full(num_clips, math.nan)
    for item in json.loads(Path(path).read_text(encoding="utf-8")):
        score = item["scores"]["All"]["f"]
        values[int(item["image_id"])] = math.nan if score is None else float(score)
    empty = np.flatnonzero(np.isnan(values))
    if len(empty):
        raise SpiceUnavailable(
            f"its jar gave no score for {len(empty)} of {num_clips} clips (first: number {empty[0]})"
        )
    return values
