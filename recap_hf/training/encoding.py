"""Running something over the recordings of a dataset, once: read ahead, in batches, in several processes, resumable.

For the captioner that is the frozen audio tower (`AudioTower`); for the pretraining of a CLAP the mel alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from recap_hf.data.schema import Problem

from .features import CLIPS_PER_SHARD, ContentIndex, FeatureStore, content_key, encoder_identity

logger = logging.getLogger(__name__)


@dataclass
class EncodedDataset:
    """Which stored features belong to which clip.

    `keys` has one entry per row of the dataset, None where the audio could not be encoded; `problems` says why.
    """

    store: FeatureStore
    keys: list[str | None]
    problems: list[Problem] = field(default_factory=list)
    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class EncodingOptions:
    """Where and how to encode.

    Args:
        cache: folder of the feature stores.
        batch_windows: 10-second windows in a pass of the encoder.
        threads: threads that read, decode and resample ahead of the encoder.
        min_seconds: shorter recordings are refused.
    """

    cache: str
    batch_windows: int = 16
    threads: int = 2
    min_seconds: float = 0.01


class Encoder(Protocol):
    """What makes the stored arrays of a clip.

    Args:
        identity: all that they depend on, as plain data.
        feature_extractor: says the sampling rate, and how many windows a clip has.
    """

    identity: dict[str, Any]
    feature_extractor: Any

    def encode(self, batch: list[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(key, array of shape (windows, positions, d), array of shape (windows, n)) of each (key, waveform)."""


def encode_dataset(dataset: Any, model: Any, processor: Any, options: EncodingOptions) -> EncodedDataset:
    """Hidden states and query embeddings of every clip; see `store_features`."""
    return store_features(dataset, AudioTower(model, processor), options)


def store_features(dataset: Any, encoder: Encoder, options: EncodingOptions) -> EncodedDataset:
    """Features of every clip of `dataset` (columns `clip_id`, `audio`); only what is not stored yet is computed.

    Every process of a distributed run calls this; each does its share of the shards.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    started = time.monotonic()
    state = PartialState()
    store = FeatureStore(options.cache, encoder.identity)
    if not len(store) and store.other_encoders():
        logger.warning(
            "The feature cache %s holds features of other encoders or settings (%s), none of this one (%s): encoding "
            "afresh. The old ones may be deleted",
            options.cache,
            ", ".join(store.other_encoders()),
            store.fingerprint,
        )
    keys, failed = _content_keys(dataset, store, state, gather_object)
    rows = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    wanted = sorted(rows)
    missing = [key for key in wanted if key not in store]
    state.wait_for_everyone()
    if state.is_main_process:
        store.remove_leftovers()
    state.wait_for_everyone()
    shards = [wanted[start : start + CLIPS_PER_SHARD] for start in range(0, len(wanted), CLIPS_PER_SHARD)]
    own = [pending for shard in shards if (pending := [key for key in shard if key not in store])]
    own = own[state.process_index :: state.num_processes]
    broken = _encode_shards(own, rows, dataset, encoder, store, options)
    state.wait_for_everyone()
    for key, reason in gather_object(list(broken.items())):
        failed += [(row, "unreadable", reason) for row, other in enumerate(keys) if other == key]
    store.refresh()
    for row, _, _ in failed:
        keys[row] = None
    clip_ids = dataset["clip_id"][:]
    problems = [Problem(clip_ids[row], kind, reason) for row, kind, reason in sorted(set(failed))]
    computed = sum(key in store for key in missing)
    result = EncodedDataset(store, keys, problems, computed, len(wanted) - len(missing), time.monotonic() - started)
    logger.info(
        "Features: %d clips read from the cache, %d encoded, %d failed, %.1f s",
        result.reused, result.encoded, len(problems), result.seconds,
    )  # fmt: skip
    return result


def _content_keys(dataset: Any, store: FeatureStore, state: Any, gather: Any) -> tuple[list[str | None], list[tuple]]:
    """Key of every row (each process hashes its share), and (row, kind, reason) of those that cannot be read."""
    index = ContentIndex(store.folder.parent, state.process_index)
    audio = dataset["audio"]
    own, fresh = [], []
    for row in range(state.process_index, len(dataset), state.num_processes):
        value = audio[row]
        path = value["path"] if value.get("bytes") is None else None
        try:
            key = index.lookup(path) if path else None
            if key is None:
                key = content_key(value)
                if path:
                    fresh.append((path, key))
            own.append((row, key, None))
        except OSError as error:
            own.append((row, None, f"{path}: {error.strerror or error}"))
    index.add(fresh)
    keys: list[str | None] = [None] * len(dataset)
    failed = []
    for row, key, reason in gather(own):
        keys[row] = key
        if reason:
            failed.append((row, "unreadable", reason))
    return keys, failed


def _encode_shards(
    shards: list[list[str]],
    rows: dict[str, int],
    dataset: Any,
    encoder: Encoder,
    store: FeatureStore,
    options: EncodingOptions,
) -> dict[str, str]:
    """Encode and write the shards; key -> reason for the clips that do not decode."""
    broken: dict[str, str] = {}
    total, done = sum(map(len, shards)), 0
    for shard in shards:
        keys, hidden, embeds = [], [], []
        rate = encoder.feature_extractor.sampling_rate
        waveforms = _read_ahead(shard, rows, dataset, rate, options, broken)
        for batch in _batches(waveforms, encoder.feature_extractor, options.batch_windows):
            for key, states, queries in encoder.encode(batch):
                keys.append(key)
                hidden.append(states)
                embeds.append(queries)
        if keys:
            store.add_shard(keys, hidden, embeds)
        done += len(shard)
        logger.info("Encoding audio: %d of %d clips", done, total)
    return broken


def _read_ahead(
    shard: Sequence[str],
    rows: dict[str, int],
    dataset: Any,
    rate: int,
    options: EncodingOptions,
    broken: dict[str, str],
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, mono waveform at the encoder's rate) in order; a few clips are decoded ahead, never a whole shard."""
    ahead = max(2, 2 * options.threads)
    with ThreadPoolExecutor(max_workers=max(1, options.threads)) as pool:
        pending: deque = deque()
        for key in shard:
            audio = dataset[rows[key]]["audio"]
            pending.append((key, pool.submit(read_clip, audio, rate, options.min_seconds)))
            if len(pending) > ahead:
                yield from _finished(*pending.popleft(), broken)
        while pending:
            yield from _finished(*pending.popleft(), broken)


