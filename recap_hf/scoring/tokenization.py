"""The PTB tokenizer of the COCO caption evaluation, run safely.

The jar, its options and the list of punctuation are `pycocoevalcap`'s. Its Python wrapper is not used, because it
takes whatever `java` is on the PATH, writes into site-packages, and shifts every later caption by a line when one
holds a line break that Java knows and Python's `\\n` does not (form feed, U+2028, ...).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from .java import JavaRuntime, require_pycocoevalcap

TOKENIZER_NAME = "PTBTokenizer (Stanford CoreNLP 3.4.1, lower case, punctuation removed)"


def squeeze(text: str) -> str:
    """`text` on one line, its white space reduced to single blanks."""
    return " ".join(text.split())


def ptb_tokenize(captions: Sequence[str], java: JavaRuntime) -> list[str]:
    """Captions as the COCO caption evaluation sees them: PTB tokens, lower case, no punctuation, joined by blanks.

    Args:
        captions: any text; an empty caption, or one of punctuation alone, becomes the empty string.
        java: the Java to run.

    Raises:
        ImportError: if `pycocoevalcap` is not installed.
        RuntimeError: if the tokenizer fails.
    """
    require_pycocoevalcap()
    from pycocoevalcap.tokenizer import ptbtokenizer

    if not captions:
        return []
    lines = "\n".join(squeeze(caption) for caption in captions) + "\n"
    done = subprocess.run(
        java.command(
            "-cp",
            ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
        ),
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
