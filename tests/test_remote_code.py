"""A saved folder in a process where `recap_hf` cannot be imported: it must bring all that it needs."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_without_the_package

from recap_hf import AudioCaptioningPipeline
from recap_hf.modeling import configuration_recap

EARLIER = Path(__file__).parent / "datastores" / "indexed"
ALLOWED = {"numpy", "torch", "transformers"} | set(sys.stdlib_module_names)

SCRIPT = """
import numpy as np
import torch
from transformers import (AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor,
                          AutoTokenizer, pipeline)

folder, clip, earlier = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
seq2seq = AutoModelForSpeechSeq2Seq.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
inputs = processor(audio=clip, sampling_rate=48_000, return_tensors="pt")
features = extractor(clip, sampling_rate=48_000, return_tensors="pt")["input_features"]
ids = model.generate(**inputs, processor=processor)

def refused(function, *args):
    try:
        function(*args)
    except ImportError as error:
        return str(error)

store = type(processor.datastore)
processor.save_pretrained("again")
print(json.dumps({
    "model_type": config.model_type,
    "module": type(model).__module__,
    "same_features": torch.equal(features, inputs["input_features"]),
    "ids": ids.tolist(),
    "seq2seq_ids": seq2seq.generate(**inputs, processor=processor).tolist(),
    "caption": processor.batch_decode(ids)[0],
    "tokens": tokenizer("a dog barks")["input_ids"],
    "with_task": pipeline("audio-captioning", model=folder, **trust)(clip),
    "without_task": pipeline(model=folder, **trust)(clip),
    "saved": store.from_pretrained("again/datastore").captions,
    "refused": [
        refused(store.from_pretrained, earlier),
        refused(store.from_pretrained, "milvus:captions.db"),
        refused(store.from_embeddings(["a"], np.ones((1, 2))).save_pretrained, "new"),
        refused(processor.datastore.push_to_hub, "user/captions"),
    ],
}))
"""


def test_a_folder_is_complete(tiny_model, tiny_processor, clips, tmp_path):
    tiny_model.generation_config.max_new_tokens = 8
    tiny_model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    np.save(tmp_path / "clip.npy", clips[2])
    result = run_without_the_package(SCRIPT, tmp_path, tmp_path / "moved", tmp_path / "clip.npy", EARLIER)
    assert result["model_type"] == "recap"
    assert result["module"].startswith("transformers_modules")
    assert result["same_features"]
    inputs = tiny_processor(audio=clips[2], sampling_rate=48_000, return_tensors="pt")
    ids = tiny_model.generate(**inputs, processor=tiny_processor)
    assert result["ids"] == result["seq2seq_ids"] == ids.tolist()
    assert result["caption"] == tiny_processor.batch_decode(ids)[0]
    assert result["tokens"] == tiny_processor.tokenizer("a dog barks")["input_ids"]
    here = AudioCaptioningPipeline(model=tiny_model, processor=tiny_processor)(clips[2])
    assert result["with_task"] == result["without_task"]
    assert result["with_task"]["caption"] == here["caption"]
    assert result["with_task"]["score"] == pytest.approx(here["score"], rel=1e-4)
    assert [hit["row"] for hit in result["with_task"]["retrieved"]] == [hit["row"] for hit in here["retrieved"]]
    assert result["saved"] == tiny_processor.datastore.captions
    # What only the package does says so.
    assert ["pip install recap-hf" in message for message in result["refused"]] == [True] * 4


REMOTE_CODE = sorted(Path(configuration_recap.__file__).parent.glob("*_recap.py"))


def test_remote_code_stays_small():
    """It is saved with every checkpoint: at most 15 files and 4,500 lines, 500 in a file."""
    files = REMOTE_CODE[0].parent.glob("*.py")
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lines) <= 15
    assert sum(lines.values()) <= 4500
    assert max(lines.values()) <= 500, max(lines, key=lines.get)


@pytest.mark.parametrize("path", REMOTE_CODE, ids=lambda path: path.name)
def test_remote_code_is_closed(path: Path):
    """transformers copies siblings named in `from .x import y` lines and demands every other import it finds."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    guarded = [node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in guarded:
            assert all(alias.name.partition(".")[0] in ALLOWED for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node not in guarded:
            if node.level:
                assert node.level == 1, ast.unparse(node)
                assert node.module, "`from . import x` is not seen by transformers"
                assert (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)
            else:
                assert node.module.partition(".")[0] in ALLOWED, ast.unparse(node)
    in_code = len(re.findall(r"^\s*from\s+\.", source, flags=re.MULTILINE))
    relative = sum(isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(tree))
    assert in_code == relative, "a line of text that begins like a relative import is taken for one"
