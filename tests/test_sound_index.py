"""Sound indexes: places and scores against computations by hand, updates that encode what changed, the commands."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import soundfile
import torch
from conftest import synthetic_clip, tiny_mobilenet_config
from training_parts import make_tokenizer

from recap_cli import main
from recap_hf import CaptionDatastore
from recap_hf.archive import INDEX_NAME, SoundEncoder, SoundIndex, updating
from recap_hf.datastore import verify_datastore
from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel

RATE = 16_000
PATCH = 7_680


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise of a colour of its own: embeddings of a random tower tell it from others."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal(round(seconds * RATE)))
    frequencies = np.linspace(0, 1, len(spectrum))
    spectrum *= np.exp(-(((frequencies - rng.uniform(0.05, 0.9)) / rng.uniform(0.02, 0.3)) ** 2)) + 0.01
    waveform = np.fft.irfft(spectrum, round(seconds * RATE))
    return (waveform / np.abs(waveform).max() * 0.5).astype(np.float32)


class Encoder(SoundEncoder):
    """Notes what it encodes."""

    def embed_places(self, recordings):
        recordings = list(recordings)
        self.seen = [*getattr(self, "seen", []), *(Path(name).name for name in recordings if isinstance(name, str))]
        yield from super().embed_places(recordings)


@pytest.fixture
def encoder(clap, extractor) -> Encoder:
    return Encoder(clap, extractor, make_tokenizer("clap"), "tiny")


@pytest.fixture
def archive(tmp_path) -> Path:
    """Six recordings of 2 to 25 s in two folders, a silent and a broken one."""
    folder = tmp_path / "archive"
    (folder / "sub").mkdir(parents=True)
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", noise(2 + number, number), RATE)
    long = np.concatenate([noise(9.0, 10), noise(8.0, 11), noise(8.0, 12)])
    soundfile.write(folder / "sub" / "long.wav", long, RATE)
    soundfile.write(folder / "sub" / "über, 100%.flac", noise(3, 5), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


def patches_of(clap, extractor, waveform: np.ndarray) -> list[torch.Tensor]:
    """The features of a waveform of whole windows, patch by patch."""
    windows = waveform.reshape(-1, 21 * PATCH)
    with torch.no_grad():
        mel = extractor(list(windows), sampling_rate=RATE, return_tensors="pt")["input_features"]
        return list(clap.audio_features(mel).flatten(0, 1))


def embedded(clap, patches: list[torch.Tensor]) -> np.ndarray:
    """By hand: mean and maximum over the patches, projected, of unit length."""
    stacked = torch.stack(patches)
    with torch.no_grad():
        vector = clap.audio_projection(torch.cat([stacked.mean(dim=0), stacked.amax(dim=0)])[None])[0]
    return (vector / vector.norm()).numpy()


def names(folder: Path, results: list[dict]) -> list[str]:
    return [Path(result["path"]).relative_to(folder).as_posix() for result in results]


def state(index: SoundIndex) -> dict:
    """The places of each recording with their vectors, whatever the order of the rows."""
    found: dict = {}
    for record, vector in zip(index.store.records, np.asarray(index.store.embeddings), strict=True):
        found.setdefault(record["caption"], []).append((record["start"], record["end"], vector.round(4).tolist()))
    return found


def test_places_by_hand(clap, extractor, encoder):
    """Two windows are 42 patches of 0.48 s: a place of 11 each 4, and one that ends with the sound."""
    waveform = np.concatenate([noise(10.08, 1), noise(10.08, 2)])
    patches = patches_of(clap, extractor, waveform)
    [(_, places)] = encoder.embed_places([waveform])
    starts = [*range(0, 31, 4), 31]
    assert places.spans == [(round(start * 0.48, 3), round((start + 11) * 0.48, 3)) for start in starts]
    expected = np.stack([embedded(clap, patches[start : start + 11]) for start in starts])
    np.testing.assert_allclose(places.vectors, expected, atol=1e-5)
    total = expected.sum(axis=0)
    np.testing.assert_allclose(encoder.embed_audio(waveform), total / np.linalg.norm(total), atol=1e-5)


def test_recordings_that_are_encoded_together_do_not_touch_each_other(encoder):
    recordings = [noise(1.0, 1), noise(47.0, 2), np.zeros(RATE, np.float32), noise(12.0, 3), noise(0.3, 4)]
    together = [places for _, places in encoder.embed_places(recordings)]
    for recording, places in zip(recordings, together, strict=True):
        [(_, alone)] = encoder.embed_places([recording])
        assert places.spans == alone.spans
        np.testing.assert_allclose(places.vectors, alone.vectors, atol=1e-5)
    assert [places.spans[-1][1] if places.spans else None for places in together] == [1.0, 47.0, None, 12.0, 0.3]


def test_silence_inside_a_recording_ends_a_place(encoder):
    waveform = np.concatenate([noise(10.08, 1), np.zeros(21 * PATCH, np.float32), noise(2.0, 2)])
    [(_, places)] = encoder.embed_places([waveform])
    # The last window ends with the recording: it begins 8.08 s before the sound does, and has patches of its own.
    assert all(end <= 10.08 or start >= 20.16 - 5.28 for start, end in places.spans)
    assert places.spans[-1][1] == 22.16


def test_search_is_that_of_all_cosines(archive, encoder):
    index = SoundIndex.update(archive, encoder)
    vectors, records = np.asarray(index.store.embeddings), list(index.store.records)
    query = encoder.embed_text("a dog barks")
    cosines = vectors @ query
    best: dict = {}
    for row in np.argsort(-cosines):
        best.setdefault(records[row]["caption"], row)
    results = index.search(text="a dog barks", top=4)
    assert names(archive, results) == list(best)[:4]
    for result, row in zip(results, best.values(), strict=False):
        assert result["score"] == pytest.approx(float(cosines[row]), abs=1e-6)
        assert (result["start"], result["end"]) == (records[row]["start"], records[row]["end"])
    assert len(index.search(text="rain", top=50)) == 6


def test_places_of_one_recording_do_not_overlap(archive, encoder):
    index = SoundIndex.update(archive, encoder)
    results = index.search(text="a dog barks", top=50, places=50)
    assert [result["score"] for result in results] == sorted((r["score"] for r in results), reverse=True)
    own = sorted((r["start"], r["end"]) for r in results if r["path"].endswith("long.wav"))
    assert len(own) >= 3
    assert all(end <= start for (_, end), (start, _) in pairwise(own))


def test_a_recording_finds_its_likes_and_not_itself(archive, encoder):
    index = SoundIndex.update(archive, encoder)
    assert "2.wav" not in names(archive, index.search(audio=archive / "2.wav", top=9))
    copy = shutil.copy(archive / "2.wav", archive.parent / "elsewhere.wav")
    [found] = index.search(audio=copy, top=1)
    assert names(archive, [found]) == ["2.wav"]
    assert found["score"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="nothing but silence"):
        index.search(audio=archive / "silent.wav")
    with pytest.raises(ValueError, match="Give either"):
        index.search(text="rain", audio=copy)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        index.search(text="rain", top=0)


def test_an_update_encodes_what_changed(archive, encoder):
    first = SoundIndex.update(archive, encoder)
    assert [first.report[name] for name in ("recordings", "encoded", "unreadable")] == [6, 6, 1]
    assert {Path(name).name: reason for name, reason in first.left_out.items()}["silent.wav"] == "silence"
    before, encoder.seen = state(first), []
    assert SoundIndex.update(archive, encoder).report["unchanged"] == 6
    assert encoder.seen == []
    os.rename(archive / "0.wav", archive / "sub" / "moved.wav")
    shutil.copy(archive / "1.wav", archive / "copy.wav")
    os.utime(archive / "2.wav", (1, 1))
    (archive / "3.wav").unlink()
    soundfile.write(archive / "new.wav", noise(2.5, 20), RATE)
    index = SoundIndex.update(archive, encoder)
    assert encoder.seen == ["new.wav"]
    done = {"recordings": 7, "unchanged": 3, "reused": 3, "encoded": 1, "removed": 2, "unreadable": 1}
    assert index.report == {**done, "places": len(index)}
    after = state(index)
    assert after["sub/moved.wav"] == before["0.wav"]
    assert after["copy.wav"] == after["1.wav"] == before["1.wav"]
    assert after["2.wav"] == before["2.wav"]
    assert after.keys() - before.keys() == {"sub/moved.wav", "copy.wav", "new.wav"}
    assert before.keys() - after.keys() == {"0.wav", "3.wav"}
    soundfile.write(archive / "new.wav", noise(2.5, 21), RATE)
    (archive / "broken.wav").unlink()
    index = SoundIndex.update(archive, encoder)
    assert encoder.seen == ["new.wav", "new.wav"]
    assert index.report["unreadable"] == 0
    assert state(index)["new.wav"] != after["new.wav"]
    assert verify_datastore(archive / INDEX_NAME) == []


def test_what_cannot_be_decoded_is_remembered_and_what_is_not_there_is_tried_again(archive, encoder):
    (archive / "link.wav").symlink_to(archive / "later.wav")
    SoundIndex.update(archive, encoder)
    encoder.seen = []
    told = []
    SoundIndex.update(archive, encoder, progress=lambda *about: told.append(about))
    assert encoder.seen == ["link.wav"]
    [(done, total, path, problem)] = told
    assert (done, total, Path(path).name) == (1, 1, "link.wav")
    assert "no such file" in problem.lower()
    soundfile.write(archive / "broken.wav", noise(2.0, 30), RATE)
    soundfile.write(archive / "later.wav", noise(2.0, 31), RATE)
    index = SoundIndex.update(archive, encoder)
    assert {"broken.wav", "link.wav", "later.wav"} <= set(state(index))
    assert set(map(os.path.basename, index.left_out)) == {"silent.wav"}


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_an_update_that_is_cut_off_is_continued(archive, encoder, monkeypatch, stop):
    whole = state(SoundIndex.update(archive, encoder, index=archive.parent / "whole"))
    monkeypatch.setattr(updating, "_SAVED_EVERY_S", 0.0)
    monkeypatch.setattr(updating, "_SAVING_SHARE", float("inf"))

    def cut_off(done, total, path, problem):
        if done == stop:
            raise KeyboardInterrupt

    encoder.seen = []
    with pytest.raises(KeyboardInterrupt):
        SoundIndex.update(archive, encoder, progress=cut_off)
    index = SoundIndex.load(archive, encoder)
    # What came before is saved; two of the eight have no places.
    assert len(state(index)) + len(index.left_out) == stop - 1
    assert state(index).items() <= whole.items()
    assert state(SoundIndex.update(archive, encoder)) == whole


def test_a_reader_keeps_what_it_opened(archive, encoder):
    index = SoundIndex.update(archive, encoder)
    before = index.search(text="rain", top=9)
    (archive / "1.wav").unlink()
    SoundIndex.update(archive, encoder)
    assert index.search(text="rain", top=9) == before
    assert "1.wav" not in names(archive, SoundIndex.load(archive, encoder).search(text="rain", top=9))


def test_another_encoder_is_refused(archive, encoder, extractor):
    SoundIndex.update(archive, encoder)
    torch.manual_seed(9)
    other = Encoder(MobileNetClapModel(tiny_mobilenet_config()).eval(), extractor, make_tokenizer("clap"))
    soundfile.write(archive / "new.wav", noise(2.5, 20), RATE)
    with pytest.raises(ValueError, match=r"Another CLAP made this sound index \(tiny\)"):
        SoundIndex.update(archive, other)
    with pytest.raises(ValueError, match="recap index --overwrite"):
        SoundIndex.load(archive, other).search(text="rain")
    assert not hasattr(other, "seen")
    assert SoundIndex.update(archive, other, overwrite=True).report["encoded"] == 7


def test_a_large_index_is_approximate_and_finds_the_same(archive, encoder, monkeypatch):
    exact = SoundIndex.update(archive, encoder).search(text="rain", top=9, places=9)
    monkeypatch.setattr(updating, "_SEARCHED_EXACTLY", 3)
    soundfile.write(archive / "new.wav", np.concatenate([noise(8, seed) for seed in range(40, 60)]), RATE)
    index = SoundIndex.update(archive, encoder)
    assert index.store.index["kind"].startswith("IVF")
    found = [result for result in index.search(text="rain", top=99, places=99) if "new.wav" not in result["path"]]
    assert found == exact
    (archive / "new.wav").unlink()
    assert SoundIndex.update(archive, encoder).search(text="rain", top=9, places=9) == exact


def test_laions_clap_has_a_place_for_each_window(model_folder, clips, tmp_path):
    soundfile.write(tmp_path / "a.wav", clips[2], 48_000)
    index = SoundIndex.update(tmp_path, model_folder)
    assert [(record["start"], record["end"]) for record in index.store.records] == [(0, 10), (10, 20), (20, 24.3)]
    assert index.search(text="rain")[0]["path"] == str(tmp_path / "a.wav")


# -------------------------------------------------------------------- commands


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main([*map(str, argv)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_the_commands(capsys, archive, clap_folder, tmp_path):
    status, out, err = run(capsys, "index", archive, "--model", clap_folder)
    assert status == 1
    assert "broken.wav: " in err
    assert out.startswith(f"{archive}: recordings 6, places ")
    assert out.endswith("encoded 6, reused 0, unchanged 0, removed 0, unreadable 1\n")
    expected = SoundIndex.load(archive).search(text="a dog barking", top=3)
    status, out, err = run(capsys, "search", archive, "a dog barking", "--top", 3)
    assert status == 0
    lines = [f"{r['score']:.3f}  {r['path']}  ({r['start']:.2f}-{r['end']:.2f} s)" for r in expected]
    assert out.splitlines() == lines
    for form in ("json", "jsonl", "csv"):
        run(capsys, "search", archive, "a dog barking", "--top", 3, "--output", tmp_path / f"x.{form}")
        text = (tmp_path / f"x.{form}").read_text(encoding="utf-8")
        read = {"json": json.loads, "jsonl": lambda text: list(map(json.loads, text.splitlines()))}
        rows = read.get(form, lambda text: list(csv.DictReader(io.StringIO(text))))(text)
        assert [row["file"] for row in rows] == [result["path"] for result in expected]
        assert [float(row["score"]) for row in rows] == [result["score"] for result in expected]
    status, out, _ = run(capsys, "search", archive, "--audio", archive / "1.wav", "--format", "json")
    assert [row["file"] for row in json.loads(out)] == [
        result["path"] for result in SoundIndex.load(archive).search(audio=archive / "1.wav")
    ]
    assert run(capsys, "search", archive, "rain", "--threshold", 1.5)[0] == 1


def test_players_open_the_lists(capsys, archive, clap_folder, tmp_path):
    run(capsys, "index", archive, "--model", clap_folder)
    results = SoundIndex.load(archive).search(text="rain", top=6)
    run(capsys, "search", archive, "rain", "--output", tmp_path / "rain.m3u8")
    head, *lines = (tmp_path / "rain.m3u8").read_text(encoding="utf-8").splitlines()
    assert head == "#EXTM3U"
    for result, at in zip(results, range(0, len(lines), 4), strict=True):
        about, start, stop, address = lines[at : at + 4]
        assert about.endswith(Path(result["path"]).name)
        assert start == f"#EXTVLCOPT:start-time={result['start']:.2f}"
        assert stop == f"#EXTVLCOPT:stop-time={result['end']:.2f}"
        assert unquote(urlparse(address).path) == result["path"]
    run(capsys, "search", archive, "rain", "--output", tmp_path / "rain.edl")
    data = (tmp_path / "rain.edl").read_bytes()
    assert data.startswith(b"# mpv EDL v0\n")
    rest = data.partition(b"\n")[2]
    for result in results:
        # As mpv reads it: the number of bytes between two percent signs, the name, the start and the length.
        _, count, rest = rest.split(b"%", 2)
        name, rest = rest[: int(count)], rest[int(count) :]
        times, _, rest = rest.partition(b"\n")
        assert name.decode() == result["path"]
        start, length = map(float, times.strip(b",").split(b","))
        assert (start, start + length) == pytest.approx((result["start"], result["end"]), abs=1e-3)
    assert rest == b""


def test_wrong_calls_are_told(capsys, archive, clap_folder, tmp_path):
    run(capsys, "index", archive, "--model", clap_folder)
    other = tmp_path / "other"
    other.mkdir()
    for words, status, message in (
        (["search", archive], 2, "give the folders and then what to search for"),
        (["search", archive, " "], 2, "TEXT is empty"),
        (["search", archive, "--audio", "/nowhere.wav"], 2, "no such file"),
        (["search", archive, "rain", "--output", "x.srt"], 2, "no format has the suffix .srt"),
        (["search", archive, "--duplicates", "--format", "edl"], 2, "lists places to play"),
        (["search", archive, "--duplicates", "--top", 3], 2, "leave out --top and --places"),
        (["search", archive, other, "rain", "--index", tmp_path / "x"], 2, "is of one folder, got 2"),
        (["search", other, "rain"], 1, "make one: recap index"),
        (["index", other], 1, "no recordings in this folder"),
        (["index", tmp_path / "nowhere"], 1, "no such folder"),
    ):
        found, out, err = run(capsys, *words)
        assert (found, out) == (status, "")
        assert message in err


def test_an_index_that_is_made_anew_keeps_its_model(capsys, archive, clap_folder):
    run(capsys, "index", archive, "--model", clap_folder)
    assert run(capsys, "index", archive, "--overwrite")[1].endswith(
        "encoded 6, reused 0, unchanged 0, removed 0, unreadable 1\n"
    )
    store = CaptionDatastore.open_folder(archive / INDEX_NAME)
    assert Path(updating.encoder_of(archive / INDEX_NAME, store)) == Path(clap_folder)


def test_an_index_of_another_folder_is_refused_and_that_of_a_moved_one_is_not(capsys, archive, clap_folder, tmp_path):
    other, away = tmp_path / "other", tmp_path / "index"
    other.mkdir()
    soundfile.write(other / "sea.wav", noise(3, 77), RATE)
    run(capsys, "index", archive, "--model", clap_folder, "--index", away)
    before = state(SoundIndex.load(archive, index=away))
    for words in (["index", other], ["search", other, "rain"]):
        status, out, err = run(capsys, *words, "--index", away)
        assert (status, out) == (1, "")
        assert f"is the sound index of {archive.resolve()}, whose recordings are not in {other}" in err
    assert state(SoundIndex.load(archive, index=away)) == before
    moved = archive.rename(tmp_path / "moved")
    assert state(SoundIndex.load(moved, index=away)) == before
    assert "encoded 0, reused 0, unchanged 6, removed 0" in run(capsys, "index", moved, "--index", away)[1]
    assert "encoded 1" in run(capsys, "index", other, "--index", away, "--overwrite")[1]


def test_captions_are_no_index(capsys, archive, model_folder, tmp_path):
    (tmp_path / "captions.txt").write_text("rain\n", encoding="utf-8")
    run(
        capsys,
        "datastore",
        "build",
        tmp_path / "captions.txt",
        "--output",
        tmp_path / "store",
        "--model",
        model_folder,
    )
    status, out, err = run(capsys, "search", archive, "rain", "--index", tmp_path / "store")
    assert (status, out) == (1, "")
    assert "holds a datastore of captions, not a sound index" in err


def test_groups_of_two_folders_differ(capsys, clap_folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for copy in ("1", "2"):
            soundfile.write(tmp_path / name / f"{copy}.wav", synthetic_clip(3.0, ord(name)), 48_000)
        run(capsys, "index", tmp_path / name, "--model", clap_folder)
    _, out, _ = run(capsys, "search", tmp_path / "a", tmp_path / "b", "--duplicates", "--format", "json")
    assert [(Path(row["file"]).parent.name, row["group"]) for row in json.loads(out)] == [("a", 1), ("b", 2)]


def test_a_captioner_and_its_checkpoint_are_the_same_encoder(archive):
    from recap_hf import Captioner

    captioner = Captioner.from_pretrained(device="cpu")
    index = SoundIndex.update(archive, captioner)
    assert index.store.manifest["report"]["model"] is None
    [found], [expected] = index.search(text="rain", top=1), SoundIndex.load(archive).search(text="rain", top=1)
    assert found == expected
