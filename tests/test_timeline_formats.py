"""Timelines as files: read back by other libraries, and as people who cannot hear need them."""

from __future__ import annotations

import csv
import io
import itertools
import json

import pytest

from recap_cli.formats import TIMELINE_WRITERS as WRITERS
from recap_cli.timeline import FORMATS
from recap_hf.audio.subtitles import Cue, CuePlacer, SubtitleFile, SubtitleStyle, merge_cues

HIT = {"caption": "dogs bark", "score": 0.75}
SEGMENTS = [
    {"start": 0.0, "end": 1.25, "caption": "silence", "score": 1.0, "retrieved": []},
    {"start": 1.25, "end": 3661.5, "caption": "a dog barks", "score": 0.5, "retrieved": [HIT]},
    {
        "start": 3661.5,
        "end": 3663.789,
        "caption": 'rain & <wind>,\t"then" -->\nthunder',
        "score": 0.25,
        "retrieved": [],
    },
]
SUMMARY = {"caption": "a dog barks", "score": 0.5, "retrieved": [HIT], "duration": 3663.789, "sounds": []}
TEXTS = ["silence", "a dog barks", 'rain & <wind>, "then" --> thunder']


def written(kind, segments=SEGMENTS, names=("street.flac",), **options):
    file = io.StringIO(newline="")
    writer = WRITERS[kind](file, **options)
    for name in names:
        writer.begin(name)
        for segment in segments:
            writer.write(segment)
        writer.end(SUMMARY)
    writer.close()
    return file.getvalue()


def times(segments=SEGMENTS):
    return [(segment["start"], segment["end"]) for segment in segments]


def test_the_command_knows_every_format():
    assert set(FORMATS) == {*WRITERS, "all"}


def test_json():
    expected = {"file": "street.flac", "segments": SEGMENTS, **SUMMARY}
    assert json.loads(written("json")) == [expected]
    assert json.loads(written("json", names=("a", "b"))) == [{**expected, "file": "a"}, {**expected, "file": "b"}]
    assert json.loads(written("json", names=())) == []
    assert json.loads(written("json", segments=[]))[0]["segments"] == []


def test_jsonl_and_csv():
    lines = [json.loads(line) for line in written("jsonl").splitlines()]
    assert lines == [{"file": "street.flac", **segment} for segment in SEGMENTS]
    rows = list(csv.DictReader(io.StringIO(written("csv"))))
    assert [(float(row["start"]), float(row["end"])) for row in rows] == times()
    assert [row["caption"] for row in rows] == [segment["caption"] for segment in SEGMENTS]
    assert json.loads(rows[1]["retrieved"]) == [HIT]


