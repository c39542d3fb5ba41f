"""The retrieval prompt: the retrieved captions in a sentence that the language model continues."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PLACEHOLDER = "{captions}"
_FINAL_PUNCTUATION = " .!?,;:"


def clean_caption(caption: str) -> str:
    """A caption as it stands in a prompt: white space folded, final punctuation gone, the rest verbatim.

    >>> clean_caption(" A dog  barks, twice. ")
    'A dog barks, twice'
    """
    return " ".join(caption.split()).rstrip(_FINAL_PUNCTUATION)


@dataclass(frozen=True)
class PromptTemplate:
    """The words around the retrieved captions.

    Args:
        template (`str`): the prompt with `{captions}` once, where the captions go, and words after it.
        separator (`str`): what stands between two captions.
        without_captions (`str`): the prompt when nothing was retrieved. It ends as `template` does.
        target_prefix (`str`): what joins prompt and caption when the target of the training is tokenized.

    Raises:
        `ValueError`: if the template has no place for the captions, no words after them, or another ending than
            `without_captions`: the ending is what tells the caption from the prompt in a generated text.
    """

    template: str
    separator: str
    without_captions: str
    target_prefix: str

    def __post_init__(self) -> None:
        if self.template.count(_PLACEHOLDER) != 1:
            raise ValueError(f"`prompt_template` must contain {_PLACEHOLDER!r} exactly once, got {self.template!r}.")
        if not self.ending:
            raise ValueError(
                f"`prompt_template` needs words after {_PLACEHOLDER!r}, which tell the caption from the prompt; got "
                f"{self.template!r}."
            )
        if not self.without_captions.rstrip().endswith(self.ending):
            raise ValueError(
                f"`prompt_without_captions` must end as `prompt_template` does, in {self.ending!r}; got "
                f"{self.without_captions!r}."
            )

    @classmethod
    def of(cls, settings: Any) -> PromptTemplate:
        """The template in the fields `prompt_template`, `caption_separator`, ... of a configuration or a processor."""
        return cls(
            template=settings.prompt_template,
            separator=settings.caption_separator,
            without_captions=settings.prompt_without_captions,
            target_prefix=settings.target_prefix,
        )

    @property
    def ending(self) -> str:
        """The words after the captions, without the punctuation and white space around them."""
        return self.template.partition(_PLACEHOLDER)[2].strip().lstrip(_FINAL_PUNCTUATION)

    def build(self, captions: Sequence[str]) -> str:
        """The prompt of `captions`, most similar first."""
        cleaned = [self._without_ending(clean_caption(caption)) for caption in captions]
        cleaned = [caption for caption in cleaned if caption]
        if not cleaned:
            return self.without_captions
        # Not str.format: a caption or a template may hold braces.
        return self.template.replace(_PLACEHOLDER, self.separator.join(cleaned))

    def places(self, captions: Sequence[str]) -> list[tuple[int, int]]:
        """First and last character (exclusive) of each caption in `build(captions)`; equal for one that is empty."""
        place = self.template.index(_PLACEHOLDER)
        places, separator = [], ""
        for caption in captions:
            cleaned = self._without_ending(clean_caption(caption))
            if not cleaned:
                places.append((place, place))
                continue
            place += len(separator)
            places.append((place, place + len(cleaned)))
            place += len(cleaned)
            separator = self.separator
        return places

    def strip(self, text: str) -> str:
        """The caption in a generated `text`: what follows the first ending of a prompt, or all where there is none."""
        _, found, caption = text.partition(self.ending)
        return (caption if found else text).strip()

    def _without_ending(self, caption: str) -> str:
        # A retrieved caption that held the ending would make `strip` cut in the wrong place.
        return " ".join(re.sub(re.escape(self.ending), " ", caption).split())


PAPER_PROMPT = PromptTemplate(
    template="Audios similar to this audio sounds like: {captions}. This audio sounds like:",
    separator=", ",
    without_captions="This audio sounds like:",
    target_prefix=" ",
)
"""Section 3.1 of the paper, to the letter."""

OFFICIAL_PROMPT = PromptTemplate(
    template="Similar audios sound like\n\n{captions}\n\nThis audio sounds like ",
    separator="\n\n",
    without_captions="This audio sounds like ",
    target_prefix="",
)
"""The authors' code (Sreyan88/RECAP, commit 832ad8a), which goes with pad token `!` and end token `.`."""

PROMPT_PRESETS = {"paper": PAPER_PROMPT, "official": OFFICIAL_PROMPT}
OFFICIAL_SPECIAL_TOKENS = {"pad_token": "!", "eos_token": "."}

__all__ = [
    "OFFICIAL_PROMPT",
    "OFFICIAL_SPECIAL_TOKENS",
    "PAPER_PROMPT",
    "PROMPT_PRESETS",
    "PromptTemplate",
    "clean_caption",
]
