"""Encode the recordings of a dataset once: in batches, in several processes, and resumable after a kill."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recap_hf.data.schema import Problem

from .features import CLIPS_PER_SHARD, ContentIndex, FeatureStore, content_key, encoder_identity

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class EncodingOptions:
    """Where and how to encode.

    Args:
        cache: folder of the feature stores.
        batch_windows: 10-second windows in a pass of the encoder.
        workers: processes that read, decode and resample recordings; 0: none beside this one.
        min_seconds: shorter recordings are refused.
    """

    cache: str | Path
    batch_windows: int = 16
    workers: int = 0
    min_seconds: float = 0.01


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


def store_features(dataset: Any, encoder: Encoder, options: EncodingOptions) -> EncodedDataset:
    """Features of every clip of `dataset` (columns `clip_id`, `audio`); only what is not stored yet is computed.

    Every process of a distributed run calls this; each does its share of the shards.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    started, state = time.monotonic(), PartialState()
    store = FeatureStore(options.cache, encoder.identity)
    if not len(store) and store.other_encoders():
        logger.warning(
            "The feature cache %s holds features of other encoders or settings (%s), none of this one (%s): encoding "
            "again. The old ones may be deleted",
            options.cache, ", ".join(store.other_encoders()), store.fingerprint,
        )  # fmt: skip
    keys, failed = _content_keys(dataset, store.folder.parent)
    rows = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    wanted = sorted(rows)
    missing = [key for key in wanted if key not in store]
    state.wait_for_everyone()
    if state.is_main_process:
        store.remove_leftovers()
    state.wait_for_everyone()
    # Which clips share a shard depends on the clips alone: a resumed run writes the same numbers.
    shards = [wanted[start : start + CLIPS_PER_SHARD] for start in range(0, len(wanted), CLIPS_PER_SHARD)]
    shards = [pending for shard in shards if (pending := [key for key in shard if key not in store])]
    broken = _encode(shards[state.process_index :: state.num_processes], rows, dataset, encoder, store, options)
    state.wait_for_everyone()
    reasons = dict(gather_object(list(broken.items())))
    failed |= {row: reasons[key] for row, key in enumerate(keys) if key in reasons}
    store.refresh()
    clip_ids = dataset["clip_id"][:]
    problems = [Problem(clip_ids[row], "unreadable", failed[row]) for row in sorted(failed)]
    result = EncodedDataset(
        store,
        [None if row in failed else key for row, key in enumerate(keys)],
        problems,
        encoded=sum(key in store for key in missing),
        reused=len(wanted) - len(missing),
    )
    logger.info(
        "Features: %d clips read from the cache, %d encoded, %d failed, %.1f s",
        result.reused, result.encoded, len(problems), time.monotonic() - started,
    )  # fmt: skip
    return result


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
    """Waveforms of clips, read by the workers of a `DataLoader`: (key, waveform, None) or (key, None, problem)."""

    def __init__(self, keys: Sequence[str], rows: dict[str, int], audio: Any, rate: int, min_seconds: float) -> None:
        self._keys, self._rows, self._audio = keys, rows, audio
        self._rate, self._min_seconds = rate, min_seconds

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> tuple[str, np.ndarray | None, str | None]:
        key = self._keys[number]
        try:
            return key, read_clip(self._audio[self._rows[key]], self._rate, self._min_seconds), None
        except (ValueError, OSError, ImportError) as error:
            return key, None, str(error)


def _encode(
    shards: list[list[str]],
    rows: dict[str, int],
    dataset: Any,
    encoder: Encoder,
    store: FeatureStore,
    options: EncodingOptions,
) -> dict[str, str]:
    """Encode and write the shards; key -> reason for the clips that do not decode."""
    broken: dict[str, str] = {}
    extractor = encoder.feature_extractor
    keys = [key for shard in shards for key in shard]
    recordings = _Recordings(keys, rows, dataset["audio"], extractor.sampling_rate, options.min_seconds)
    loaded = iter(
        DataLoader(recordings, batch_size=None, num_workers=options.workers if keys else 0, collate_fn=_as_is)
    )
    done = 0
    for shard in shards:
        stored, hidden, embeds = [], [], []
        clips = (next(loaded) for _ in shard)
        for batch in _batches(clips, extractor, options.batch_windows, broken):
            for (key, _), (states, queries) in zip(batch, encoder.encode([w for _, w in batch]), strict=True):
                stored.append(key)
                hidden.append(states)
                embeds.append(queries)
        if stored:
            store.add_shard(stored, hidden, embeds)
        done += len(shard)
        logger.info("Encoding audio: %d of %d clips", done, len(keys))
    return broken


def _as_is(item: Any) -> Any:
    """Arrays stay arrays: a `DataLoader` without a collator makes tensors."""
    return item


def _batches(
    clips: Iterable[tuple], feature_extractor: Any, batch_windows: int, broken: dict[str, str]
) -> Iterator[list[tuple[str, np.ndarray]]]:
    batch, windows = [], 0
    for key, waveform, problem in clips:
        if problem is not None:
            broken[key] = problem
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
    seconds = waveform.shape[-1] / rate
    if seconds < min_seconds:
        name = audio.get("path") or "<bytes>"
        raise ValueError(f"{name}: {waveform.shape[-1]} samples ({seconds * 1000:.3g} ms) are too short to be a clip")
    return resample(to_mono(waveform), rate, sampling_rate)
