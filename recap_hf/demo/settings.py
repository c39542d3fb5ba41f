"""Settings and limits of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Names that the page uses itself.
RESERVED_NAMES = ("none", "built in", "your own")


@dataclass
class DemoSettings:
    """Settings of the page.

    Args:
        model (`str`, *optional*): folder or Hub id of a captioner, default the embedded recap-tiny.
        datastores (`dict[str, str]`, *optional*): further captions to choose from: name on the page to a datastore's
            folder or Hub id, or a file of captions.
        device (`str`, *optional*): default a GPU if there is one.
        max_seconds (`float`, *optional*, defaults to 120): longest recording.
        max_megabytes (`float`, *optional*, defaults to 25): largest upload, in 10^6 bytes.
        max_captions (`int`, *optional*, defaults to 500): most captions that a visitor may paste.
        max_caption_characters (`int`, *optional*, defaults to 300): longest of them.
        keep_minutes (`float`, *optional*, defaults to 30): an idle visitor's recording is forgotten after that.

    Raises:
        `ValueError`: for a limit that is not positive.
    """

    model: str | None = None
    datastores: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    max_seconds: float = 120.0
    max_megabytes: float = 25.0
    max_captions: int = 500
    max_caption_characters: int = 300
    keep_minutes: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_seconds", "max_megabytes", "max_captions", "max_caption_characters", "keep_minutes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")

    @property
    def max_bytes(self) -> int:
        """Largest upload in bytes."""
        return int(self.max_megabytes * 1e6)


def parse_datastores(texts: Sequence[str]) -> dict[str, str]:
    """`["NAME=FOLDER"]` as `{name: folder}`.

    Raises:
        `ValueError`: for a text of another form, a name that the page uses itself, or a name given twice.
    """
    datastores: dict[str, str] = {}
    for text in texts:
        name, _, source = (part.strip() for part in text.partition("="))
        if not (name and source):
            raise ValueError(f"--datastore expects NAME=FOLDER with a name for the page, got {text!r}.")
        if name.lower().startswith(RESERVED_NAMES):
            raise ValueError(f"--datastore: the page itself uses the name {name!r}; give another one.")
        if name in datastores:
            raise ValueError(f"--datastore: the name {name!r} is given twice.")
        datastores[name] = source
    return datastores
