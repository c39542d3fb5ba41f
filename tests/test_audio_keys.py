"""A datastore keyed by audio: captions of similar recordings, one a clip, its own left out; files and commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import synthetic_clip
from training_parts import make_captioner, write_clotho

from recap_cli import main
from recap_hf import CaptionDatastore, RecapForConditionalGeneration, RecapProcessor
from recap_hf.datastore import (
    CaptionEmbedder,
    add_captions,
    clip_keys,
    datastore_from_clips,
    merge_datastores,
    reembed_datastore,
    verify_datastore,
)
from recap_hf.training.run import train
from recap_hf.training.tasks.captioner import CaptionerTrainingConfig


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with an untrained captioner and data in Clotho's layout: 8 clips to train, 3 to validate."""
    folder = tmp_path_factory.mktemp("audio_keys")
    model, processor = make_captioner()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_clotho(folder / "clotho")
    return folder


@pytest.fixture(scope="module")
def built(start):
    """The store that the command builds of the training clips."""
    output = start / "store"
    flags = ["--keys", "audio", "--output", str(output), "--model", str(start / "model"), "--device", "cpu"]
    assert main(["datastore", "build", f"clotho:{start / 'clotho'}", *flags]) == 0
    return output


def made_clips():
    captions = (["a tone glides", "a tone rises", "a long tone"], ["noise fades"], ["a low tone", "a tone glides"])
    return [
        {
            "audio": (synthetic_clip(2.0, seed), 48_000),
            "captions": texts,
            "clip_id": f"clip{seed}.wav",
            "source": "made",
        }
        for seed, texts in enumerate(captions)
    ]


def test_key_of_a_clip_is_the_mean_of_its_windows():
    first, second = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.6, 0.8])
    embeds = np.array([[first, second], [second, np.zeros(3)]])
    keys = clip_keys(torch.tensor(embeds))
    expected = (first + second) / np.sqrt(2)
    np.testing.assert_allclose(keys, [expected, second], atol=1e-6)


def test_similar_audio_is_found(tiny_model, tiny_processor):
    store = datastore_from_clips(made_clips(), tiny_model, tiny_processor, batch_size=2)
    assert store.keys == "audio" and len(store) == 6
    # The captions of a clip have one key, which is what the audio tower makes of the clip.
    inputs = tiny_processor(audio=[synthetic_clip(2.0, 2)], sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        query = tiny_model.encode_audio(**inputs).audio_embeds
    np.testing.assert_allclose(store.embeddings[4], query[0, 0].numpy(), atol=1e-5)
    np.testing.assert_array_equal(store.embeddings[4], store.embeddings[5])
    (hits,) = store.search(query, k=4)
    assert hits[0]["caption"] == "a low tone" and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    # One caption a clip: three clips, so three captions although four were asked for.
    assert [hit["clip_id"] for hit in hits[:1]] == ["clip2.wav"] and len({hit["clip_id"] for hit in hits}) == len(
        hits
    ) == 3
    (others,) = store.search(query, k=4, exclude_clip_ids=["clip2"])
    # Its own captions and their texts are left out: of the first clip, the first caption that is not one of them.
    assert {hit["caption"] for hit in others} == {"a tone rises", "noise fades"}


def test_clip_ids_may_be_numbers(tiny_model, tiny_processor):
    clips = [{**clip, "clip_id": number} for number, clip in enumerate(made_clips())]
    store = datastore_from_clips(clips, tiny_model, tiny_processor)
    for query in store.embeddings[::2]:
        (hits,) = store.search(query[None], k=6)
        assert sorted(hit["clip_id"] for hit in hits) == [0, 1, 2]


def test_keys_do_not_depend_on_training_mode(tiny_model, tiny_processor):
    expected = datastore_from_clips(made_clips(), tiny_model, tiny_processor).embeddings
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tiny_model.train()
    np.testing.assert_array_equal(datastore_from_clips(made_clips(), tiny_model, tiny_processor).embeddings, expected)
    assert tiny_model.training and tiny_model.clap.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_captioner_takes_it(tiny_model, tiny_processor):
    from recap_hf import AudioCaptioningPipeline

    store = datastore_from_clips(made_clips(), tiny_model, tiny_processor)
    pipe = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor, datastore=store)
    result = pipe({"raw": synthetic_clip(2.0, 0), "sampling_rate": 48_000})
    assert result["retrieved"][0]["caption"] == "a tone glides" and len(result["retrieved"]) == 3


@pytest.mark.parametrize("clip", [{"captions": ["a"]}, {"audio": (np.zeros(9), 48_000), "captions": []}])
def test_clips_need_audio_and_captions(tiny_model, tiny_processor, clip):
    with pytest.raises(ValueError, match="Clip 0 needs 'audio' and 'captions', got the keys"):
        datastore_from_clips([clip], tiny_model, tiny_processor)


def test_other_keys_are_refused():
    with pytest.raises(ValueError, match="keys of a datastore are 'text' or 'audio', got 'video'"):
        CaptionDatastore.from_embeddings(["a"], np.ones((1, 3)), keys="video")


