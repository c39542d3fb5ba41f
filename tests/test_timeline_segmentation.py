"""Where a recording is cut: silence, changes of the embedding, and nothing that depends on the portions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from recap_hf.audio.segmentation import SegmentationSettings, Segmenter, is_quiet

RATE = 1_000


def tone(seconds, frequency, level_db=-20.0):
    times = np.arange(round(seconds * RATE)) / RATE
    return (np.sqrt(2) * 10 ** (level_db / 20) * np.sin(2 * np.pi * frequency * times)).astype(np.float32)


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def spectrum(windows):
    """An embedding that knows nothing but the spectrum: tones of other frequencies are orthogonal."""
    bands = np.stack([np.abs(np.fft.rfft(window, 1024))[:512].reshape(64, 8).sum(axis=1) for window in windows])
    return bands / np.linalg.norm(bands, axis=1, keepdims=True)


def cut(waveform, block=977, **settings):
    segmenter = Segmenter(spectrum, RATE, SegmentationSettings(**settings))
    pieces = []
    for start in range(0, len(waveform), block):
        pieces += segmenter.push(waveform[start : start + block])
    pieces += segmenter.finish()
    assert pieces[0].start == 0 and pieces[-1].end == len(waveform)
    for before, after in itertools.pairwise(pieces):
        assert before.end == after.start
    for piece in pieces:
        if piece.waveform is not None:
            np.testing.assert_array_equal(piece.waveform, waveform[piece.start : piece.end])
    return pieces


def times(pieces):
    return [(piece.start / RATE, piece.end / RATE, piece.waveform is not None) for piece in pieces]


def test_silence_is_told_from_sound():
    waveform = np.concatenate([silence(2), tone(3, 100), silence(1.5), tone(0.4, 100), silence(1)])
    assert times(cut(waveform)) == [
        (0.0, 2.0, False),
        (2.0, 5.0, True),
        (5.0, 6.5, False),
        (6.5, 6.9, True),
        (6.9, 7.9, False),
    ]


def test_short_pauses_belong_to_the_sound_around_them():
    waveform = np.concatenate([silence(0.3), tone(2, 100), silence(0.4), tone(2, 100), silence(0.2)])
    assert times(cut(waveform)) == [(0.0, 4.9, True)]
    assert times(cut(waveform, min_silence_s=0.1)) == [
        (0.0, 0.3, False),
        (0.3, 2.3, True),
        (2.3, 2.7, False),
        (2.7, 4.7, True),
        (4.7, 4.9, False),
    ]


def test_a_change_of_the_embedding_is_a_boundary():
    waveform = np.concatenate([tone(4, 50), tone(5, 200), tone(3, 400)])
    assert times(cut(waveform)) == [(0.0, 4.0, True), (4.0, 9.0, True), (9.0, 12.0, True)]
    assert times(cut(waveform, novelty=1.5)) == [(0.0, 12.0, True)]


def test_a_boundary_moves_to_the_step_of_the_level():
    # Off the grid of half seconds, and 20 dB louder.
    waveform = np.concatenate([tone(4.23, 50, -40), tone(5, 200, -20)])
    (_, first, _), _ = times(cut(waveform))
    assert first == pytest.approx(4.23, abs=0.02)


def test_changes_long_after_one_another_and_across_portions():
    # Sound is looked at in portions of 16 s: changes at, before and after their edges.
    lengths = [15.5, 1.5, 14.0, 33.0, 16.0, 2.0]
    waveform = np.concatenate([tone(length, 50 + 100 * (i % 4)) for i, length in enumerate(lengths)])
    ends = np.cumsum(lengths)
    found = [end for _, end, _ in times(cut(waveform, max_segment_s=60))]
    np.testing.assert_allclose(found, ends, atol=0.26)


def test_longer_sounds_are_cut_into_pieces():
    assert times(cut(tone(70, 100))) == [(0.0, 30.0, True), (30.0, 60.0, True), (60.0, 70.0, True)]
    pieces = times(cut(np.concatenate([tone(45, 50), tone(40, 200)]), max_segment_s=20))
    assert pieces == [
        (0.0, 20.0, True),
        (20.0, 40.0, True),
        (40.0, 45.0, True),
        (45.0, 65.0, True),
        (65.0, 85.0, True),
    ]


@pytest.mark.parametrize("block", [1, 10, 333, 16_000, 50_000])
def test_nothing_depends_on_the_portions(block):
    rng = np.random.default_rng(0)
    parts = [
        tone(length, frequency) for length, frequency in zip(rng.uniform(0.2, 9, 9), [50, 200, 400] * 3, strict=True)
    ]
    parts.insert(4, silence(3.3))
    waveform = np.concatenate(parts)[: 40_000 if block > 1 else 20_000]
    expected = times(cut(waveform, block=len(waveform)))
    assert len(expected) > 1
    assert times(cut(waveform, block=block)) == expected


def test_memory_does_not_grow():
    segmenter = Segmenter(spectrum, RATE)
    held = []
    for second in range(200):
        list(segmenter.push(tone(1, 100)))
        if second >= 60:
            held.append(len(segmenter._buffer) + sum(map(len, segmenter._waiting)))
    assert max(held) <= 50 * RATE


def test_lengths_that_do_not_fill_a_block_and_nothing_at_all():
    assert times(cut(tone(0.013, 100))) == [(0.0, 0.013, True)]
    assert list(Segmenter(spectrum, RATE).finish()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_s": 0.0}, "`window_s` must be at least"),
        ({"hop_s": 2.0}, "must not be longer than `window_s`"),
        ({"max_segment_s": 1.0}, "at least two windows"),
        ({"novelty": 3.0}, "between 0 and 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationSettings(**settings)


def test_quiet_is_judged_by_its_loudest_moment():
    assert is_quiet(tone(1, 100, -65), RATE, -60)
    assert not is_quiet(np.concatenate([silence(3), tone(0.02, 100, -50)]), RATE, -60)
