"""Encode the recordings of a dataset once: in batches, in several processes, and resumable after a kill."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recap_hf.data.schema import Problem

from .features import CLIPS_PER_SHARD, ContentIndex, FeatureStore, content_key, encoder_identity

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What makes the stored arrays of a clip.

    Args:
        identity: all that they depend on, as plain data.
        feature_extractor: knows the sampling rate, and the windows of a clip.
    """

    identity: dict[str, Any]
    feature_extractor: Any

    def encode(self, waveforms: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each waveform, an array of shape (windows, positions, d) and one of shape (windows, n)."""


class AudioTower:
    """The frozen audio tower of a captioner: hidden states in fp16 and query embeddings of every window.

    Args:
        model, processor: the captioner.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self.feature_extractor = model, processor.feature_extractor
        self.identity = encoder_identity(model, processor.feature_extractor)

    @torch.no_grad()
    def encode(self, waveforms: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hidden states (windows, positions, d), query embeddings (windows, P)) per waveform."""
        inputs = mel_windows(self.feature_extractor, waveforms, next(self._model.clap.parameters()).device)
        encoding = self._model.encode_audio(**inputs)
        windows = encoding.audio_embeds.shape[1]
        states = encoding.last_hidden_state.unflatten(1, (windows, -1)).half().cpu().numpy()
        embeds = encoding.audio_embeds.float().cpu().numpy()
        for row, count in enumerate(inputs["input_features_mask"].sum(dim=1).tolist()):
            yield states[row, :count], embeds[row, :count]


def mel_windows(feature_extractor: Any, waveforms: list[np.ndarray], device: Any) -> Any:
    """Mel windows of waveforms at the extractor's rate, as tensors on `device`."""
    rate = feature_extractor.sampling_rate
    return feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt", device=device)


@dataclass
class EncodedDataset:
    """Which stored features belong to which clip.

    `keys` has one entry per row of the dataset, None if the audio cannot be encoded; `problems` says why.
    """

    store: FeatureStore
    keys: list[str | None]
    problems: list[Problem] = field(default_factory=list)
    encoded: int = 0
    reused: int = 0


def store_features(
    dataset: Any,
    encoder: Encoder,
    cache: str | Path,
    *,
    batch_windows: int = 16,
    workers: int = 0,
    min_seconds: float = 0.01,
) -> EncodedDataset:
    """Features of every clip of a dataset; only what is not stored yet is computed.

    Every process of a distributed run calls this; each does its share of the shards.

    Args:
        dataset: has the columns `clip_id` and `audio`.
        encoder: makes the features.
        cache: folder of the feature stores.
        batch_windows: 10-second windows in a pass of the encoder.
        workers: processes that read, decode and resample recordings; 0: this one does.
        min_seconds: shorter recordings are refused.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    started, state = time.monotonic(), PartialState()
    store = FeatureStore(cache, encoder.identity)
    keys, failed = _content_keys(dataset, store.folder.parent)
    rows = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    # Which clips share a shard depends on the clips alone: a resumed run writes the same numbers.
    wanted = sorted(rows)
    shards = [wanted[start : start + CLIPS_PER_SHARD] for start in range(0, len(wanted), CLIPS_PER_SHARD)]
    shards = [pending for shard in shards if (pending := [key for key in shard if key not in store])]
    missing = [key for shard in shards for key in shard]
    state.wait_for_everyone()
    if state.is_main_process:
        store.remove_leftovers()
    state.wait_for_everyone()
    own = shards[state.process_index :: state.num_processes]
    rate, audio = encoder.feature_extractor.sampling_rate, dataset["audio"]
    recordings = _Recordings([(key, rows[key]) for shard in own for key in shard], audio, rate, min_seconds)
    broken = _encode(own, recordings, encoder, store, batch_windows, workers)
    state.wait_for_everyone()
    reasons = dict(gather_object(list(broken.items())))
    failed |= {row: reasons[key] for row, key in enumerate(keys) if key in reasons}
    store.refresh()
    clip_ids = dataset["clip_id"][:]
    problems = [Problem(clip_ids[row], "unreadable", failed[row]) for row in sorted(failed)]
    encoded, reused = len(missing) - len(reasons), len(wanted) - len(missing)
    logger.info(
        "Features: %d clips read from the cache, %d encoded, %d failed, %.1f s",
        reused, encoded, len(problems), time.monotonic() - started,
    )  # fmt: skip
    keys = [None if row in failed else key for row, key in enumerate(keys)]
    return EncodedDataset(store, keys, problems, encoded, reused)


def _content_keys(dataset: Any, folder: Path) -> tuple[list[str | None], dict[int, str]]:
    """Key of every row (each process hashes its share), and reason for the rows that cannot be read."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state, index = PartialState(), ContentIndex(folder)
    audio, own, fresh = dataset["audio"], [], []
    for row in range(state.process_index, len(dataset), state.num_processes):
        value = audio[row]
        path = value["path"] if value.get("bytes") is None else None
        try:
            key = index.lookup(path) if path else None
            if key is None:
                key = content_key(value)
                fresh += [(path, key)] if path else []
            own.append((row, key, None))
        except OSError as error:
            own.append((row, None, f"{path}: {error.strerror or error}"))
    fresh = gather_object(fresh)
    if state.is_main_process:
        index.add(fresh)
    found = sorted(gather_object(own))
    return [key for _, key, _ in found], {row: reason for row, _, reason in found if reason}


class _Recordings(Dataset):
    """Waveforms of clips: (key, waveform, None) or (key, None, reason)."""

    def __init__(self, rows: list[tuple[str, int]], audio: Any, rate: int, min_seconds: float) -> None:
        self._rows, self._audio, self._rate, self._min_seconds = rows, audio, rate, min_seconds

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[str, np.ndarray | None, str | None]:
        key, row = self._rows[number]
        try:
            return key, read_clip(self._audio[row], self._rate, self._min_seconds), None
        except (ValueError, OSError, ImportError) as error:
            return key, None, str(error)


def _encode(
    shards: list[list[str]],
    recordings: _Recordings,
    encoder: Encoder,
    store: FeatureStore,
    batch_windows: int,
    workers: int,
) -> dict[str, str]:
    """Encode and write the shards; key -> reason for the clips that do not decode."""
    broken: dict[str, str] = {}
    workers = workers if len(recordings) else 0
    loaded = iter(DataLoader(recordings, batch_size=None, num_workers=workers, collate_fn=_as_is))
    done = 0
    for shard in shards:
        keys, hidden, embeds = [], [], []
        clips = (next(loaded) for _ in shard)
        for batch in _batches(clips, encoder.feature_extractor, batch_windows, broken):
            keys += [key for key, _ in batch]
            for states, queries in encoder.encode([waveform for _, waveform in batch]):
                hidden.append(states)
                embeds.append(queries)
        if keys:
            store.add_shard(keys, hidden, embeds)
        done += len(shard)
        logger.info("Encoding audio: %d of %d clips", done, len(recordings))
    return broken


def _as_is(item: Any) -> Any:
    """Arrays stay arrays: a `DataLoader` without a collator makes tensors."""
    return item


def _batches(
    clips: Iterable[tuple], feature_extractor: Any, batch_windows: int, broken: dict[str, str]
) -> Iterator[list[tuple[str, np.ndarray]]]:
    batch, windows = [], 0
    for key, waveform, reason in clips:
        if waveform is None:
            broken[key] = reason
            continue
        batch.append((key, waveform))
        windows += len(feature_extractor.window_starts(len(waveform)))
        if windows >= batch_windows:
            yield batch
            batch, windows = [], 0
    if batch:
        yield batch


def read_clip(audio: dict[str, Any], sampling_rate: int, min_seconds: float) -> np.ndarray:
    """Mono float32 waveform of shape `(samples,)` at `sampling_rate` Hz.

    Raises:
        ValueError, OSError, ImportError: for a recording that cannot be read or is too short, with the reason.
    """
    from recap_hf.modeling.audio_recap import load_audio, resample, to_mono

    waveform, rate = load_audio(audio)
    samples = waveform.shape[-1]
    if samples / rate < min_seconds:
        name = audio.get("path") or "<bytes>"
        raise ValueError(f"{name}: {samples} samples ({samples / rate * 1000:.3g} ms) are too short to be a clip")
    return resample(to_mono(waveform), rate, sampling_rate)
