"""Near-duplicates: correlations by hand, copies that were changed, and recordings that only sound alike."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from test_sound_index import RATE, encoder, noise, run  # noqa: F401 (a fixture)

from recap_hf.archive import SoundIndex
from recap_hf.archive.duplicates import _excerpt, correlation


def alike(seconds: float, colour: int, seed: int) -> np.ndarray:
    """Noise of a colour, at a level that comes and goes: two of one colour are of one kind and not the same."""
    rng = np.random.default_rng([colour, seed])
    tinted = np.fft.rfft(noise(seconds, colour))
    phases = np.exp(2j * np.pi * rng.random(len(tinted)))
    waveform = np.fft.irfft(np.abs(tinted) * phases, round(seconds * RATE))
    knots = np.arange(0, len(waveform), 2000)
    level = np.interp(np.arange(len(waveform)), knots, rng.uniform(0.2, 1, len(knots)))
    return (0.5 * waveform * level / np.abs(waveform).max()).astype(np.float32)


@pytest.fixture
def archive(tmp_path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    for colour in range(4):
        for seed in range(3):
            soundfile.write(folder / f"{colour}{seed}.wav", alike(4.0 + colour, colour, seed), RATE)
    return folder


def test_correlation_by_hand():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(3000)
    assert correlation(a, 3 * a[400:2000]) == (pytest.approx(1.0, abs=1e-9), 400.0)
    assert correlation(-a[400:2000], a) == (pytest.approx(1.0, abs=1e-9), -400.0)
    # A third of the energy is noise of its own; the first 300 samples of `b` lie before `a`.
    b = np.concatenate([rng.standard_normal(300), a[:1200] + 0.7 * rng.standard_normal(1200)])
    own, other = a[:1200], b[300:]
    expected = (own * other).sum() / np.sqrt((own**2).sum() * (other**2).sum())
    assert correlation(a, b) == (pytest.approx(expected, abs=0.01), -300.0)
    assert correlation(a, rng.standard_normal(1600))[0] < 0.2
    assert correlation(np.zeros(300), np.zeros(200))[0] == 0.0
    # Where one of them is still, the quotient of two roundings is no correlation.
    assert correlation(np.concatenate([a, np.full(4000, 1e-12)]), rng.standard_normal(1600))[0] < 0.2


def test_half_a_sample_costs_nothing():
    """Noise up to 3 kHz at 8 kHz, taken from 16 kHz at even and at odd samples: half a sample later."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(1 << 15))
    spectrum[round(len(spectrum) * 3 / 8) :] = 0
    fine = np.fft.irfft(spectrum)
    similarity, shift = correlation(fine[::2], fine[1::2])
    assert similarity > 0.99
    assert shift == 0.5


def test_an_excerpt_is_that_of_the_whole_recording(tmp_path):
    waveform = noise(9.0, 1)
    for name in ("a.wav", "a.flac", "a.mp3"):
        soundfile.write(tmp_path / name, waveform, RATE)
        whole = _excerpt(str(tmp_path / name), 0.0, 100.0, RATE)
        np.testing.assert_allclose(_excerpt(str(tmp_path / name), 2.5, 4.0, RATE), whole[40_000:64_000], atol=1e-3)


def test_copies_are_found_and_likes_are_not(archive, encoder):  # noqa: F811
    def copy(name: str, of: str, change, rate: int = RATE) -> None:
        waveform, _ = soundfile.read(archive / of, dtype="float32")
        soundfile.write(archive / name, change(waveform), rate)

    copy("quiet.wav", "00.wav", lambda wave: wave * 0.4)
    copy("late.wav", "11.wav", lambda wave: wave[round(1.2 * RATE) :])
    copy("low.wav", "22.wav", lambda wave: soxr.resample(wave, RATE, 11_025), 11_025)
    copy("coded.ogg", "30.wav", lambda wave: wave)
    copy("coded again.ogg", "30.wav", lambda wave: wave * 0.3)
    found = SoundIndex.update(archive, encoder).duplicates()
    pairs = {(Path(pair["path"]).name, Path(pair["other"]).name): pair for pair in found}
    assert set(pairs) == {
        ("00.wav", "quiet.wav"),
        ("11.wav", "late.wav"),
        ("22.wav", "low.wav"),
        ("30.wav", "coded.ogg"),
        ("30.wav", "coded again.ogg"),
        ("coded again.ogg", "coded.ogg"),
    }
    assert [pair["similarity"] for pair in found] == sorted((pair["similarity"] for pair in found), reverse=True)
    assert pairs["11.wav", "late.wav"]["offset"] == pytest.approx(-1.2, abs=0.02)
    assert pairs["00.wav", "quiet.wav"]["offset"] == 0.0
    groups = {name: pair["group"] for names, pair in pairs.items() for name in names}
    assert groups["30.wav"] == groups["coded.ogg"] == groups["coded again.ogg"]
    assert len({groups[name] for name in ("00.wav", "11.wav", "22.wav", "30.wav")}) == 4


def test_recordings_that_are_gone_are_left_out(archive, encoder):  # noqa: F811
    (archive / "copy.wav").write_bytes((archive / "00.wav").read_bytes())
    index = SoundIndex.update(archive, encoder)
    told = []
    assert len(index.duplicates(progress=lambda *about: told.append(about))) == 1
    assert told[-1][0] == told[-1][1] == len(told)
    (archive / "copy.wav").unlink()
    assert index.duplicates() == []
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1\.5"):
        index.duplicates(1.5)


def test_the_command_lists_pairs(capsys, archive, clap_folder, tmp_path):
    (archive / "copy.wav").write_bytes((archive / "00.wav").read_bytes())
    run(capsys, "index", archive, "--model", clap_folder)
    status, out, _ = run(capsys, "search", archive, "--duplicates")
    assert (status, out) == (0, f"1.000  {archive / '00.wav'}  =  {archive / 'copy.wav'}  (+0.00 s)\n")
    run(capsys, "search", archive, "--duplicates", "--output", tmp_path / "pairs.csv")
    [row] = csv.DictReader(io.StringIO((tmp_path / "pairs.csv").read_text()))
    assert (Path(row["file"]).name, Path(row["other"]).name, row["group"]) == ("00.wav", "copy.wav", "1")
    (archive / "copy.wav").unlink()
    status, out, err = run(capsys, "search", archive, "--duplicates")
    assert (status, out) == (1, "")
    assert "nothing was found" in err
