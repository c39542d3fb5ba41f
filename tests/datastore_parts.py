"""An encoder of bags of words, whose cosines can be told by hand, and datastores made with it."""

from __future__ import annotations

import zlib

import numpy as np

from recap_hf import CaptionDatastore

DIMENSION = 16
FINGERPRINT_TEXTS = ("dog", "rain", "violin", "engine")


class WordEmbedder:
    """Stands for a CLAP: each word has a random direction, a caption is the sum of its words."""

    def __init__(self, seed: int = 0, dimension: int = DIMENSION) -> None:
        self.seed = seed
        self.dimension = dimension
        self.embedded: list[str] = []
        self._words: dict[str, np.ndarray] = {}
        self.fingerprint = self._vectors(FINGERPRINT_TEXTS)

    def _vectors(self, captions):
        vectors = np.zeros((len(captions), self.dimension), dtype=np.float32)
        for row, caption in enumerate(captions):
            for word in caption.lower().split():
                if word not in self._words:
                    rng = np.random.default_rng([self.seed, zlib.crc32(word.encode())])
                    self._words[word] = rng.standard_normal(self.dimension)
                vectors[row] += self._words[word]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed(self, captions):
        self.embedded += captions
        return self._vectors(captions)

    def count_tokens(self, captions):
        return [len(caption.split()) for caption in captions]


def load_in_worker(rank: int) -> WordEmbedder:
    """The recipe by which another process makes a `WordEmbedder`."""
    assert rank in (0, 1)
    return WordEmbedder()


def numbered(first: int, last: int, **extra) -> list[dict]:
    """Records `sound FIRST` to `sound LAST - 1`, all different."""
    return [{"caption": f"sound {number}", "clip_id": f"clip{number}", **extra} for number in range(first, last)]


def save_store(folder, records, embedder=None) -> None:
    """A datastore of records in a folder, as `save_pretrained` writes it."""
    embedder = embedder or WordEmbedder()
    embeddings = embedder.embed([record["caption"] for record in records])
    CaptionDatastore.from_embeddings(records, embeddings, embedder.fingerprint).save_pretrained(folder)
