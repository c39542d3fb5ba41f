"""A clip's own captions stay out of its prompt: on the published captions, and where datasets overlap."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from recap_hf import CaptionDatastore
from recap_hf.data import CaptionData, join, load_captions
from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text
from recap_hf.training.neighbours import Query, find_neighbours

DIMENSION = 256


def embed(texts: list[str]) -> np.ndarray:
    """Hashed words, so that like texts are near and equal texts are equal: text queries without a model."""
    vectors = np.zeros((len(texts), DIMENSION), dtype=np.float32)
    for row, text in enumerate(texts):
        for word, count in Counter(normalize_text(text).split()).items():
            code = zlib.crc32(word.encode())
            vectors[row, code % DIMENSION] += count * (1 if code & 1024 else -1)
        vectors[row, 0] += 0.01
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(data: CaptionData, count: int, cache: Path) -> tuple[CaptionDatastore, list[Query], list[list[int]]]:
    table = data.dataset
    ids, captions = table["clip_id"][:], table["captions"][:]
    records = [{"caption": text, "clip_id": ids[row]} for row in range(len(ids)) for text in captions[row]]
    store = CaptionDatastore.from_embeddings(records, embed([record["caption"] for record in records]))
    chosen = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
    # The first caption of each clip is its query.
    embeds = embed([captions[row][0] for row in chosen])
    queries = [Query(own[None], ids[row], tuple(captions[row])) for own, row in zip(embeds, chosen, strict=True)]
    found = find_neighbours(store, queries, 4, cache)
    # The premise: without the exclusion, a clip's own caption is what its text finds first.
    plain = store.search(np.stack([query.embeds for query in queries[:20]]), k=1)
    assert all(
        normalize_text(hits[0]["caption"]) in {normalize_text(text) for text in query.captions}
        for hits, query in zip(plain, queries, strict=False)
    )
    return store, queries, [found.of(number).tolist() for number in range(len(queries))]


def own_rows(store: CaptionDatastore, queries: list[Query], found: list[list[int]]) -> int:
    """Retrieved captions that are the clip's own, by id or by text."""
    count = 0
    for query, rows in zip(queries, found, strict=True):
        texts = {normalize_text(text) for text in query.captions}
        clip = normalize_clip_id(query.clip_id)
        for row in rows:
            record = store.records[row]
            count += normalize_text(record["caption"]) in texts or normalize_clip_id(record["clip_id"]) == clip
    return count


@pytest.fixture
def clotho(shared_dir: Path) -> CaptionData:
    path = shared_dir / "data" / "captions" / "clotho_development_enclap.csv"
    return load_captions("audiofolder", path, columns={"file_name": "file_path"}, needs_audio=False)


@pytest.mark.parametrize("clips", [200, pytest.param(3835, marks=pytest.mark.slow)])
def test_clotho_development_with_text_queries(clotho: CaptionData, tmp_path: Path, clips: int):
    store, queries, found = search(clotho, clips, tmp_path)
    assert len(store) == 19_175
    assert [len(rows) for rows in found] == [4] * clips
    assert own_rows(store, queries, found) == 0


@pytest.mark.parametrize("clips", [200, pytest.param(6051, marks=pytest.mark.slow)])
def test_a_joined_dataset_with_the_same_clips_twice(clotho: CaptionData, shared_dir: Path, tmp_path: Path, clips: int):
    """EnCLAP's list and RECAP's CSV share 2,203 clips, spelt in two ways, captions with and without capitals."""
    recap = load_captions("recap", shared_dir / "data" / "captions" / "recap_train_clotho.csv", needs_audio=False)
    both = join([clotho, recap])
    store, queries, found = search(both, clips, tmp_path)
    assert len(store) == 19_175 + 11_090
    assert own_rows(store, queries, found) == 0
    # Premise: there are such clips among the queries.
    ids = Counter(normalize_clip_id(record["clip_id"]) for record in store.records)
    assert sum(ids[normalize_clip_id(query.clip_id)] >= 10 for query in queries) > clips // 3
    # And no text stands twice in a prompt.
    for rows in found:
        texts = [normalize_text(store.records[row]["caption"]) for row in rows]
        assert len(set(texts)) == len(texts) == 4
