"""The encoder of a sound index: a CLAP, whose audio tower embeds places of recordings and whose text tower queries."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from recap_hf.assets import default_model_path
from recap_hf.audio.windows import WINDOWS_TOGETHER, UnreadableError, Window, sound_windows, window_features
from recap_hf.modeling.captioning_recap import chosen_device
from recap_hf.streaming import read_ahead
from recap_hf.training.tasks.bases import load_clap

# Seconds of a place, and from the start of one to the next. In whole patches of the audio tower: 11 and 4 of a
# MobileNet, a whole window of an HTSAT.
_PLACE_S, _HOP_S = 5.28, 1.92
_PLACES_TOGETHER = 64
# Shorter gaps between patches are those of rounding.
_GAP_S = 1e-6
# Windows of a recording that are read ahead; the others of a long one are read as they are encoded.
_WINDOWS_AHEAD, _RECORDINGS_AHEAD = 4, 16

Span = tuple[float, float]


class Patch(NamedTuple):
    """What the audio tower gives for a moment: start and end in seconds, the length that all patches have, features of
    shape `(d,)`, which are zero for silence."""

    start: float
    end: float
    length: float
    features: torch.Tensor


@dataclass(frozen=True)
class Places:
    """The places of a recording: start and end of each in seconds, and unit vectors of shape `(places, dimension)`."""

    spans: list[Span]
    vectors: np.ndarray


@dataclass(eq=False)
class SoundEncoder:
    """Embeds places of recordings, and texts.

    Args:
        clap (`nn.Module`): an encoder class, such as [`MobileNetClapModel`], in evaluation mode.
        feature_extractor ([`RecapFeatureExtractor`]), tokenizer: the CLAP's.
        name (`str`, *optional*): folder or Hub id that loads it again; default: the checkpoint in the package.
    """

    clap: Any
    feature_extractor: Any
    tokenizer: Any
    name: str | None = None

    @classmethod
    def of(cls, source: Any = None, device: Any = None) -> "SoundEncoder":
        """The encoder that something stands for.

        Args:
            source (*optional*): a [`SoundEncoder`], a [`Captioner`] (its CLAP is used), or folder or Hub id of a RECAP
                checkpoint or a CLAP; default: the checkpoint in the package.
            device (*optional*): of what is loaded; default: a GPU where there is one, else the CPU.

        Raises:
            `OSError`, `ValueError`: if there is no such model, or it cannot embed texts.
        """
        if isinstance(source, cls):
            return source
        if hasattr(source, "processor"):
            name = source.model.name_or_path
            name = None if name in ("", str(default_model_path())) else name
            return cls(source.model.clap, source.processor.feature_extractor, source.processor.clap_tokenizer, name)
        name = None if source is None else os.fspath(source)
        # A folder is found again from another working directory.
        name = os.path.abspath(name) if name and os.path.isdir(name) else name
        clap, tokenizer, extractor = load_clap(name or "embedded", with_texts=True)
        return cls(clap.eval().to(chosen_device(device)), extractor, tokenizer, name)

    @cached_property
    def fingerprint(self) -> np.ndarray:
        """Embeddings of a few fixed texts, of shape `(4, dimension)`: they tell encoders apart."""
        return self.clap.fingerprint(self.tokenizer)

    def embed_text(self, text: str) -> np.ndarray:
        """The unit vector of a text, float32 of shape `(dimension,)`."""
        return self.clap.embed_captions([text], self.tokenizer)[0]

    def embed_audio(self, recording: Any) -> np.ndarray | None:
        """The unit vector of a recording, float32 of shape `(dimension,)`: the mean of its places; `None` for silence.

        Raises:
            What reading it raises.
        """
        [(_, places)] = self.embed_places([recording])
        if isinstance(places, Exception):
            raise places
        total = places.vectors.sum(axis=0)
        return total / np.linalg.norm(total) if len(places.vectors) else None

    def embed_places(self, recordings: Iterable[Any]) -> Iterator[tuple[Any, Places | Exception]]:
        """The places of recordings that hold sound, in order; they are read ahead by threads, block by block.

        Args:
            recordings: what [`AudioStream`] takes.

        Yields:
            `tuple`: each recording, and its [`Places`] or the exception that reading it raised.
        """
        group: list[tuple[Any, list[Window], Any]] = []
        with closing(read_ahead(self._begin, recordings, _RECORDINGS_AHEAD)) as begun:
            for recording, (windows, rest) in begun:
                group.append((recording, windows, rest))
                if rest is not None or sum(len(each) for _, each, _ in group) >= WINDOWS_TOGETHER:
                    yield from self._encode_group(group)
                    group = []
        yield from self._encode_group(group)

    def _begin(self, recording: Any) -> tuple[list[Window], Any]:
        """The first windows of a recording, and what gives the others, if there are any: an iterator or an error."""
        windows = sound_windows(recording, self.feature_extractor)
        try:
            first = list(islice(windows, _WINDOWS_AHEAD))
        except UnreadableError as error:
            return [], error.__cause__
        return first, windows if len(first) == _WINDOWS_AHEAD else None

    def _encode_group(self, group: list[tuple[Any, list[Window], Any]]) -> Iterator[tuple[Any, Places | Exception]]:
        """Recordings that are encoded together; only the last may have windows that are not read yet."""
        patches = iter(self._patches([window for _, windows, _ in group for window in windows]))
        for recording, windows, rest in group:
            first = chain.from_iterable(islice(patches, len(windows)))
            try:
                found: Any = rest if isinstance(rest, Exception) else self._embed(chain(first, self._others(rest)))
            except UnreadableError as error:
                found = error.__cause__
            yield recording, found

    def _others(self, windows: Iterator[Window] | None) -> Iterator[Patch]:
        while windows is not None and (batch := list(islice(windows, WINDOWS_TOGETHER))):
            yield from chain.from_iterable(self._patches(batch))

    @torch.no_grad()
    def _patches(self, windows: list[Window]) -> list[list[Patch]]:
        """The patches of each window that are not wholly in the window before."""
        if not windows:
            return []
        extractor, found = self.feature_extractor, []
        features, rate = window_features(self.clap, extractor, windows), extractor.sampling_rate
        length = extractor.nb_max_samples / features.shape[1]
        for window, rows in zip(windows, features, strict=True):
            last = window.start + len(window.samples)
            starts = [window.start + number * length for number in range(len(rows))]
            spans = [(max(start, window.covered), min(start + length, last)) for start in starts]
            each = zip(spans, rows, strict=True)
            found.append([Patch(a / rate, b / rate, length / rate, row) for (a, b), row in each if a < b])
        return found

    @torch.no_grad()
    def _embed(self, patches: Iterable[Patch]) -> Places:
        spans: list[Span] = []
        vectors = [np.zeros((0, self.clap.config.projection_dim), dtype=np.float32)]
        cut = cut_places(patches)
        while batch := list(islice(cut, _PLACES_TOGETHER)):
            stacked = [torch.stack([patch.features for patch in place]) for place in batch]
            features = pad_sequence(stacked, batch_first=True)
            sounding = (features != 0).any(dim=2).any(dim=1)
            vectors.append(self.clap.embed_features(features[sounding]).cpu().numpy())
            times = [(round(place[0].start, 3), round(place[-1].end, 3)) for place in batch]
            spans += [span for span, has_sound in zip(times, sounding.tolist(), strict=True) if has_sound]
        return Places(spans, np.concatenate(vectors))


def cut_places(patches: Iterable[Patch]) -> Iterator[list[Patch]]:
    """Places of 5.28 s, one each 1.92 s; the last ends with the sound. A gap in time ends a place."""
    held: list[Patch] = []
    fresh = 0
    for patch in patches:
        size, hop = (max(1, round(seconds / patch.length)) for seconds in (_PLACE_S, _HOP_S))
        if held and patch.start > held[-1].end + _GAP_S:
            if fresh:
                yield held
            held, fresh = [], 0
        held = [*held, patch][-size:]
        fresh += 1
        if len(held) == size and fresh >= hop:
            yield held
            fresh = 0
    if fresh:
        yield held
