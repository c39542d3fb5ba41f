"""The converted model against the original `laion_clap` code with random weights: the same numbers.

`laion-clap` wants numpy < 2 and torchvision, so it lives in an environment of its own:

    python -m venv laion-env
    laion-env/bin/pip install laion-clap torchvision safetensors
    RECAP_LAION_PYTHON=laion-env/bin/python pytest -m slow tests/test_conversion_laion_parity.py -s

(torchvision may be left out: what would be used of it is stubbed.) Without the variable the tests run where
`laion_clap` can be imported beside this package, and skip elsewhere. A run takes about a minute and 3 GB of memory.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import ClapModel

from recap_hf.conversion import convert_laion_clap

pytestmark = pytest.mark.slow
LIMIT = 1e-5


@pytest.fixture(scope="module")
def laion_python() -> str:
    if python := os.environ.get("RECAP_LAION_PYTHON"):
        return python
    if importlib.util.find_spec("laion_clap") is None:
        pytest.skip("laion_clap is not importable and RECAP_LAION_PYTHON names no Python that has it")
    return sys.executable


def relative(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return ((actual - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("fusion", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_same_numbers_as_the_original_code(laion_python, size, fusion, tmp_path):
    script = Path(__file__).with_name("laion_clap_reference.py")
    command = [laion_python, str(script), str(tmp_path), "--size", size, *(["--fusion"] if fusion else [])]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    convert_laion_clap(tmp_path / "checkpoint.pt", tmp_path / "clap")
    model = ClapModel.from_pretrained(tmp_path / "clap")
    original = load_file(tmp_path / "reference.safetensors")

    last = {}
    model.audio_model.audio_encoder.norm.register_forward_hook(lambda _, __, output: last.update(hidden=output))
    with torch.inference_mode():
        audio = model.audio_model(
            input_features=original["mel"], is_longer=original["longer"][:, None], output_hidden_states=True
        )
        text = model.text_model(input_ids=original["input_ids"], attention_mask=original["attention_mask"])
        embeds = normalize(model.audio_projection(audio.pooler_output), dim=-1)
        text_embeds = normalize(model.text_projection(text.pooler_output), dim=-1)
    tokens = original["attention_mask"].bool()
    measured = {
        "audio embeddings": relative(embeds, original["audio_embeds"]),
        "text embeddings": relative(text_embeds, original["text_embeds"]),
        "last hidden state": relative(last["hidden"], original["hidden.last"]),
        "text hidden state": relative(text.last_hidden_state[tokens], original["hidden.text"][tokens]),
    }
    for stage, state in enumerate(audio.hidden_states[1:]):
        ours = state.flatten(2).transpose(1, 2)
        measured[f"stage {stage}"] = relative(ours, original[f"hidden.stage{stage}"])
    print(f"\n{size}, {'fused' if fusion else 'unfused'}: " + ", ".join(f"{k} {v:.1e}" for k, v in measured.items()))
    assert max(measured.values()) < LIMIT
    # The two clips and the two sentences differ, so agreement is more than a constant.
    assert relative(embeds[:1], embeds[1:]) > 0.01 and relative(text_embeds[:1], text_embeds[1:]) > 0.01
