"""Timelines as files: read back by other libraries, and as people who cannot hear need them."""

from __future__ import annotations

import csv
import io
import json

import pytest

from recap_cli.formats import TIMELINE_WRITERS as WRITERS
from recap_cli.timeline import FORMATS
from recap_hf.audio.subtitles import CuePlacer, cue_lines

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
    assert set(FORMATS) == set(WRITERS)


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


def test_text():
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


def test_srt_is_read_by_pysubs2():
    pysubs2 = pytest.importorskip("pysubs2", reason="pysubs2 is not installed")
    lines = pysubs2.SSAFile.from_string(written("srt"), format_="srt")
    assert [(line.start / 1000, line.end / 1000) for line in lines] == times()
    # Two dashes and a sharp bracket are a timing.
    assert [line.plaintext for line in lines][:2] == TEXTS[:2]
    assert lines[2].plaintext == TEXTS[2].replace("-->", "->").replace("<wind>", "‹wind›")


def test_vtt_is_read_by_webvtt():
    import html

    webvtt = pytest.importorskip("webvtt", reason="webvtt-py is not installed")
    cues = list(webvtt.from_string(written("vtt")))
    assert [cue.start for cue in cues] == ["00:00:00.000", "00:00:01.250", "01:01:01.500"]
    assert [cue.end for cue in cues] == ["00:00:01.250", "01:01:01.500", "01:01:03.789"]
    assert [html.unescape(cue.text) for cue in cues] == TEXTS


def test_labels():
    rows = [line.split("\t") for line in written("audacity").splitlines()]
    assert [(float(start), float(end), text) for start, end, text in rows] == [
        (*time, text) for time, text in zip(times(), TEXTS, strict=True)
    ]


# --------------------------------------------------------------- readable cues


def segment(start, end, caption):
    return {"start": start, "end": end, "caption": caption, "score": 0.5, "retrieved": []}


def cues(*segments):
    placer = CuePlacer()
    placed = [cue for entry in segments for cue in placer.add(segment(*entry))] + placer.finish()
    return [(cue.start, cue.end, cue.text) for cue in placed]


def test_sounds_stand_in_brackets_and_silence_does_not():
    placed = cues((0, 2, "silence"), (2, 5, "A dog barking."), (5, 9, "silence"))
    assert placed == [(2, 5, "[dog barking]")]


def test_a_cue_is_shown_as_long_as_it_takes_to_read_and_not_much_longer():
    # 34 characters at 17 a second.
    text = "someone walks on gravel in the rain"
    assert len(f"[{text[3:]}]") == 34
    assert cues((1, 1.2, text[3:])) == [(1, 3, f"[{text[3:]}]")]
    assert cues((1, 1.2, "rain")) == [(1, 2, "[rain]")]
    assert cues((1, 60, "rain")) == [(1, 8, "[rain]")]


def test_sounds_too_close_to_read_share_a_cue_or_wait():
    first, second, third = (0, 0.5, "a bell"), (0.5, 1.0, "a horn"), (1.0, 1.5, "a whistle")
    assert cues(first, second) == [(0, 1, "[bell]\n[horn]")]
    # Three lines are too many: the third follows when the first two are read.
    assert cues(first, second, third) == [(0, 1, "[bell]\n[horn]"), (1.08, 2.08, "[whistle]")]
    # Two long lines take 79 / 17 seconds to read: what would be more than 2 seconds late is left out.
    long = "a " + "very " * 6 + "big bell"
    (shown,) = cues((0, 0.5, long), (0.5, 1.0, "a horn of " + "very " * 4 + "big brass"), third)
    assert "whistle" not in shown[2] and shown[1] > 4
    assert cues(first, (0.5, 4, "the bell")) == [(0, 4, "[bell]")]


def test_one_cue_ends_before_the_next():
    placed = cues((0, 4, "a bell"), (4, 6, "a horn"))
    assert placed == [(0, 3.92, "[bell]"), (4, 6, "[horn]")]


def test_long_captions_are_two_lines():
    lines = cue_lines("a " + "very " * 40 + "long caption")
    assert len(lines) == 2
    assert max(map(len, lines)) <= 42
    assert lines[1].endswith("…]")


def test_label_studio_tasks():
    """The fields that Label Studio's import needs: an address, and regions whose text has the id of their label."""
    first, second = json.loads(written("label-studio", names=("a b.flac", "https://example.org/b.flac")))
    assert first["data"]["audio"].startswith("/data/local-files/?d=")
    assert first["data"]["audio"].endswith("/a%20b.flac")
    assert second["data"]["audio"] == "https://example.org/b.flac"
    [prediction] = first["predictions"]
    result = prediction["result"]
    by_name = {name: [one for one in result if one["from_name"] == name] for name in ("label", "caption")}
    assert [(one["value"]["start"], one["value"]["end"]) for one in by_name["label"]] == times()
    assert [one["value"]["labels"] for one in by_name["label"]] == [["Silence"], ["Sound"], ["Sound"]]
    assert [one["value"]["text"] for one in by_name["caption"]] == [[text] for text in TEXTS]
    assert [one["id"] for one in by_name["label"]] == [one["id"] for one in by_name["caption"]]
    assert len({one["id"] for one in by_name["label"]}) == 3
    assert result[-1]["value"] == {"text": ["a dog barks"]}
    assert {one["type"] for one in result} == {"labels", "textarea"}
    assert json.loads(written("label-studio", names=())) == []
