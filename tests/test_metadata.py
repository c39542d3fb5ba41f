"""Captions in recordings' own metadata: read back by other programs, the sound unchanged, nothing else lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY, synthetic_clip

from recap_cli import main

mutagen = pytest.importorskip("mutagen", reason="needs recap-hf[metadata]")
av = pytest.importorskip("av", reason="needs recap-hf[av]")
TinyTag = pytest.importorskip("tinytag").TinyTag

from recap_hf.audio.metadata import SoundDescription, write_metadata  # noqa: E402

DESCRIPTION = SoundDescription("Rain drums on a tent, a child läuft", ("Rain", "Speech"), "recap_hf 1, tiny")
CLIP = synthetic_clip(1.0, 3)


def make(path, codec=None):
    """A recording in the format of its suffix."""
    if path.suffix in (".m4a", ".mp4"):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(CLIP[None], format="fltp", layout="mono")
            frame.sample_rate = 48_000
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
    elif path.suffix == ".opus":
        soundfile.write(path, CLIP, 48_000, format="OGG", subtype="OPUS")
    else:
        soundfile.write(path, CLIP, 48_000)
    return path


def packets(path):
    """The encoded sound, as FFmpeg finds it."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0)]


def decoded(path):
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def riff_chunks(path):
    """Names and contents of the chunks of a WAV file, which must fill it."""
    data, chunks, place = path.read_bytes(), [], 12
    assert data[:4] == b"RIFF" and struct.unpack("<I", data[4:8])[0] == len(data) - 8
    while place < len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        chunks.append((name.decode(), data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    return chunks


SUFFIXES = ("wav", "flac", "ogg", "opus", "mp3", "aiff", "m4a")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_program_reads_what_is_written(tmp_path, suffix):
    path = make(tmp_path / f"rain.{suffix}")
    before, sound = packets(path), decoded(path)
    os.chmod(path, 0o640)
    written = write_metadata(path, DESCRIPTION)
    assert set(written.values()) >= {DESCRIPTION.caption, "Rain; Speech", DESCRIPTION.model}
    assert packets(path) == before and np.array_equal(decoded(path), sound)
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == [path.name]
    tag = TinyTag.get(path)
    texts = [
        value for values in tag.as_dict().values() for value in (values if isinstance(values, list) else [values])
    ]
    assert DESCRIPTION.caption in texts
    with av.open(str(path)) as container:
        named = {**container.metadata, **container.streams.audio[0].metadata}
    assert DESCRIPTION.caption in named.values()
    # What is there is kept: a second run has nothing to write.
    again = path.read_bytes()
    assert write_metadata(path, SoundDescription("other", ("Dog",), "x")) == {}
    assert path.read_bytes() == again
    assert "other" in write_metadata(path, SoundDescription("other", ("Dog",), "x"), overwrite=True).values()
    assert packets(path) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_dry_run_writes_nothing(tmp_path, suffix):
    path = make(tmp_path / f"rain.{suffix}")
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert write_metadata(path, DESCRIPTION, dry_run=True) == write_metadata(path, DESCRIPTION, dry_run=True)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert write_metadata(path, DESCRIPTION, dry_run=True) == write_metadata(path, DESCRIPTION)


def test_the_chunks_of_a_wav(tmp_path):
    path = make(tmp_path / "rain.wav")
    samples = dict(riff_chunks(path))["data"]
    write_metadata(path, DESCRIPTION)
    chunks = riff_chunks(path)
    names = [name for name, _ in chunks]
    assert names.index("bext") < names.index("fmt ") < names.index("data")
    found = dict(chunks)
    assert found["data"] == samples
    # EBU Tech 3285: 602 bytes, Description at 0, Originator at 256, Version at 346; ASCII.
    assert len(found["bext"]) == 602
    assert found["bext"][:256].rstrip(b"\0") == b"Rain drums on a tent, a child l?uft"
    assert found["bext"][256:288].rstrip(b"\0") == b"recap_hf 1, tiny"
    assert found["bext"][346:348] == b"\1\0"
    root = ElementTree.fromstring(found["iXML"])
    assert (root.tag, root.findtext("NOTE")) == ("BWFXML", DESCRIPTION.caption)
    assert root.findtext("USER/KEYWORDS") == "Rain; Speech"
    assert found["LIST"][:4] == b"INFO"


def test_other_fields_of_a_wav_are_kept(tmp_path):
    path = make(tmp_path / "field.wav")
    plain = path.read_bytes()

    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    bext = b"Take 3".ljust(256, b"\0") + b"Recorder".ljust(346, b"\0") + b"history!"
    ixml = b'<?xml version="1.0"?><BWFXML><!-- by hand --><SCENE>12</SCENE><NOTE>windy</NOTE></BWFXML>'
    info = b"INFO" + chunk(b"INAM", b"Title\0") + chunk(b"ICMT", b"mine")
    rest = chunk(b"bext", bext) + plain[12:] + chunk(b"cue ", b"\1" * 28) + chunk(b"LIST", info) + chunk(b"iXML", ixml)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(rest) + 4) + b"WAVE" + rest)
    before = riff_chunks(path)
    written = write_metadata(path, DESCRIPTION)
    assert set(written) == {"iXML USER/KEYWORDS", "iXML USER/MODEL", "INFO IKEY", "INFO ISFT"}
    after = riff_chunks(path)
    assert [name for name, _ in after] == [name for name, _ in before]
    changed = {name for (name, old), (_, new) in zip(before, after, strict=True) if old != new}
    assert changed == {"LIST", "iXML"}
    root = ElementTree.fromstring(dict(after)["iXML"])
    assert (root.findtext("SCENE"), root.findtext("NOTE")) == ("12", "windy")
    assert b"by hand" in dict(after)["iXML"] and b"Title\0" in dict(after)["LIST"]
    write_metadata(path, DESCRIPTION, overwrite=True)
    found = dict(riff_chunks(path))
    assert found["bext"][256:].startswith(b"Recorder") and found["bext"].endswith(b"history!")
    assert found["bext"].startswith(b"Rain drums") and b"Title\0" in found["LIST"] and b"mine" not in found["LIST"]


