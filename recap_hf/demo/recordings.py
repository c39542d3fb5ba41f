"""Uploads become waveforms in memory, within limits; the file is deleted before it is decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.audio.stream import AudioStream

from .pictures import Picture, draw, player_source


class RefusedError(ValueError):
    """The page does not accept an input; the message is for the visitor."""


@dataclass
class Recording:
    """A visitor's recording.

    Attributes:
        name: its name on the page.
        waveform: float32 of shape `(num_samples,)` at the feature extractor's rate.
        feature_extractor: the model's.
    """

    name: str
    waveform: np.ndarray
    feature_extractor: Any

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.waveform) / self.feature_extractor.sampling_rate

    @cached_property
    def picture(self) -> Picture:
        """Waveform and spectrogram, drawn once."""
        return draw(self.waveform, self.feature_extractor)

    @property
    def source(self) -> str:
        """The recording as a data URI for a player."""
        return player_source(self.waveform, self.feature_extractor.sampling_rate)


def take_upload(path: Path, max_bytes: int) -> bytes:
    """Reads an uploaded file and deletes it in any case. Raises `RefusedError` above `max_bytes`."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise RefusedError("The upload did not arrive. Please try again.") from error
    finally:
        path.unlink(missing_ok=True)
    if len(data) > max_bytes:
        raise RefusedError(f"The file is larger than {max_bytes / 1e6:g} MB. Please choose a shorter recording.")
    return data


def read_waveform(data: bytes, name: str, max_seconds: float, sampling_rate: int) -> np.ndarray:
    """Decodes a recording to mono, block by block: no more than `max_seconds` are ever in memory.

    Raises:
        `RefusedError`: if it is longer, or cannot be read; the message says why.
    """
    # Encoders pad their last packet: a tenth of a second more is accepted.
    left = int((max_seconds + 0.1) * sampling_rate)
    blocks = []
    try:
        for block in AudioStream(data, sampling_rate):
            left -= len(block)
            if left < 0:
                raise RefusedError(
                    f"“{name}” is longer than {duration(max_seconds)}, the maximum here. Please cut out a part."
                )
            blocks.append(block)
    except RefusedError:
        raise
    except ImportError as error:
        raise RefusedError(
            f"“{name}” cannot be read here: m4a, webm and video need a reader that is not installed on this server. "
            "WAV, FLAC, Ogg, Opus and MP3 work."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # Without the reader's name for the data.
        reason = re.sub(r"^(<\d+ bytes>|bytes): ", "", " ".join(str(error).split()))
        if reason.startswith("not a recording that can be read"):
            reason = "it is not a sound file, or it is damaged. WAV, FLAC, Ogg, Opus, MP3 and m4a work"
        raise RefusedError(f"“{name}” cannot be read: {reason.rstrip('.')}.") from error
    return np.concatenate(blocks)


def duration(seconds: float) -> str:
    """A length in words: "30 seconds", "2 minutes"."""
    return f"{seconds:g} seconds" if seconds < 120 else f"{seconds / 60:g} minutes"
