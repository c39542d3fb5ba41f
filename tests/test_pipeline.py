"""`pipeline("audio-captioning")`: every input, batches, streams, parameters, saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import same_results, synthetic_clip
from transformers import pipeline

from recap_hf import AudioCaptioningPipeline, CaptionDatastore


@pytest.fixture
def captioner(tiny_model, tiny_processor):
    return AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, max_new_tokens=8)


@pytest.fixture
def saved(tiny_model, tiny_processor, tmp_path):
    tiny_model.generation_config.max_new_tokens = 8
    tiny_model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_output_is_plain_python(captioner, clips):
    result = captioner(clips[0])
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"caption", "score", "retrieved"}
    assert isinstance(result["caption"], str)
    assert 0.0 < result["score"] < 1.0
    assert len(result["retrieved"]) == 4
    scores = [hit["score"] for hit in result["retrieved"]]
    assert scores == sorted(scores, reverse=True)


def test_every_kind_of_input(captioner, clips, tmp_path):
    clip = clips[0]
    expected = captioner(clip)
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip, 48_000, subtype="FLOAT")
    row = {"audio": {"path": str(path), "bytes": None}, "text": "a caption"}
    for source in (
        str(path),
        path,
        path.read_bytes(),
        {"array": clip, "sampling_rate": 48_000},
        row,
        torch.tensor(clip),
    ):
        assert same_results(captioner(source), expected)


def test_lists_generators_and_datasets(captioner, clips):
    from datasets import Dataset
    from transformers.pipelines.pt_utils import KeyDataset

    expected = [captioner(clip) for clip in clips]
    for batch_size in (1, 3):
        assert same_results(captioner(list(clips), batch_size=batch_size), expected)
        stream = captioner((clip for clip in clips), batch_size=batch_size)
        assert same_results(list(stream), expected)
        rows = Dataset.from_list([{"sound": {"array": clip.tolist(), "sampling_rate": 48_000}} for clip in clips[:2]])
        results = list(captioner(KeyDataset(rows, "sound"), batch_size=batch_size))
        assert same_results(results, expected[:2])


def test_series_sets_iterators_and_pairs(captioner, clips):
    pandas = pytest.importorskip("pandas")
    expected = [captioner(clip) for clip in clips]
    # Labels in another order than the rows, and with gaps.
    series = pandas.Series(
        [{"array": clip, "sampling_rate": 48_000} for clip in clips], index=[7, 0, 3, 1, 9, 2, 4][: len(clips)]
    )
    assert same_results(list(captioner(series)), expected)
    assert same_results(list(captioner(series.iloc[1:])), expected[1:])
    rows = dict(enumerate(series))
    for source in (
        iter(list(clips)),
        rows.values(),
        map(np.asarray, clips),
        torch.utils.data.DataLoader(clips, batch_size=None),
    ):
        assert same_results(list(captioner(source)), expected)
    assert captioner([]) == []
    stereo = np.round(np.stack([clips[0], clips[0]], axis=1) * 20_000).astype(np.int16)
    alone = captioner({"array": stereo[:, 0], "sampling_rate": 16_000})
    for pair in ((16_000, stereo), (stereo, 16_000), (np.int64(16_000), torch.from_numpy(stereo))):
        assert same_results(captioner(pair), alone)
    assert same_results(captioner([(16_000, stereo)] * 2), [alone] * 2)


def test_undecoded_datasets_rows(captioner, clips, tmp_path):
    from datasets import Audio, Dataset

    soundfile.write(tmp_path / "clip.flac", clips[0], 48_000)
    rows = Dataset.from_dict({"audio": [str(tmp_path / "clip.flac")]}).cast_column("audio", Audio(decode=False))
    for source in (rows, rows["audio"], (rows[0],)):
        assert same_results(list(captioner(source)), [captioner(str(tmp_path / "clip.flac"))])
    results = captioner([rows[0]])
    assert same_results(results, [captioner(str(tmp_path / "clip.flac"))])


def test_silence_is_a_result(captioner, clips):
    results = captioner([np.zeros(48_000, np.float32), clips[0]], batch_size=2)
    assert results[0] == {"caption": "silence", "score": 1.0, "retrieved": []}
    assert same_results(results[1], captioner(clips[0]))


def test_parameters(captioner, clips):
    assert captioner(clips[0], k=2)["retrieved"] == captioner(clips[0])["retrieved"][:2]
    assert captioner(clips[0], k=0)["retrieved"] == []
    tokens = captioner.tokenizer(captioner(clips[0], max_new_tokens=2, num_beams=1)["caption"])["input_ids"]
    assert len(tokens) <= 2
    torch.manual_seed(0)
    several = captioner(clips[0], generate_kwargs={"do_sample": True, "num_beams": 1, "num_return_sequences": 3})
    assert isinstance(several["caption"], str)
    with pytest.raises(TypeError, match="does not know the arguments beams"):
        captioner(clips[0], beams=2)


def test_dictionaries_of_generate_change_nothing(captioner, clips):
    found = captioner(clips[0], max_new_tokens=5)
    assert captioner(clips[0], max_new_tokens=5, return_dict_in_generate=True) == found


def test_another_datastore_changes_the_prompt(tiny_model, tiny_processor, clips, tmp_path):
    (tmp_path / "captions.txt").write_text("church bells ring\n\nglass breaks\n")
    store = CaptionDatastore.from_captions(["church bells ring", "glass breaks"], tiny_model, tiny_processor)
    store.save_pretrained(tmp_path / "store")
    results = []
    for datastore in (store, tmp_path / "store", tmp_path / "captions.txt", ["church bells ring", "glass breaks"]):
        captioner = AudioCaptioningPipeline(
            model=tiny_model, processor=tiny_processor, datastore=datastore, max_new_tokens=8
        )
        results.append(captioner(clips[0]))
    assert {hit["caption"] for hit in results[0]["retrieved"]} == {"church bells ring", "glass breaks"}
    assert same_results(results[1:], results[:1] * 3)


def test_a_missing_datastore_is_named(tiny_model, tiny_processor):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, datastore="none.txt")


def test_pipeline_by_name_and_folder(saved, captioner, clips):
    import recap_hf  # noqa: F401

    loaded = pipeline("audio-captioning", model=str(saved), batch_size=2)
    assert type(loaded) is AudioCaptioningPipeline
    assert same_results(loaded([clips[0], clips[2]]), captioner([clips[0], clips[2]]))
    with_store = pipeline("audio-captioning", model=str(saved), datastore=["church bells ring"])
    assert [hit["caption"] for hit in with_store(clips[0])["retrieved"]] == ["church bells ring"]


def test_save_pretrained_saves_all_and_no_local_path(captioner, clips, tmp_path):
    captioner.model.generation_config.max_new_tokens = 8
    captioner.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    loaded = pipeline("audio-captioning", model=str(tmp_path / "moved"))
    assert same_results(loaded(clips[0]), captioner(clips[0]))
    for path in (tmp_path / "moved").rglob("*.json*"):
        assert str(tmp_path) not in path.read_text(), path
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert config["custom_pipelines"]["audio-captioning"]["impl"] == "pipeline_recap.AudioCaptioningPipeline"


def test_a_clip_longer_than_a_window(captioner):
    clip = synthetic_clip(23.0, 3)
    assert same_results(captioner([clip], batch_size=4)[0], captioner(clip))
