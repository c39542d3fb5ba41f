"""Encoded audio on disk: a frozen encoder encodes each recording once, whatever is trained on the result afterwards.

A store is a folder per encoder (weights and window settings have a fingerprint) with shards of some hundred clips:
safetensors files that are written beside their place and renamed, so that a killed run leaves whole shards. A clip's
key is a hash of the recording's bytes.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader

from recap_hf.data.schema import Problem
from recap_hf.files import replacing, write_text
from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.configuration_recap import HIDDEN

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
CLIPS_PER_SHARD = 256
# Seconds; a shorter recording is no clip.
_SHORTEST = 0.01


class AudioTower:
    """The frozen audio tower of a captioner.

    Args:
        model, processor: the captioner.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self.feature_extractor = model, processor.feature_extractor
        self.identity = encoder_identity(model, processor.feature_extractor)

    @torch.no_grad()
    def encode(self, waveforms: list[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """`states` `(windows, positions, d)` fp16 and `embeds` `(windows, P)` float32 of each waveform."""
        inputs = mel_windows(self.feature_extractor, waveforms, next(self._model.clap.parameters()).device)
        encoding = self._model.encode_audio(**inputs)
        windows = encoding.audio_embeds.shape[1]
        states = encoding.last_hidden_state.unflatten(1, (windows, -1)).half().cpu().numpy()
        embeds = encoding.audio_embeds.float().cpu().numpy()
        # Windows without sound are not encoded, wherever in the clip they are.
        for row, held in enumerate(inputs["input_features_mask"].bool().cpu().numpy()):
            yield {"states": states[row, held], "embeds": embeds[row, held]}


def mel_windows(feature_extractor: Any, waveforms: list[np.ndarray], device: Any) -> Any:
    """Mel windows of waveforms at the extractor's rate, as tensors on `device`."""
    rate = feature_extractor.sampling_rate
    return feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt", device=device)


def encoder_identity(model: Any, feature_extractor: Any) -> dict[str, Any]:
    """All that encoded audio depends on: a hash of the audio tower's weights, their dtype, what is added to the hidden
    states, and the settings of the mel spectrogram."""
    weights = weights_hash(model.clap, "audio_model", "audio_projection")
    config = model.config
    positions = {"audio_position_embedding": config.audio_position_embedding}
    # Features of hidden states that were stored before there were others keep their identity.
    positions |= {"encoder_states": config.encoder_states} if config.encoder_states != HIDDEN else {}
    return mel_identity(feature_extractor) | positions | {"weights": weights}


def weights_hash(model: Any, *parts: str) -> str:
    """Hash of the weights of some modules of a model, and of their dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for name, tensor in sorted(getattr(model, part).state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # As bytes: NumPy has no bfloat16.
            digest.update(tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mel_identity(feature_extractor: Any) -> dict[str, Any]:
    """All that a mel spectrogram depends on: the settings of the feature extractor."""
    values = feature_extractor.to_dict().items()
    plain = {name: value for name, value in values if isinstance(value, (int, float, str)) and name[0] != "_"}
    return {"format_version": FORMAT_VERSION, "features": plain}


class FeatureStore:
    """Encoded clips of one encoder.

    Args:
        folder: the cache; the encoder's own folder is made in it.
        identity: what the arrays depend on.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        described = json.dumps(identity, indent=2, sort_keys=True)
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=8).hexdigest()
        self.folder = Path(folder) / self.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "encoder.json").exists():
            write_text(self.folder / "encoder.json", described)
        self._shards: dict[str, str] = {}
        self.refresh()
        others = {path.parent.name for path in self.folder.parent.glob("*/encoder.json")} - {self.fingerprint}
        if others and not self._shards:
            logger.warning(
                "The feature cache %s holds features of other encoders or settings (%s), none of this one (%s): "
                "encoding again. The old ones may be deleted",
                folder, ", ".join(sorted(others)), self.fingerprint,
            )  # fmt: skip

    def refresh(self) -> None:
        """Read the list of clips that are on disk now.

        Raises:
            ValueError: naming a shard that is damaged.
        """
        for name in {path.name for path in self.folder.glob("shard-*")} - set(self._shards.values()):
            try:
                arrays = _open_shard(self.folder / name).keys()
            except Exception as error:  # safetensors' errors have no common class but this.
                raise ValueError(f"{self.folder / name} is damaged ({error}): delete it") from error
            self._shards |= {array.partition("/")[0]: name for array in arrays}

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, key: str, name: str) -> np.ndarray:
        """The array `name` of a clip, `(windows, ...)`, from the memory-mapped file."""
        return _open_shard(self.folder / self._shards[key]).get_tensor(f"{key}/{name}")

    def add_shard(self, clips: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write a shard: for each key the named arrays of its clip.

        Raises:
            ValueError: if one holds NaN or a value beyond its type.
        """
        arrays = {f"{key}/{name}": np.ascontiguousarray(array) for key in clips for name, array in clips[key].items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("the encoder's output holds NaN or exceeds fp16 (65,504): this CLAP is not usable")
        digest = hashlib.blake2b("\n".join(clips).encode(), digest_size=12).hexdigest()
        with replacing(self.folder / f"shard-{digest}.safetensors") as path:
            save_file(arrays, path)


@lru_cache(maxsize=256)
def _open_shard(path: Path) -> Any:
    # Outside of the class: a store is copied to worker processes, and each maps the files itself.
    return safe_open(path, framework="np")


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


def store_features(dataset: Any, encoder: Any, cache: Any, *, batch_size: int = 8, workers: int = 0) -> EncodedDataset:
    """Features of every clip of a dataset; only what is not stored yet is computed.

    Every process of a distributed run calls this; each does its share of the shards.

    Args:
        dataset: has the columns `clip_id` and `audio`.
        encoder: makes the features, as [`AudioTower`]: `identity` is all that they depend on, as plain data;
            `feature_extractor` knows the sampling rate; `encode(waveforms)` gives named arrays `(windows, ...)` of
            each.
        cache: folder of the feature stores.
        batch_size: recordings in a pass of the encoder.
        workers: processes that read, decode and resample recordings; 0: this one does.
    """
    started, state = time.monotonic(), PartialState()
    store, audio = FeatureStore(cache, encoder.identity), dataset["audio"]
    keys, failed = _content_keys(audio, store.folder.parent)
    rows = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    # Which clips share a shard depends on the clips alone: a resumed run writes the same numbers.
    wanted = sorted(rows)
    shards = [wanted[start : start + CLIPS_PER_SHARD] for start in range(0, len(wanted), CLIPS_PER_SHARD)]
    shards = [pending for shard in shards if (pending := [key for key in shard if key not in store])]
    missing, own = sum(map(len, shards)), shards[state.process_index :: state.num_processes]
    if state.is_main_process:
        for path in store.folder.glob(".shard-*.tmp"):
            # Of a killed run.
            path.unlink()
    state.wait_for_everyone()
    broken: dict[str, str] = {}
    done, total = 0, sum(map(len, own))
    reader = partial(_read_batch, audio, encoder.feature_extractor.sampling_rate)
    for shard in own:
        pairs, encoded = [(key, rows[key]) for key in shard], {}
        # The workers read and decode in their collator.
        for batch in DataLoader(pairs, batch_size=batch_size, num_workers=workers, collate_fn=reader):
            broken |= {key: reason for key, waveform, reason in batch if waveform is None}
            read = {key: waveform for key, waveform, _ in batch if waveform is not None}
            encoded |= zip(read, encoder.encode(list(read.values())) if read else (), strict=True)
        if encoded:
            store.add_shard(encoded)
        done += len(shard)
        logger.info("Encoding audio: %d of %d clips", done, total)
    state.wait_for_everyone()
    reasons = dict(gather_object(list(broken.items())))
    failed |= {row: reasons[key] for row, key in enumerate(keys) if key in reasons}
    store.refresh()
    clip_ids = dataset["clip_id"][:]
    problems = [Problem(clip_ids[row], "unreadable", failed[row]) for row in sorted(failed)]
    fresh, reused = missing - len(reasons), len(wanted) - missing
    logger.info(
        "Features: %d clips read from the cache, %d encoded, %d failed, %.1f s",
        reused, fresh, len(problems), time.monotonic() - started,
    )  # fmt: skip
    keys = [None if row in failed else key for row, key in enumerate(keys)]
    return EncodedDataset(store, keys, problems, fresh, reused)


def _read_batch(audio: Any, rate: int, batch: list[tuple[str, int]]) -> list[tuple[str, np.ndarray | None, str]]:
    """(key, waveform, "") or (key, None, reason) of each (key, row)."""
    found: list[tuple[str, np.ndarray | None, str]] = []
    for key, row in batch:
        try:
            found.append((key, read_clip(audio[row], rate), ""))
        except (ValueError, OSError, ImportError) as error:
            found.append((key, None, str(error)))
    return found


def read_clip(audio: dict[str, Any], sampling_rate: int) -> np.ndarray:
    """Mono float32 waveform of shape `(samples,)` at `sampling_rate` Hz.

    Raises:
        ValueError, OSError, ImportError: for a recording that cannot be read or is too short, with the reason.
    """
    waveform, rate = load_audio(audio)
    samples = waveform.shape[-1]
    if samples / rate < _SHORTEST:
        name = audio.get("path") or "<bytes>"
        raise ValueError(f"{name}: {samples} samples ({samples / rate * 1000:.3g} ms) are too short to be a clip")
    return resample(to_mono(waveform), rate, sampling_rate)


def content_key(audio: dict[str, Any]) -> str:
    """Hash of a recording's bytes; its name does not count.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.blake2b(audio.get("bytes") or b"", digest_size=16)
    if audio.get("bytes") is None:
        with open(audio["path"], "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _content_keys(audio: Any, folder: Path) -> tuple[list[str | None], dict[int, str]]:
    """Key of every row (each process hashes its share), and reason for the rows that cannot be read."""
    # Hashes of files are kept, and hold as long as path, size and time of change do.
    state, index = PartialState(), folder / "content-keys.json"
    known: dict[str, str] = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    own: list[tuple[int, str | None, str]] = []
    fresh: dict[str, str] = {}
    for row in range(state.process_index, len(audio), state.num_processes):
        value, path, name = audio[row], audio[row]["path"], None
        try:
            if value.get("bytes") is None:
                status = os.stat(path)
                name = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
            key = known.get(name) or content_key(value)
            if name and name not in known:
                fresh[name] = key
            own.append((row, key, ""))
        except OSError as error:
            own.append((row, None, f"{path}: {error.strerror or error}"))
    added = gather_object([fresh])
    if state.is_main_process and any(added):
        write_text(index, json.dumps(known | {name: key for part in added for name, key in part.items()}))
    found = sorted(gather_object(own))
    return [key for _, key, _ in found], {row: reason for row, _, reason in found if reason}
