"""FENSE's models, loaded from local files: tiny random ones in the layout of the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from recap_hf.scoring import FenseModels

pytest.importorskip("sentence_transformers", reason='needs sentence-transformers: pip install "recap-hf[fense]"')

CAPTIONS = ["a dog barks", "rain"]
REFERENCES = [["a dog", "dog barks a"], ["rain falls"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Sentence-BERT folder (mean pooling), a BERT folder and an error detector's checkpoint, and their modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("fense")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["a", "dog", "barks", "rain", "falls"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    encoder = BertModel(config).eval()
    encoder.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16, "mean")], device="cpu").save(str(folder / "sbert"))
    head = torch.nn.Linear(16, 6)
    weights = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    # As in the published checkpoint, which an old release of transformers wrote.
    weights["encoder.embeddings.position_ids"] = torch.arange(512)[None]
    weights.update({f"clf.{key}": value for key, value in head.state_dict().items()})
    torch.save({"model_type": "some/bert", "num_classes": 6, "state_dict": weights}, folder / "echecker.ckpt")
    return folder, tokenizer, encoder, head


def test_similarity_and_error_probability(folders):
    folder, tokenizer, encoder, head = folders
    models = FenseModels(folder / "sbert", folder / "echecker.ckpt", folder / "bert")

    def states(text):
        with torch.no_grad():
            return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]

    def sentence(text):
        return torch.nn.functional.normalize(states(text).mean(0), dim=0)

    similarities = [
        float(np.mean([float(sentence(text) @ sentence(caption)) for text in refs]))
        for caption, refs in zip(CAPTIONS, REFERENCES, strict=True)
    ]
    assert models.sentence_similarities(CAPTIONS, REFERENCES) == pytest.approx(similarities, abs=1e-5)
    with torch.no_grad():
        expected = [float(head(states(caption)[0])[-1].sigmoid()) for caption in CAPTIONS]
    assert models.error_probabilities(CAPTIONS, batch_size=1) == pytest.approx(expected, abs=1e-5)
    assert models.names == {"sentence_model": "sbert", "error_detector": "echecker.ckpt"}


def test_absent_and_foreign_models_are_refused(folders, tmp_path):
    folder = folders[0]
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        FenseModels(tmp_path / "no", folder / "echecker.ckpt")
    with pytest.raises(FileNotFoundError, match="no error detector at"):
        FenseModels(folder / "sbert", tmp_path / "no.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="expected the keys model_type, num_classes and state_dict"):
        FenseModels(folder / "sbert", tmp_path / "other.ckpt")
