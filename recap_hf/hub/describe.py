"""What the files of a checkpoint and of a datastore say, as a card shows it."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import ClapConfig

from recap_hf.modeling.configuration_recap import RecapConfig, encoder_class
from recap_hf.modeling.feature_extraction_recap import RecapFeatureExtractor
from recap_hf.modeling.options_recap import PAPER_PROMPT, RETRIEVAL, CaptionOptions
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .cards import DatastoreFacts, ModelDescription
from .facts import DataSource

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
# Tensors of a checkpoint that are no parameters (those of integers are known by their type).
BUFFERS = ("running_mean", "running_var")
UNNAMED = "unnamed"


def describe_checkpoint(folder: str | Path) -> ModelDescription:
    """Describes a saved RECAP checkpoint without loading its weights.

    Args:
        folder: holds `config.json`, and usually the weights and the files of processor and generation.

    Raises:
        OSError: there is no `config.json`. ValueError: it is another model's.
    """
    saved = _read_json(folder, "config.json")
    if not saved:
        raise FileNotFoundError(f"{folder} has no config.json: expected a folder that `save_pretrained` wrote")
    kind = saved.get("model_type")
    if kind != RecapConfig.model_type:
        found = f"{folder}/config.json is the configuration of a {kind!r} model"
        raise ValueError(f"{found}, expected {RecapConfig.model_type!r}")
    config, processor = RecapConfig.from_pretrained(folder), _read_json(folder, "processor_config.json")
    extractor = RecapFeatureExtractor(**encoder_class(config.clap).feature_settings(config.clap))
    rate = processor.get("feature_extractor", {}).get("sampling_rate", extractor.sampling_rate)
    sizes, dtypes = read_weights(folder)
    marks = (".crossattention.", "prefix_mapper.")
    conditioning = sum(size for name, size in sizes.items() if any(mark in name for mark in marks))
    parts = {
        "encoder": encoder_text(config),
        "decoder": (
            f"GPT-2, {config.decoder.n_layer} layers of width {config.decoder.n_embd}, {config.decoder.vocab_size:,} "
            f"tokens, at most {config.decoder.n_positions:,} positions"
        ),
        **conditioning_part(config, conditioning),
        "audio": (
            f"{rate / 1000:g} kHz mono, in windows of {config.window_length_s:g} s; a longer recording is several "
            "windows"
        ),
    }
    if sizes:
        parts["parameters"] = f"{sum(sizes.values()):,} in {' and '.join(dtypes)}"
    number = processor.get("num_retrieved_captions", 4)
    captions = [f"caption {rank}" for rank in range(1, number + 1)]
    if number > 3:
        captions[2:-1] = ["..."]
    prompt = processor.get("prompt_without_captions", PAPER_PROMPT.without_captions)
    if number:
        template = processor.get("prompt_template", PAPER_PROMPT.template)
        separator = processor.get("caption_separator", PAPER_PROMPT.separator)
        prompt = template.replace("{captions}", separator.join(captions))
    retrieval = {"k": processor.get("num_retrieved_captions"), **processor}
    chosen = _read_json(folder, "generation_config.json")
    chosen |= {name: retrieval.get(name) for name in CaptionOptions.names(RETRIEVAL)}
    options = [
        (option.name, chosen[option.name], option.metadata["help"])
        for option in fields(CaptionOptions)
        if chosen.get(option.name) is not None
    ]
    return ModelDescription(parts, prompt, number, options)


def _read_json(folder: str | Path, name: str) -> dict[str, Any]:
    path = Path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def encoder_text(config: RecapConfig) -> str:
    """The CLAP of a checkpoint, in words."""
    text = config.clap.text_config
    return (
        f"CLAP: {_audio_tower(config.clap)} (hidden states of width "
        f"{encoder_class(config.clap).hidden_size(config.clap)}), text tower "
        f"({text.num_hidden_layers} layers of width {text.hidden_size}), shared embeddings of "
        f"{config.clap.projection_dim} dimensions"
    )


def _audio_tower(clap: Any) -> str:
    if not isinstance(clap, ClapConfig):
        return {"mobilenet_clap": "MobileNet v1 audio tower"}.get(clap.model_type, f"{clap.model_type} audio tower")
    return "HTSAT audio tower" + (", fused" if clap.audio_config.enable_fusion else "")


def conditioning_part(config: RecapConfig, num_parameters: int) -> dict[str, str]:
    """What conditions GPT-2 on CLAP in a checkpoint: its name, and a description in words."""
    number = f", {num_parameters:,} parameters" if num_parameters else ""
    if config.conditioning == "prefix":
        text = (
            f"{config.prefix_length} embeddings before the prompt, made of the hidden states by "
            f"{config.prefix_num_layers} layers{number}, instead of cross-attention (after Kim et al. 2023): the "
            "part that is trained"
        )
        return {"prefix": text}
    if config.conditioning == "none":
        return {"conditioning": "untrained: GPT-2 is given the prompt alone, CLAP chooses the caption"}
    factor = config.cross_attention_reduce_factor
    share = "the decoder's own" if factor == 1 else f"the decoder's divided by {factor}"
    text = f"in every layer, of width {config.cross_attention_width} ({share}){number}: the part that RECAP trains"
    if config.encoder_states == "embedding":
        text += "; it attends to one vector for each window, the embedding that CLAP shares with captions"
    if config.audio_position_embedding:
        text += f"; {config.audio_position_embedding} position embeddings give it the time of each hidden state"
    return {"cross-attention": text}


def read_weights(folder: str | Path) -> tuple[dict[str, int], list[str]]:
    """Sizes of all parameters by name, and their types, the most frequent first; only the files' heads are read."""
    sizes: dict[str, int] = {}
    dtypes: Counter[str] = Counter()
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_slice(name)
                if tensor.get_dtype() in DTYPES and not name.endswith(BUFFERS):
                    sizes[name] = math.prod(tensor.get_shape())
                    dtypes[DTYPES[tensor.get_dtype()]] += sizes[name]
    return sizes, [name for name, _ in dtypes.most_common()]


def describe_datastore(datastore: CaptionDatastore) -> DatastoreFacts:
    """The description of a datastore on a card: one source per name and licence, the largest first."""
    counts = Counter((record.get("source") or UNNAMED, record.get("licence")) for record in datastore.records)
    sources = tuple(
        DataSource(str(name), licence=None if licence is None else str(licence), captions=number)
        for (name, licence), number in counts.most_common()
    )
    return DatastoreFacts(len(datastore), datastore.dimension, index_text(datastore.index), sources)


def index_text(index: Mapping[str, Any] | None) -> str:
    """How a datastore is searched, in words; `index` is a datastore's own description of its index."""
    if index is None:
        return "exact search"
    text = f"approximate search, FAISS {index['kind']}"
    measured = {name: value for name, value in (index.get("recall") or {}).items() if name != "k"}
    if measured:
        text += f", recall@{index['recall']['k']} at least {min(measured.values()):.3f} on queries held out"
    return text
