"""Uploads become waveforms in memory, within limits; the file is gone before it is decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from recap_hf.audio.stream import AudioStream

from .pictures import Picture, draw


class Refused(ValueError):
    """Something that the page does not take; the message is for the visitor."""


@dataclass
class Recording:
    """A visitor's recording, as long as the page remembers it.

    Attributes:
        name: what the page calls it.
        waveform: float32 of shape `(num_samples,)`.
        sampling_rate: the model's, in Hz.
        low_hz, high_hz: what the model hears of it, and the picture shows.
    """

    name: str
    waveform: np.ndarray
    sampling_rate: int
    low_hz: float = 50.0
    high_hz: float = 14_000.0

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.sampling_rate

    @cached_property
    def picture(self) -> Picture:
        """Waveform and spectrogram, drawn once."""
        return draw(self.waveform, self.sampling_rate, self.low_hz, self.high_hz)


def take_upload(path: Path, max_bytes: int) -> bytes:
    """The bytes of an uploaded file, which is deleted whether they are taken or not.

    Raises:
        `Refused`: if it is larger than `max_bytes`, or gone.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise Refused("The upload did not arrive. Please try again.") from error
    finally:
        path.unlink(missing_ok=True)
    if len(data) > max_bytes:
        raise Refused(f"The file is larger than {max_bytes / 1e6:g} MB. Please choose a shorter recording.")
    return data


def read_waveform(data: bytes, name: str, max_seconds: float, sampling_rate: int) -> np.ndarray:
    """Decodes a recording to mono, block by block: a small file that unpacks to hours is not unpacked.

    Args:
        data: the file.
        name: what to call it.
        max_seconds: longest recording to take.
        sampling_rate: of the result, in Hz.

    Raises:
        `Refused`: if it is longer, or cannot be read; the message says why.
    """
    # Encoders pad their last packet: a tenth of a second is no reason to refuse.
    left = int((max_seconds + 0.1) * sampling_rate)
    blocks = []
    try:
        for block in AudioStream(data, sampling_rate):
            left -= len(block)
            if left < 0:
                break
            blocks.append(block)
    except ImportError as error:
        raise Refused(
            f"“{name}” cannot be read here: m4a, webm and video need a reader that is not installed on this server. "
            "WAV, FLAC, Ogg, Opus and MP3 work."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Refused(f"“{name}” cannot be read: {_reason(error)}") from error
    if left < 0:
        raise Refused(
            f"“{name}” is longer than {duration(max_seconds)}, the most that this page takes. Please cut out the part "
            "that you want described."
        )
    return np.concatenate(blocks)


def _reason(error: Exception) -> str:
    """The reader's reason without its name for the source and without advice for programmers."""
    text = re.sub(r"^(<\d+ bytes>|bytes): ", "", " ".join(str(error).split()))
    if text.startswith("not a recording that can be read"):
        return "it is not a sound file, or it is damaged. WAV, FLAC, Ogg, Opus, MP3 and m4a work."
    return text if text.endswith(".") else f"{text}."


def duration(seconds: float) -> str:
    """A length in words: "30 seconds", "2 minutes"."""
    if seconds < 120:
        return f"{seconds:g} seconds"
    return f"{seconds / 60:g} minutes"