def _finished(key: str, future: Any, broken: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    try:
        yield key, future.result()
    except (ValueError, OSError, ImportError) as error:
        broken[key] = str(error)


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


def _batches(
    waveforms: Iterator[tuple[str, np.ndarray]], feature_extractor: Any, batch_windows: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
    batch, windows = [], 0
    for key, waveform in waveforms:
        batch.append((key, waveform))
        windows += len(feature_extractor.window_starts(len(waveform)))
        if windows >= batch_windows:
            yield batch
            batch, windows = [], 0
    if batch:
        yield batch


class AudioTower:
    """The frozen audio tower of a captioner.

    Args:
        model, processor: the captioner.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self.feature_extractor = processor.feature_extractor
        self.identity = encoder_identity(model, processor.feature_extractor)

    def encode(self, batch: list[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(key, hidden states (windows, positions, d) in fp16, query embeddings (windows, P)) per clip."""
        import torch

        device = next(self._model.clap.parameters()).device
        inputs = extract(self.feature_extractor, batch, device)
        with torch.no_grad():
            encoding = self._model.encode_audio(**inputs)
        counts = inputs["input_features_mask"].sum(dim=1).tolist()
        windows = encoding.audio_embeds.shape[1]
        states = encoding.last_hidden_state.unflatten(1, (windows, -1)).half().cpu().numpy()
        embeds = encoding.audio_embeds.float().cpu().numpy()
        for row, ((key, _), count) in enumerate(zip(batch, counts, strict=True)):
            yield key, states[row, :count], embeds[row, :count]


def extract(feature_extractor: Any, batch: list[tuple[str, np.ndarray]], device: Any) -> Any:
    """Mel windows of some (key, waveform) pairs, as tensors on `device`."""
    return feature_extractor(
        [waveform for _, waveform in batch],
        sampling_rate=feature_extractor.sampling_rate,
        return_tensors="pt",
        device=device,
    )
