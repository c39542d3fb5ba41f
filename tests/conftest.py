"""Shared fixtures: tiny random models of the true architecture, synthetic recordings, the shared data folder."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

# Before transformers is imported anywhere: no test reaches for the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_CAPTIONS = (
    "a dog barks twice",
    "rain falls on a roof",
    "a violin plays a slow melody",
    "a man speaks while a clock ticks",
    "sea waves roll onto a beach",
    "a rooster crows, then a dog barks",
    "a helicopter flies past in the distance",
    "a baby cries",
)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real recordings and published captions, which is not part of the repository."""
    folder = Path(os.environ.get("RECAP_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set RECAP_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def sound_files(shared_dir: Path) -> list[Path]:
    """16 real recordings of different events and lengths, from the test fold."""
    import csv

    with open(shared_dir / "data" / "sound_events" / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "5"]
    first_of_event = {row["event"]: row for row in reversed(rows)}
    return [shared_dir / "data" / "sound_events" / row["file_name"] for row in list(first_of_event.values())[:16]]


def tiny_clap_config(**audio):
    from transformers import ClapConfig

    audio_config = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 32,
        "depths": [1, 1, 1],
        "num_attention_heads": [1, 2, 2],
        "patch_size": 8,
        "patch_stride": [8, 8],
        "hidden_dropout_prob": 0.0,
        **audio,
    }
    text_config = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 82,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return ClapConfig(text_config=text_config, audio_config=audio_config, projection_dim=16)


def tiny_mobilenet_config():
    """The CLAP on a MobileNet, small."""
    from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapConfig

    return MobileNetClapConfig(
        {
            "vocab_size": 380,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 82,
        },
        projection_dim=16,
        projection_hidden_size=24,
        width_multiplier=0.25,
        id2label={0: "Dog", 1: "Rain", 2: "Bell"},
    )


def tiny_gpt2_config(**kwargs):
    from transformers import GPT2Config

    sizes = {"vocab_size": 300, "n_positions": 256, "n_embd": 24, "n_layer": 2, "n_head": 3}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{**sizes, **dropout, "bos_token_id": 0, "eos_token_id": 0, **kwargs})


def byte_tokenizer(special_tokens: list[str], vocab_size: int = 300):
    """A byte-level BPE tokenizer trained on the tiny captions: any text can be written with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_CAPTIONS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def decoder_tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(["<|endoftext|>"]), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def clap_tokenizer():
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def _tiny_model():
    from recap_hf import RecapConfig, RecapForConditionalGeneration

    torch.manual_seed(0)
    config = RecapConfig(clap=tiny_clap_config(), decoder=tiny_gpt2_config(), cross_attention_reduce_factor=2)
    model = RecapForConditionalGeneration(config).eval()
    with torch.no_grad():
        # At their standard initialisation random layers hardly move a logit: captions would not depend on anything.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "crossattention" in name or "decoder" in name else 2.0)
    return model


@pytest.fixture
def tiny_model(_tiny_model):
    """A random RECAP model with all its parts; each test gets a copy of its own."""
    return copy.deepcopy(_tiny_model)


@pytest.fixture
def tiny_processor(tiny_model, decoder_tokenizer, clap_tokenizer):
    """The tiny model's processor, with a datastore of `TINY_CAPTIONS`."""
    from recap_hf import CaptionDatastore, RecapProcessor

    processor = RecapProcessor.from_config(
        tiny_model.config, copy.deepcopy(decoder_tokenizer), copy.deepcopy(clap_tokenizer)
    )
    processor.datastore = CaptionDatastore.from_captions(TINY_CAPTIONS, tiny_model, processor)
    return processor


def synthetic_clip(seconds: float, seed: int, sampling_rate: int = 48_000) -> np.ndarray:
    """A recording that changes over time: a gliding tone in decaying noise, in [-1, 1]."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    tone = np.sin(2 * np.pi * (200 + 150 * seed + 90 * time) * time)
    noise = generator.standard_normal(len(time)) * np.exp(-(time % 1.7))
    return (0.4 * tone + 0.1 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def model_folder(_tiny_model, decoder_tokenizer, clap_tokenizer, tmp_path_factory) -> str:
    """A saved tiny captioner with a datastore of two captions."""
    from recap_hf import CaptionDatastore, RecapProcessor

    processor = RecapProcessor.from_config(_tiny_model.config, decoder_tokenizer, clap_tokenizer)
    processor.datastore = CaptionDatastore.from_captions(["a dog barks", "rain falls"], _tiny_model, processor)
    folder = tmp_path_factory.mktemp("model")
    _tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def encoded(tiny_model, tiny_processor, clips):
    """The clips as the tiny model hears them, and the prompts of what it retrieves for them."""
    import torch

    inputs = tiny_processor(audio=clips, sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        encoding = tiny_model.encode_audio(**inputs)
    return encoding, tiny_processor.build_prompts(encoding.audio_embeds)


@pytest.fixture(scope="module")
def clap():
    """A CLAP on a MobileNet, random."""
    from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel

    torch.manual_seed(0)
    return MobileNetClapModel(tiny_mobilenet_config()).eval()


@pytest.fixture(scope="module")
def extractor():
    """Its feature extractor."""
    from recap_hf import RecapFeatureExtractor
    from recap_hf.modeling.mobilenet_clap_recap import MobileNetClapModel

    return RecapFeatureExtractor(**MobileNetClapModel.feature_settings(tiny_mobilenet_config()))


@pytest.fixture(scope="module")
def clap_folder(clap, extractor, tmp_path_factory) -> Path:
    """Both, saved with a tokenizer; a file's own `clap` takes the place of the one here."""
    from training_parts import make_tokenizer

    path = tmp_path_factory.mktemp("clap")
    clap.save_pretrained(path)
    extractor.save_pretrained(path)
    make_tokenizer("clap").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def clips() -> list[np.ndarray]:
    """Seven clips at 48 kHz: shorter than a window, one window, longer, and very short."""
    return [synthetic_clip(seconds, seed) for seed, seconds in enumerate((2.5, 10.0, 24.3, 0.4, 7.0, 10.01, 3.3))]


@pytest.fixture
def hub():
    """A Hub of its own that speaks HTTP; files of several parts begin at 100 kB."""
    from hub_server import HubServer

    with HubServer(part_size=100_000) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """A process with the real Hub client and an empty home, connected to `hub`."""
    from hub_client import Client

    home = tmp_path / "home"
    home.mkdir()
    return Client(hub, home)


def same_results(actual, expected) -> bool:
    """Whether pipeline results say the same: texts exactly, scores to float32's precision over batch sizes."""
    if isinstance(expected, float):
        return actual == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(same_results, actual, expected))
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same_results(actual[key], expected[key]) for key in expected)
    return actual == expected


WITHOUT_PACKAGE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "recap_hf":
            raise ModuleNotFoundError(f"{name} must not be needed here", name=name)

sys.meta_path.insert(0, Blocker())
for name in [name for name in sys.modules if name.partition(".")[0] == "recap_hf"]:
    del sys.modules[name]
"""


def run_without_the_package(script: str, folder: Path, *arguments: object) -> dict:
    """What a script prints as JSON in its last line, in a process in `folder` that cannot import recap_hf."""
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.strip().splitlines()[-1])