def test_other_tags_are_kept(tmp_path):
    path = make(tmp_path / "song.mp3")
    tags = mutagen.id3.ID3()
    tags.add(mutagen.id3.TIT2(encoding=3, text="Title"))
    tags.add(mutagen.id3.COMM(encoding=3, lang="eng", desc="iTunNORM", text="00A"))
    tags.add(mutagen.id3.TYER(encoding=3, text="1999"))
    tags.save(path, v2_version=3)
    write_metadata(path, DESCRIPTION)
    assert path.read_bytes()[:4] == b"ID3\x03"
    tag = TinyTag.get(path)
    assert (tag.title, tag.year, tag.comment) == ("Title", "1999", DESCRIPTION.caption)
    assert [frame.text for frame in mutagen.id3.ID3(path).getall("COMM:iTunNORM")] == [["00A"]]
    # A comment of another description with the same words.
    tags = mutagen.id3.ID3(path)
    tags.add(mutagen.id3.COMM(encoding=3, lang="eng", desc="mine", text=DESCRIPTION.caption))
    tags.save(path)
    write_metadata(path, DESCRIPTION, overwrite=True)
    assert {frame.desc for frame in mutagen.id3.ID3(path).getall("COMM")} == {"", "mine", "iTunNORM"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.wav", lambda plain: b"RF64" + plain[4:], "metadata of RF64 files is not written"),
        ("a.w64", lambda plain: b"riff" + plain[4:], "metadata of W64 files is not written"),
        ("a.wav", lambda plain: plain[:-500], "cut off, or of unknown length, in its 'data' chunk"),
        ("a.wav", lambda plain: plain[:40] + b"\0\0\0\0" + plain[44:], "does not say how long it is"),
        ("a.wav", lambda plain: plain + b"iXML\x04\0\0\0<BWF", "iXML chunk is not valid XML"),
        ("a.au", lambda plain: b".snd" + plain[44:], "metadata of such files is not written"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, data, message):
    path = tmp_path / name
    data = data(make(tmp_path / "plain.wav").read_bytes())
    if b"<BWF" in data:
        data = b"RIFF" + struct.pack("<I", len(data) - 8) + data[8:]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        write_metadata(path, DESCRIPTION)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == data


def test_a_link_stays_a_link(tmp_path):
    path = make(tmp_path / "rain.flac")
    link = tmp_path / "link.flac"
    link.symlink_to(path)
    write_metadata(link, DESCRIPTION)
    assert link.is_symlink() and mutagen.File(path)["description"] == [DESCRIPTION.caption]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_changed_sound_is_noticed(tmp_path, monkeypatch, suffix):
    """A writer that moves a single bit of the sound must not replace the file."""
    from recap_hf.audio import metadata

    path = make(tmp_path / f"rain.{suffix}")
    before = path.read_bytes()
    editor = metadata._WavEditor if suffix == "wav" else metadata._TagEditor
    write = editor.write

    def broken(self, temporary):
        write(self, temporary)
        data = bytearray(temporary.read_bytes())
        place = data.index(b"data") + 1000 if suffix == "wav" else len(data) - 100
        data[place] ^= 1
        temporary.write_bytes(data)

    monkeypatch.setattr(editor, "write", broken)
    with pytest.raises(ValueError, match="its audio data would not stay as it is"):
        write_metadata(path, DESCRIPTION)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "archive"
    folder.mkdir()
    for suffix in ("wav", "flac"):
        make(folder / f"{suffix}.{suffix}")
    soundfile.write(folder / "w.w64", CLIP, 48_000)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = ["caption", str(folder), "--write-metadata", "--format", "jsonl", "--max-new-tokens", "6"]
    assert main([*arguments, "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert main(arguments) == 1
    after = capsys.readouterr()
    assert after.out == captured.out
    rows = {os.path.basename(row["file"]): row for row in map(json.loads, after.out.splitlines())}
    # The caption is not lost.
    assert rows["w.w64"]["caption"] and "metadata of W64 files is not written" in rows["w.w64"]["error"]
    assert "1 of 3 recordings could not be" in after.err
    flac = mutagen.File(folder / "flac.flac")
    assert flac["description"] == [rows["flac.flac"]["caption"]] and flac["keywords"]
    assert flac["caption_model"][0].endswith(", recap-tiny")
    assert f"flac.flac: would write DESCRIPTION: {rows['flac.flac']['caption']}" in captured.err
    tags = json.loads(_tags(folder / "flac.flac", capsys))["tags"]
    assert flac["keywords"] == [tag["name"] for tag in tags]


def _tags(path, capsys):
    assert main(["tag", str(path), "--format", "jsonl"]) == 0
    return capsys.readouterr().out


KILLED = """
import sys
from recap_hf.audio.metadata import SoundDescription, write_metadata
print("ready", flush=True)
for number in range(10_000):
    for path in sys.argv[1:]:
        write_metadata(path, SoundDescription(f"caption {number}", ("a",), "m"), overwrite=True)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_every_file_whole(tmp_path):
    paths = [make(tmp_path / f"rain.{suffix}") for suffix in SUFFIXES]
    before = [packets(path) for path in paths]
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *map(str, paths)], stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [packets(path) for path in paths] == before
    for left in tmp_path.glob(".*.tmp"):
        left.unlink()


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ffprobe_reads_it(tmp_path, suffix):
    path = make(tmp_path / f"rain.{suffix}")
    write_metadata(path, DESCRIPTION)
    command = ["ffprobe", "-v", "error", "-show_format", "-show_streams", "-of", "json", str(path)]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    tags = {**shown["format"].get("tags", {}), **shown["streams"][0].get("tags", {})}
    assert DESCRIPTION.caption in tags.values()