def test_files_say_what_the_keys_are(built, start, capsys):
    store = CaptionDatastore.from_pretrained(built)
    assert store.keys == "audio" and len(store) == 40 and store.manifest["keys"] == "audio"
    assert store.manifest["report"]["kept"] == 40 and store.manifest["report"]["unreadable_clips"] == []
    assert verify_datastore(built, CaptionEmbedder.from_pretrained(start / "model", "cpu")) == []
    assert main(["datastore", "info", str(built), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"] == "audio"
    store.save_pretrained(start / "copy")
    assert CaptionDatastore.from_pretrained(start / "copy").keys == "audio"
    # One that was written before there were keys of audio is keyed by text.
    manifest = json.loads((built / "datastore.json").read_text())
    text = CaptionDatastore.from_embeddings(["a"], np.ones((1, 3)))
    text.save_pretrained(start / "text")
    assert text.keys == "text" and "keys" in manifest


def test_command_and_constructor_agree(built, start):
    model = RecapForConditionalGeneration.from_pretrained(start / "model")
    processor = RecapProcessor.from_pretrained(start / "model")
    files = sorted((start / "clotho" / "development").glob("*.wav"))
    clips = [{"audio": str(path), "captions": ["x"], "clip_id": path.name} for path in files]
    by_hand = datastore_from_clips(clips, model, processor)
    keys = {record["clip_id"]: key for record, key in zip(by_hand.records, by_hand.embeddings, strict=True)}
    store = CaptionDatastore.from_pretrained(built)
    for record, key in zip(store.records, store.embeddings, strict=True):
        np.testing.assert_allclose(key, keys[record["clip_id"]], atol=1e-5)


def test_texts_cannot_be_added(built, start):
    embedder = CaptionEmbedder.from_pretrained(start / "model", "cpu")
    with pytest.raises(ValueError, match="keyed by audio: it finds captions by the audio of their clips"):
        add_captions(built, [{"caption": "a dog barks"}], embedder)
    with pytest.raises(ValueError, match="cannot be moved to another encoder without its recordings"):
        reembed_datastore(built, embedder)
    texts = CaptionDatastore.from_captions(["a dog barks"], embedder.model, embedder.processor)
    texts.save_pretrained(start / "texts")
    with pytest.raises(ValueError, match=r"is keyed by text, .* by audio: keys of two kinds"):
        merge_datastores(built, [start / "texts"])


def test_files_of_captions_alone_are_refused(start, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a dog barks\n")
    flags = ["--keys", "audio", "--output", str(tmp_path / "out"), "--model", str(start / "model")]
    assert main(["datastore", "build", str(tmp_path / "captions.txt"), *flags]) == 1
    assert "keys of audio need recordings beside the captions: expected clotho:FOLDER" in capsys.readouterr().err
    assert main(["datastore", "build", f"clotho:{start / 'clotho'}", *flags, "--num-processes", "2"]) == 1
    assert "recordings are embedded by one process" in capsys.readouterr().err


def test_a_broken_recording_is_left_out(start, tmp_path, capsys):
    data = write_clotho(tmp_path / "clotho", train=3, captions=1)
    broken = next((data / "development").glob("*.wav"))
    broken.write_bytes(b"RIFF nothing")
    flags = ["--keys", "audio", "--output", str(tmp_path / "out"), "--model", str(start / "model"), "--format", "json"]
    assert main(["datastore", "build", f"clotho:{data}", *flags]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["captions"] == 2 and f"left out: {broken.stem}" in found.err.replace(".wav", "")


def test_training_by_similar_audio(start, tmp_path):
    """The command's own store of the training clips: own clips left out, and saved with the captioner."""
    output = tmp_path / "trained"
    config = CaptionerTrainingConfig(
        dataset=["clotho"],
        data_dir=[str(start / "clotho")],
        model=str(start / "model"),
        datastore=["training-audio"],
        num_retrieved=2,
        output_dir=str(output),
        max_steps=2,
        device="cpu",
    )
    report = train(config.validate())
    store = RecapProcessor.from_pretrained(output).datastore
    assert report["datastore_captions"] == len(store) == 40 and store.keys == "audio"
    # The neighbours that the run has looked up, against a search by hand.
    rows = [np.load(path) for path in (output / "features").glob("neighbours-*.npy")]
    training = next(array for array in rows if len(array) == 8)
    for clip, found in enumerate(training):
        own = store.records[5 * clip]["clip_id"]
        others = [(-float(store.embeddings[5 * n] @ store.embeddings[5 * clip]), n) for n in range(8) if n != clip]
        nearest = [store.records[5 * n]["clip_id"] for _, n in sorted(others)[:2]]
        assert own not in nearest and [store.records[row]["clip_id"] for row in found] == nearest


def test_command_evaluates_by_similar_audio(built, start, tmp_path):
    flags = ["--model", str(start / "model"), "--datastore", str(built), "--dataset", "clotho", "--device", "cpu"]
    flags += ["--data-dir", str(start / "clotho"), "--split", "train", "--max-clips", "2", "--no-scores"]
    assert main(["evaluate", *flags, "--systems", "first_retrieved", "--output-dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "first_retrieved.jsonl").read_text().splitlines()]
    store = CaptionDatastore.from_pretrained(built)
    for number, line in enumerate(lines):
        # Its own captions are left out, each of the four is of another clip, and the nearest comes first.
        clips = [hit["clip_id"] for hit in line["retrieved"]]
        assert line["clip_id"] not in clips and len(set(clips)) == 4
        cosines = [float(store.embeddings[5 * number] @ store.embeddings[hit["row"]]) for hit in line["retrieved"]]
        assert cosines == sorted(cosines, reverse=True)
        assert [hit["score"] for hit in line["retrieved"]] == pytest.approx(cosines, abs=1e-3)


def test_both_stores_of_the_training_captions_are_refused(start):
    config = CaptionerTrainingConfig(
        dataset=["clotho"], data_dir=["x"], output_dir="y", datastore=["training", "training-audio"]
    )
    with pytest.raises(ValueError, match="either 'training' or 'training-audio'"):
        config.validate()