def test_text_and_tsv():
    assert written("text").splitlines()[:3] == [
        "street.flac",
        "[00:00:00.000 --> 00:00:01.250]  silence",
        "[00:00:01.250 --> 01:01:01.500]  a dog barks",
    ]
    assert written("text").endswith("summary: a dog barks\n")
    # A recording that cannot be read leaves no line.
    file = io.StringIO()
    writer = WRITERS["text"](file)
    for name, summary in (("broken.wav", None), ("street.flac", SUMMARY)):
        writer.begin(name)
        writer.end(summary)
    assert file.getvalue() == "street.flac\nsummary: a dog barks\n"
    # Live captions have no recording to begin with.
    live = io.StringIO()
    WRITERS["text"](live).write(SEGMENTS[0])
    assert live.getvalue() == "[00:00:00.000 --> 00:00:01.250]  silence\n"
    rows = list(csv.DictReader(io.StringIO(written("tsv")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [(int(row["start"]) / 1000, int(row["end"]) / 1000, row["text"]) for row in rows] == [
        (*time, text) for time, text in zip(times(), TEXTS, strict=True)
    ]


def test_srt_is_read_by_pysubs2():
    pysubs2 = pytest.importorskip("pysubs2", reason="pysubs2 is not installed")
    lines = pysubs2.SSAFile.from_string(written("srt"), format_="srt")
    assert [(line.start / 1000, line.end / 1000) for line in lines] == times()
    # Two dashes and a sharp bracket are a timing.
    assert [line.plaintext for line in lines][:2] == TEXTS[:2]
    assert "-> thunder" in lines[2].text


def test_vtt_is_read_by_webvtt():
    import html

    webvtt = pytest.importorskip("webvtt", reason="webvtt-py is not installed")
    cues = list(webvtt.from_string(written("vtt")))
    assert [cue.start for cue in cues] == ["00:00:00.000", "00:00:01.250", "01:01:01.500"]
    assert [cue.end for cue in cues] == ["00:00:01.250", "01:01:01.500", "01:01:03.789"]
    assert [html.unescape(cue.text) for cue in cues] == TEXTS


def test_labels_and_selection_tables():
    rows = [line.split("\t") for line in written("audacity").splitlines()]
    assert [(float(start), float(end), text) for start, end, text in rows] == [
        (*time, text) for time, text in zip(times(), TEXTS, strict=True)
    ]
    table = list(csv.DictReader(io.StringIO(written("raven")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [int(row["Selection"]) for row in table] == [1, 2, 3]
    assert [(float(row["Begin Time (s)"]), float(row["End Time (s)"])) for row in table] == times()
    assert {(row["View"], row["Channel"], row["High Freq (Hz)"]) for row in table} == {
        ("Spectrogram 1", "1", "14000.0")
    }
    assert [row["Annotation"] for row in table] == TEXTS


# --------------------------------------------------------------- readable cues


def segment(start, end, caption):
    return {"start": start, "end": end, "caption": caption, "score": 0.5, "retrieved": []}


def cues(*segments, **style):
    placer = CuePlacer(SubtitleStyle(**style))
    placed = [cue for entry in segments for cue in placer.add(segment(*entry))] + placer.finish()
    return [(cue.start, cue.end, cue.text) for cue in placed], placer.left_out


def test_sounds_stand_in_brackets_and_silence_does_not():
    placed, _ = cues((0, 2, "silence"), (2, 5, "A dog barking."), (5, 9, "silence"))
    assert placed == [(2, 5, "[dog barking]")]


def test_a_cue_is_shown_as_long_as_it_takes_to_read_and_not_much_longer():
    # 34 characters at 17 a second.
    text = "someone walks on gravel in the rain"
    assert len(f"[{text[3:]}]") == 34
    assert cues((1, 1.2, text[3:]))[0] == [(1, 3, f"[{text[3:]}]")]
    assert cues((1, 1.2, "rain"))[0] == [(1, 2, "[rain]")]
    assert cues((1, 1.2, "rain"), min_duration=1.5)[0] == [(1, 2.5, "[rain]")]
    assert cues((1, 60, "rain"))[0] == [(1, 8, "[rain]")]


def test_sounds_too_close_to_read_share_a_cue_or_wait():
    first, second, third = (0, 0.5, "a bell"), (0.5, 1.0, "a horn"), (1.0, 1.5, "a whistle")
    assert cues(first, second)[0] == [(0, 1, "[bell]\n[horn]")]
    # Three lines are too many: the third follows when the first two are read.
    assert cues(first, second, third)[0] == [(0, 1, "[bell]\n[horn]"), (1.08, 2.08, "[whistle]")]
    assert cues(first, second, third, min_duration=3.0, max_delay=1.0) == ([(0, 3, "[bell]\n[horn]")], 1)
    assert cues(first, (0.5, 4, "the bell"))[0] == [(0, 4, "[bell]")]


def test_one_cue_ends_before_the_next():
    placed, _ = cues((0, 4, "a bell"), (4, 6, "a horn"))
    assert placed == [(0, 3.92, "[bell]"), (4, 6, "[horn]")]


def test_long_captions_are_two_lines():
    lines = SubtitleStyle().lines("a " + "very " * 40 + "long caption")
    assert len(lines) == 2
    assert max(map(len, lines)) <= 42
    assert lines[1].endswith("…]")


# --------------------------------------------------------------- beside speech

SRT = """\ufeff1
00:00:01,000 --> 00:00:04,000
<i>Who is there?</i>

7
00:00:05,500 --> 00:00:06,000
- Nobody.
- Really?
"""


def test_sounds_stand_in_the_pauses_of_speech():
    file = SubtitleFile(SRT)
    assert file.speech() == [(1.0, 4.0), (5.5, 6.0)]
    sounds = [Cue(2, 5, "[bell]", 3.5, 1.0), Cue(5, 6, "[knock]", 6, 1.0)]
    placed, left_out = merge_cues(sounds, file.speech(), SubtitleStyle())
    assert [(cue.start, cue.end, cue.text) for cue in placed] == [(4.08, 5.42, "[bell]"), (6.08, 7.08, "[knock]")]
    assert left_out == 0
    assert file.with_cues(placed) == (
        "1\n00:00:01,000 --> 00:00:04,000\n<i>Who is there?</i>\n\n"
        "2\n00:00:04,080 --> 00:00:05,420\n[bell]\n\n"
        "3\n00:00:05,500 --> 00:00:06,000\n- Nobody.\n- Really?\n\n"
        "4\n00:00:06,080 --> 00:00:07,080\n[knock]\n\n"
    )


def test_no_speech_is_covered_whatever_the_sounds():
    import numpy as np

    rng = np.random.default_rng(0)
    edges = np.sort(rng.uniform(0, 300, 120)).round(3)
    speech = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    style = SubtitleStyle()
    placer = CuePlacer(style)
    starts = np.cumsum(rng.uniform(0.1, 5, 100))
    made = [
        cue for start in starts for cue in placer.add(segment(start, start + rng.uniform(0.1, 9), f"bell {start}"))
    ]
    placed, left_out = merge_cues(made, speech, style)
    assert len(placed) + left_out == len(made)
    assert len(placed) > 20
    busy = sorted([*speech, *((cue.start, cue.end) for cue in placed)])
    for (_, end), (start, _) in itertools.pairwise(busy):
        assert start >= end
    assert all(cue.end - cue.start >= style.min_duration - 0.002 for cue in placed)


def test_speech_is_not_named_beside_its_words():
    placed, left_out = merge_cues([Cue(10, 12, "[man speaking]", 12, 1.0)], [(0.0, 1.0)], SubtitleStyle())
    assert (placed, left_out) == ([], 0)


def test_webvtt_keeps_its_head_styles_and_settings():
    text = (
        "WEBVTT Kind: captions\n\nSTYLE\n::cue { color: lime }\n\nNOTE by hand\n\nintro\n"
        "00:05.000 --> 00:06.000 align:start\nHello\n\n"
    )
    merged = SubtitleFile(text).with_cues([Cue(1, 2, "[bell & horn]")])
    assert merged == text.replace("intro\n", "00:00:01.000 --> 00:00:02.000\n[bell &amp; horn]\n\nintro\n")


def test_files_that_are_no_subtitles(tmp_path):
    (tmp_path / "a.srt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"a\.srt: There is no cue"):
        SubtitleFile.read(tmp_path / "a.srt")
    (tmp_path / "b.srt").write_bytes(SRT[1:].replace("Who", "Wö").encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.srt: the subtitles are not in UTF-8"):
        SubtitleFile.read(tmp_path / "b.srt")
    (tmp_path / "c.srt").write_bytes(SRT[1:].encode("utf-16"))
    assert SubtitleFile.read(tmp_path / "c.srt").speech() == [(1.0, 4.0), (5.5, 6.0)]


def test_styles_that_cannot_be():
    with pytest.raises(ValueError, match="`characters_per_second` must be positive"):
        SubtitleStyle(characters_per_second=0)
    with pytest.raises(ValueError, match="must be at least `min_duration`"):
        SubtitleStyle(min_duration=9)
