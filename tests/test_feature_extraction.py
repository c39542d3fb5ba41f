"""Features: equal to the stock extractor's, repeatable, and windowed where that one crops at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import synthetic_clip
from transformers import ClapFeatureExtractor

from recap_hf import RecapFeatureExtractor, load_audio
from recap_hf.modeling.audio_recap import resample, to_mono


def stock_features(clip, truncation="rand_trunc"):
    stock = ClapFeatureExtractor(truncation=truncation)
    return stock(clip, sampling_rate=48_000, return_tensors="np")["input_features"][0, 0]


def real_clips(sound_files):
    for path in sound_files:
        waveform, rate = load_audio(path)
        yield resample(to_mono(waveform), rate, 48_000)


def test_equals_the_stock_extractor_on_real_recordings(sound_files):
    single, double = RecapFeatureExtractor(), RecapFeatureExtractor(compute_dtype="float64")
    differences = []
    for clip in real_clips(sound_files):
        expected = stock_features(clip)
        assert expected.shape == (1001, 64)
        exact = double(clip, sampling_rate=48_000, return_tensors="np")["input_features"][0, 0]
        assert np.abs(exact - expected).max() <= 1e-4
        features = single(clip, sampling_rate=48_000, return_tensors="np")["input_features"]
        assert features.shape == (1, 1, 1001, 64)
        differences.append(np.abs(features[0, 0] - expected))
    differences = np.stack(differences)
    assert differences.max() <= 0.1
    assert differences.mean() <= 1e-4
    assert (differences <= 1e-3).mean() >= 0.99


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_mel_filters_follow_the_checkpoint_family(truncation):
    clip = synthetic_clip(4.0, 1)
    features = RecapFeatureExtractor(truncation=truncation, compute_dtype="float64")(
        clip, sampling_rate=48_000, return_tensors="np"
    )["input_features"][0, 0]
    np.testing.assert_allclose(features, stock_features(clip, truncation), atol=1e-4)


def test_yamnets_filters_are_those_of_htk():
    assert RecapFeatureExtractor(spectrogram="yamnet").truncation == "fusion"
    with pytest.raises(ValueError, match="`truncation` must be 'rand_trunc' or 'fusion'"):
        RecapFeatureExtractor(spectrogram="yamnet", truncation="none")


def test_windows_of_a_long_clip_are_its_parts():
    extractor = RecapFeatureExtractor(compute_dtype="float64")
    clip = synthetic_clip(24.3, 2)
    assert extractor.window_starts(len(clip)) == [0, 480_000, int(14.3 * 48_000)]
    assert extractor.window_starts(960_000) == [0, 480_000]
    assert extractor.window_starts(480_000) == [0]
    assert extractor.window_starts(480_001) == [0, 1]
    batch = extractor([clip, clip[:48_000]], sampling_rate=48_000, return_tensors="np")
    assert batch["input_features"].shape == (2, 3, 1001, 64)
    assert batch["input_features_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    for window, start in enumerate(extractor.window_starts(len(clip))):
        expected = stock_features(clip[start : start + 480_000])
        np.testing.assert_allclose(batch["input_features"][0, window], expected, atol=1e-4)


def test_a_clip_does_not_depend_on_its_batch_or_on_the_seed(clips):
    extractor = RecapFeatureExtractor()
    torch.manual_seed(1)
    np.random.seed(1)
    together = extractor(clips, sampling_rate=48_000, return_tensors="pt")
    torch.manual_seed(2)
    np.random.seed(2)
    for row, clip in enumerate(clips):
        alone = extractor(clip, sampling_rate=48_000, return_tensors="pt")["input_features"][0]
        torch.testing.assert_close(alone, together["input_features"][row, : len(alone)], rtol=0, atol=1e-4)


def test_rates_channels_and_types():
    extractor = RecapFeatureExtractor()
    clip = synthetic_clip(3.0, 4, sampling_rate=16_000)
    expected = extractor(resample(clip, 16_000, 48_000), sampling_rate=48_000, return_tensors="np")["input_features"]
    stereo = np.stack([1.5 * clip, 0.5 * clip])
    for audio in ([stereo], [stereo.T], [torch.from_numpy(clip)], clip.astype(np.float64), clip.tolist()):
        features = extractor(audio, sampling_rate=16_000, return_tensors="np")["input_features"]
        np.testing.assert_allclose(features, expected, atol=5e-3)
    integers = (clip / np.abs(clip).max() * 32_767).astype(np.int16)
    as_floats = extractor(integers / np.float32(32_768), sampling_rate=16_000, return_tensors="np")["input_features"]
    features = extractor(integers, sampling_rate=16_000, return_tensors="np")["input_features"]
    np.testing.assert_allclose(features, as_floats, atol=1e-4)


def test_one_rate_per_clip():
    extractor = RecapFeatureExtractor()
    slow, fast = synthetic_clip(2.0, 1, 16_000), synthetic_clip(2.0, 2)
    both = extractor([slow, fast], sampling_rate=[16_000, 48_000], return_tensors="np")["input_features"]
    np.testing.assert_allclose(
        both[:1], extractor(slow, sampling_rate=16_000, return_tensors="np")["input_features"], atol=1e-4
    )


def test_a_clip_of_one_sample():
    features = RecapFeatureExtractor()(np.array([0.5], dtype=np.float32), sampling_rate=48_000, return_tensors="np")
    assert np.isfinite(features["input_features"]).all()


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(0, np.float32), 48_000, "Clip 0 is empty"),
        ([np.zeros(9, np.float32), np.array([0.1, np.nan])], 48_000, "Clip 1 holds NaN"),
        (np.zeros(9, np.float32), None, "`sampling_rate` is missing"),
        (np.zeros(9, np.float32), 3, "a sampling rate of 3 Hz is not possible"),
        ([np.zeros(9, np.float32)], [48_000, 16_000], "2 entries for 1 clips"),
        ([], 48_000, "empty list"),
    ],
)
def test_bad_audio_is_refused(audio, rate, message):
    with pytest.raises(ValueError, match=message):
        RecapFeatureExtractor()(audio, sampling_rate=rate)


def test_round_trip(tmp_path):
    RecapFeatureExtractor(truncation="fusion", compute_dtype="float64").save_pretrained(tmp_path)
    loaded = RecapFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.truncation, loaded.compute_dtype, loaded.nb_max_samples) == ("fusion", "float64", 480_000)


def test_a_saved_rate_that_no_recording_has_is_refused(tmp_path):
    RecapFeatureExtractor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"sampling_rate": 48000', '"sampling_rate": 1'))
    with pytest.raises(ValueError, match="a sampling rate of 1 Hz is not possible"):
        RecapFeatureExtractor.from_pretrained(tmp_path)


def test_clap_configurations_load(tmp_path):
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path)
    assert RecapFeatureExtractor.from_pretrained(tmp_path).truncation == "rand_trunc"


@pytest.mark.parametrize("whole", [False, True])
def test_mel_settings_of_a_published_clap_are_kept(clap_tokenizer, tmp_path, whole):
    """LAION's checkpoints hear from 50 Hz on; the stock extractor's default is 0 Hz, and no CLAP config tells."""
    from transformers import ClapProcessor

    stock = ClapFeatureExtractor(frequency_min=50, truncation="fusion")
    (ClapProcessor(stock, clap_tokenizer) if whole else stock).save_pretrained(tmp_path)
    ours = RecapFeatureExtractor.from_clap_pretrained(tmp_path)
    assert (ours.frequency_min, ours.frequency_max, ours.truncation) == (50, 14_000, "fusion")
    np.testing.assert_array_equal(ours.mel_filters, stock.mel_filters)
    with pytest.raises(OSError):
        RecapFeatureExtractor.from_clap_pretrained(tmp_path / "nothing")


def test_threads_are_as_many_afterwards_as_before(clips):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            RecapFeatureExtractor()(clips[0], sampling_rate=48_000)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
