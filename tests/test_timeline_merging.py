"""Neighbours that say the same become one segment; the summary names what there is most of."""

from __future__ import annotations

import numpy as np
import pytest

from recap_hf import TimelineSettings, TimelineSummary
from recap_hf.audio.timeline import caption_embedder, merge_segments

# Embeddings by the first word: "dog barks" and "dog yelps" say the same.
WORDS = ("dog", "rain", "silence", "bell", "horn", "wind")


class Embedder:
    processor = None

    def __init__(self):
        self.model = self
        self.calls = 0

    def embed_captions(self, captions, processor):
        self.calls += 1
        return np.stack([np.eye(len(WORDS), dtype=np.float32)[WORDS.index(text.split()[0])] for text in captions])


def merged(*rows, **settings):
    segments = [{"start": s, "end": e, "caption": c, "score": 0.5, "retrieved": [c]} for s, e, c in rows]
    result = list(merge_segments(segments, caption_embedder(Embedder()), TimelineSettings(**settings)))
    assert [entry["retrieved"] for entry in result] == [[entry["caption"]] for entry in result]
    return [(entry["start"], entry["end"], entry["caption"]) for entry in result]


def test_neighbours_that_say_the_same():
    assert merged((0, 1, "rain falls"), (1, 2, "dog barks"), (2, 5, "dog yelps"), (5, 6, "dog"), (6, 7, "bell")) == [
        (0, 1, "rain falls"),
        (1, 6, "dog yelps"),
        (6, 7, "bell"),
    ]


def test_a_short_silence_does_not_part_them():
    rows = ((0, 2, "dog barks"), (2, 3.5, "silence"), (3.5, 4, "dog barks"))
    assert merged(*rows) == [(0, 4, "dog barks")]
    assert merged(*rows, merge_gap_s=1.0) == list(rows)
    others = ((0, 2, "dog barks"), (2, 3.5, "silence"), (3.5, 4, "rain"))
    assert merged(*others) == list(others)


def test_pauses_that_are_cut_or_at_the_ends():
    assert merged((0, 1, "silence"), (1, 1.05, "silence"), (1.05, 2, "dog")) == [
        (0, 1.05, "silence"),
        (1.05, 2, "dog"),
    ]
    assert merged((0, 1, "dog"), (1, 2, "silence")) == [(0, 1, "dog"), (1, 2, "silence")]
    assert merged((0, 1, "dog"), (1, 2, "silence"), (2, 3, "silence"), (3, 4, "dog")) == [
        (0, 1, "dog"),
        (1, 3, "silence"),
        (3, 4, "dog"),
    ]
    assert merged() == []


def test_the_threshold_can_be_so_high_that_only_equal_texts_merge():
    rows = ((0, 1, "dog barks"), (1, 2, "dog yelps"), (2, 3, "dog yelps"))
    assert merged(*rows, same_caption=1.5) == [(0, 1, "dog barks"), (1, 3, "dog yelps")]


def test_texts_are_embedded_once():
    embedder = Embedder()
    embed = caption_embedder(embedder)
    for _ in range(5):
        assert embed("dog barks") @ embed("dog yelps") == 1
    assert embedder.calls == 2


def test_silence_is_merged_with_nothing_else():
    rows = ((0, 1, "silence"), (1, 2, "dog barks"))
    assert merged(*rows, same_caption=-1.0) == list(rows)


def summary_of(*rows):
    embed, summary = caption_embedder(Embedder()), TimelineSummary()
    for start, end, caption, score in rows:
        segment = {"start": start, "end": end, "caption": caption, "score": score, "retrieved": [{"caption": caption}]}
        summary.add(segment, embed(caption))
    return summary.result()


def test_the_summary_is_about_the_most_time():
    result = summary_of(
        (0, 2, "dog barks", 0.5),
        (2, 10, "rain falls.", 0.8),
        (10, 15, "silence", 1.0),
        (15, 18, "dog yelps", 0.3),
        (18, 18.1, "bell", 0.1),
    )
    assert result["caption"] == "rain falls and dog yelps"
    assert result["score"] == pytest.approx((2 * 0.5 + 8 * 0.8 + 3 * 0.3 + 0.1 * 0.1) / 13.1)
    assert result["retrieved"] == [{"caption": "rain falls."}]
    assert result["duration"] == 18.1
    assert result["sounds"] == [
        {"caption": "rain falls.", "seconds": 8, "segments": 1},
        {"caption": "dog yelps", "seconds": 5, "segments": 2},
        {"caption": "bell", "seconds": pytest.approx(0.1), "segments": 1},
        {"caption": "silence", "seconds": 5, "segments": None},
    ]


def test_summaries_of_many_of_one_and_of_nothing():
    many = [(i, i + 1, word, 0.5) for i, word in enumerate(["dog", "rain", "bell", "horn", "wind"])]
    assert summary_of(*many)["caption"] == "dog, rain, bell and horn"
    assert summary_of((0, 1, "dog", 0.5))["caption"] == "dog"
    nothing = {"caption": "silence", "score": 1.0, "retrieved": [], "duration": 3, "sounds": [
        {"caption": "silence", "seconds": 3, "segments": None}
    ]}  # fmt: skip
    assert summary_of((0, 3, "silence", 1.0)) == nothing


def test_the_summary_forgets_the_rarest():
    summary = TimelineSummary()
    for index in range(300):
        embedding = np.zeros(300, np.float32)
        embedding[index] = 1.0
        entry = {"start": index, "end": index + (0.5 if index == 7 else 1), "caption": f"sound {index}"}
        summary.add({**entry, "score": 0.5, "retrieved": []}, embedding)
    captions = {sound["caption"] for sound in summary.result()["sounds"]}
    assert len(captions) == 256
    assert "sound 7" not in captions
    # What was forgotten counts in the mean.
    assert summary.result()["score"] == pytest.approx(0.5)
