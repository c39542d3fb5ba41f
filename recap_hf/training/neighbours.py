"""The captions nearest to each clip, its own left out: searched once, kept until datastore or features change."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from recap_hf.files import replacing

logger = logging.getLogger(__name__)

# Part of every key: raised when the search changes what it returns.
SEARCH_VERSION = 3
_CLIPS_PER_SEARCH = 256


@dataclass
class Neighbours:
    """Rows of a datastore for each clip.

    Args:
        rows: int32 array of shape `(clips, top)`, most similar first, -1 if the datastore has no more.
        captions: the datastore's captions, by row.
    """

    rows: np.ndarray
    captions: Sequence[str]

    def of(self, clip: int) -> np.ndarray:
        """Rows of one clip, without the padding."""
        return self.rows[clip][self.rows[clip] >= 0]


@dataclass(frozen=True)
class Query:
    """A clip to find captions for.

    Args:
        embeds: float32 array of shape `(windows, P)`.
        clip_id, captions: captions of this clip id, and captions with these texts, are not found.
    """

    embeds: np.ndarray
    clip_id: str
    captions: tuple[str, ...]


def find_neighbours(
    datastore: Any, queries: Sequence[Query], top: int, cache: str | Path, diversity: float = 0.0
) -> Neighbours:
    """The `top` nearest captions of every clip, without captions of the clip's id and without its captions' texts.

    Results are kept in `cache` under a hash of datastore and queries; a later call with the same ones reads them.
    Every process of a distributed run calls this; each searches its share.
    """
    state = PartialState()
    path = Path(cache) / f"neighbours-{search_key(datastore, queries, top, diversity)}.npy"
    known = path.is_file()
    # No process may find the file that another one writes below, and so skip the gathering.
    state.wait_for_everyone()
    if known:
        logger.info("Retrieval: %d clips read from the cache", len(queries))
        return Neighbours(np.load(path, allow_pickle=False), datastore.captions)
    own = range(state.process_index, len(queries), state.num_processes)
    found: list[tuple[int, list[int]]] = []
    for start in range(0, len(own), _CLIPS_PER_SEARCH):
        numbers = own[start : start + _CLIPS_PER_SEARCH]
        chunk = [queries[number] for number in numbers]
        embeds = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(query.embeds) for query in chunk], batch_first=True)
        ids, texts = [query.clip_id for query in chunk], [query.captions for query in chunk]
        hits = datastore.search(embeds.numpy(), top, ids, texts, diversity)
        found += [(number, [hit["row"] for hit in each]) for number, each in zip(numbers, hits, strict=True)]
        logger.info("Retrieval: %d of %d clips", len(found), len(own))
    rows = np.full((len(queries), top), -1, dtype=np.int32)
    for number, hits in gather_object(found):
        rows[number, : len(hits)] = hits
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, rows, allow_pickle=False)
    state.wait_for_everyone()
    return Neighbours(rows, datastore.captions)


def search_key(datastore: Any, queries: Sequence[Query], top: int, diversity: float = 0.0) -> str:
    """Hash of everything that the result of a search depends on."""
    digest = hashlib.blake2b(json.dumps([SEARCH_VERSION, top, diversity, datastore.keys]).encode(), digest_size=16)
    for record in datastore.records:
        digest.update(json.dumps([record["caption"], record.get("clip_id")]).encode())
    for start in range(0, len(datastore.embeddings), 1 << 14):
        digest.update(np.ascontiguousarray(datastore.embeddings[start : start + (1 << 14)]).tobytes())
    for query in queries:
        digest.update(json.dumps([query.clip_id, query.captions, query.embeds.shape]).encode())
        digest.update(np.ascontiguousarray(query.embeds).tobytes())
    return digest.hexdigest()
