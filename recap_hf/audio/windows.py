"""The windows of a recording that hold sound, and their features by the audio tower of a CLAP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.audio_recap import is_silent
from recap_hf.modeling.captioning_recap import READ_ERRORS

from .stream import AudioStream

# Windows in a pass of the audio tower.
WINDOWS_TOGETHER = 16


class UnreadableError(Exception):
    """A recording cannot be read; its cause says why."""


@dataclass(frozen=True)
class Window:
    """Samples from `start` on; those before `covered` are in the window before, too."""

    start: int
    samples: np.ndarray
    covered: int


def sound_windows(recording: Any, extractor: Any) -> Iterator[Window]:
    """The windows of a recording that hold sound, as the feature extractor cuts them: the last ends with it.

    Args:
        recording: what [`AudioStream`] takes; it is read block by block.
        extractor ([`RecapFeatureExtractor`]): of the CLAP.

    Raises:
        [`UnreadableError`]
    """
    length, held, start = int(extractor.nb_max_samples), np.zeros(0, dtype=np.float32), 0
    try:
        for block in AudioStream(recording, extractor.sampling_rate):
            held = np.concatenate([held, block])
            # The last but one may overlap the last: it waits until there are two.
            while len(held) >= 2 * length:
                if not is_silent(held[:length]):
                    yield Window(start, held[:length], start)
                held, start = held[length:], start + length
    except READ_ERRORS as error:
        raise UnreadableError from error
    covered = start
    for offset in extractor.window_starts(len(held)):
        window = held[offset : offset + length]
        if not is_silent(window):
            yield Window(start + offset, window, covered)
        covered = start + offset + length


def window_features(clap: Any, extractor: Any, windows: Sequence[Window]) -> torch.Tensor:
    """The audio tower's features of windows, `(windows, patches, d)`."""
    parameter, rate = next(clap.audio_model.parameters()), extractor.sampling_rate
    samples = [window.samples for window in windows]
    mel = extractor(samples, sampling_rate=rate, return_tensors="pt", device=parameter.device)
    return clap.audio_features(mel["input_features"].to(parameter.dtype))


def sounding_parts(
    extractor: Any, windows: Sequence[Window], features: torch.Tensor, parts: int
) -> tuple[list[tuple[float, float]], np.ndarray]:
    """Start and end in seconds of the parts of windows that count, and which do, `(windows, parts)`: those with sound
    that are not wholly in the window before.

    Args:
        extractor, windows: see [`window_features`].
        features (`torch.Tensor` of shape `(windows, patches, d)`): zero for a patch without sound.
        parts (`int`): of a window, each of the same number of patches; the last may have fewer.
    """
    rate, patches = extractor.sampling_rate, features.shape[1]
    sounding = (features != 0).any(dim=-1).cpu().numpy()
    size = -(-patches // parts)
    edges = np.minimum(np.arange(parts + 1) * size, patches) * extractor.nb_max_samples / patches
    kept, spans = np.zeros((len(windows), parts), dtype=bool), []
    for row, window in enumerate(windows):
        for part, (begin, end) in enumerate(zip(edges[:-1] + window.start, edges[1:] + window.start, strict=True)):
            has_sound = sounding[row, part * size : (part + 1) * size].any()
            if has_sound and end > window.covered:
                kept[row, part] = True
                end = min(end, window.start + len(window.samples))
                spans.append((round(max(begin, window.covered) / rate, 3), round(end / rate, 3)))
    return spans, kept
