"""Encoded audio on disk: the frozen CLAP runs once per clip, whatever is trained on it afterwards.

A store is a folder per encoder (weights and window settings have a fingerprint). It holds shards of some hundred
clips: hidden states in fp16 and query embeddings in float32, two `.npy` files that are memory-mapped, and a JSON with
the keys of the clips. A key is a hash of the recording's bytes. A shard's JSON is written last and atomically: a
killed run leaves whole shards, and files that the next run removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CLIPS_PER_SHARD = 256
_READ_BLOCK = 1 << 20


class FeatureStore:
    """Encoded clips of one encoder.

    Args:
        folder: the cache; the encoder's own folder is made in it.
        encoder: what the features depend on (see `encoder_identity`).
    """

    def __init__(self, folder: str | Path, encoder: dict[str, Any]) -> None:
        described = json.dumps(encoder, sort_keys=True).encode()
        self.fingerprint = hashlib.blake2b(described, digest_size=8).hexdigest()
        self.folder = Path(folder) / self.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        description = self.folder / "encoder.json"
        if not description.exists():
            write_atomically(description, json.dumps(encoder, indent=2, sort_keys=True).encode())
        # Shard, first window and number of windows of each clip; embeddings of each shard.
        self._clips: dict[str, tuple[str, int, int]] = {}
        self._embeds: dict[str, np.ndarray] = {}
        self.refresh()
        others = sorted(path.parent.name for path in self.folder.parent.glob("*/encoder.json"))
        if not self._clips and others != [self.fingerprint]:
            others.remove(self.fingerprint)
            logger.warning(
                "The feature cache %s holds features of other encoders or settings (%s), none of this one (%s): "
                "encoding again. The old ones may be deleted",
                folder, ", ".join(others), self.fingerprint,
            )  # fmt: skip

    def refresh(self) -> None:
        """Read the list of shards that are on disk now."""
        for path in sorted(self.folder.glob("shard-*.json")):
            name = path.stem
            if name in self._embeds:
                continue
            contents = json.loads(path.read_text(encoding="utf-8"))
            start = 0
            for key, windows in zip(contents["keys"], contents["windows"], strict=True):
                self._clips[key] = (name, start, windows)
                start += windows
            self._embeds[name] = np.load(self.folder / f"{name}.embeds.npy", allow_pickle=False)
            if len(self._embeds[name]) != start:
                raise ValueError(
                    f"{path}: {start} windows are listed, {len(self._embeds[name])} stored. Delete this shard's files"
                )

    def __contains__(self, key: str) -> bool:
        return key in self._clips

    def __len__(self) -> int:
        return len(self._clips)

    def hidden_states(self, key: str) -> np.ndarray:
        """fp16 array of shape `(windows * positions, d)`, a view of the file on disk."""
        shard, start, windows = self._clips[key]
        block = _memory_map(self.folder / f"{shard}.hidden.npy")[start : start + windows]
        return block.reshape(-1, block.shape[-1])

    def audio_embeds(self, key: str) -> np.ndarray:
        """float32 array of shape `(windows, projection_dim)`, rows of unit length."""
        shard, start, windows = self._clips[key]
        return self._embeds[shard][start : start + windows]

    def add_shard(self, keys: list[str], hidden: list[np.ndarray], embeds: list[np.ndarray]) -> None:
        """Write a shard.

        Args:
            keys: the clips.
            hidden: per clip, hidden states of shape `(windows, positions, d)`.
            embeds: per clip, query embeddings of shape `(windows, projection_dim)`.

        Raises:
            ValueError: if the states do not fit into fp16.
        """
        name = "shard-" + hashlib.blake2b("\n".join(keys).encode(), digest_size=12).hexdigest()
        with np.errstate(over="ignore"):
            states = np.concatenate(hidden).astype(np.float16)
        if not np.isfinite(states).all():
            raise ValueError("the encoder's hidden states hold NaN or exceed fp16 (65,504): this CLAP is not usable")
        write_atomically(self.folder / f"{name}.hidden.npy", states)
        write_atomically(self.folder / f"{name}.embeds.npy", np.concatenate(embeds).astype(np.float32))
        contents = {"format_version": FORMAT_VERSION, "keys": keys, "windows": [len(block) for block in embeds]}
        write_atomically(self.folder / f"{name}.json", json.dumps(contents).encode())

    def remove_leftovers(self) -> None:
        """Delete the unfinished files of a killed run."""
        for path in self.folder.glob("*.partial-*"):
            path.unlink(missing_ok=True)


@lru_cache(maxsize=64)
def _memory_map(path: Path) -> np.ndarray:
    # Outside of the class: a store is copied to worker processes, and each maps the files itself.
    return np.load(path, mmap_mode="r", allow_pickle=False)


def encoder_identity(model: Any, feature_extractor: Any) -> dict[str, Any]:
    """All that encoded audio depends on: a hash of the audio tower's weights, its dtype, what is added to its hidden
    states, and the settings of the mel spectrogram."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    parts = (("audio_model", model.clap.audio_model), ("audio_projection", model.clap.audio_projection))
    for part, module in parts:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # As bytes: NumPy has no bfloat16.
            digest.update(tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
    identity = mel_identity(feature_extractor) | {"weights": digest.hexdigest()}
    positions = model.config.audio_position_embedding
    # Left out if there are none: features that were encoded before there was a choice stay valid.
    return identity if positions is None else identity | {"audio_position_embedding": positions}


def mel_identity(feature_extractor: Any) -> dict[str, Any]:
    """All that a mel spectrogram depends on: the settings of the feature extractor."""
    values = feature_extractor.to_dict().items()
    plain = {name: value for name, value in values if isinstance(value, (int, float, str)) and name[0] != "_"}
    return {"format_version": FORMAT_VERSION, "features": plain}


def content_key(audio: dict[str, Any]) -> str:
    """Hash of a recording's bytes; its name does not count.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if audio.get("bytes") is not None:
        digest.update(audio["bytes"])
        return digest.hexdigest()
    with open(audio["path"], "rb") as file:
        while block := file.read(_READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ContentIndex:
    """Content keys of files that have not changed since they were hashed (by path, size and time of change).

    Args:
        folder: the index is the file `content.jsonl` in it; entries are appended.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "content.jsonl"
        self._known: dict[str, list[Any]] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []:
            try:
                name, *entry = json.loads(line)
            except ValueError:
                # The last line of a killed run; the file is hashed again.
                continue
            self._known[name] = entry

    def lookup(self, path: str) -> str | None:
        """Key of a file, if it is known and unchanged."""
        size, changed, key = self._known.get(os.path.abspath(path), (-1, -1, None))
        return key if [size, changed] == _status(path) else None

    def add(self, entries: Iterable[tuple[str, str]]) -> None:
        """Add (path, key) pairs. Only one process may do so."""
        lines = [json.dumps([os.path.abspath(path), *_status(path), key]) for path, key in entries]
        if lines:
            with open(self._path, "a", encoding="utf-8") as file:
                # A line break first: the line before may be half of one.
                file.write("\n" + "\n".join(lines) + "\n")


def _status(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def write_atomically(path: Path, content: bytes | np.ndarray) -> None:
    """Write a file (an array as `.npy`) so that a reader finds the old one or the whole new one."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with open(partial, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
