"""RECAP as ONNX graphs: the audio tower, and the decoder with its caches.

Three graphs and what the runner (`recap_hf.onnx_runtime`) needs beside them:

- ``audio_encoder.onnx``: log-mel windows to the states that the cross-attention reads and the retrieval queries;
- ``cross_attention.onnx``: those states to the keys and values of every block, computed once per clip;
- ``decoder.onnx``: tokens and caches to the next token's logits and the grown caches. The same graph takes the prompt
  (with empty caches) and each later token.

The exporter is PyTorch's dynamo-based one with dynamic shapes; the older tracing exporter writes a decoder that is
wrong without an error.
"""

import copy
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recap_hf.modeling.configuration_recap import HIDDEN
from recap_hf.modeling.encoder_recap import RecapClapEncoder, embedding_states
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.processing_recap import RecapProcessor
from recap_hf.onnx_runtime import (
    AUDIO_ENCODER,
    CROSS_ATTENTION,
    DATASTORE_FOLDER,
    DECODER,
    FORMAT_VERSION,
    MEL_FILTERS,
    SETTINGS,
    TOKENIZER,
    OnnxCaptioner,
)

from .output import finished_folder
from .state_dicts import ConversionError, relative_error, require_cross_attention

_TOLERANCE = 1e-4
_RETRIEVAL = ("num_retrieved_captions", "retrieval_diversity", "retrieval_score_threshold", "max_prompt_tokens")
_MEL_SETTINGS = ("sampling_rate", "fft_window_size", "hop_length", "padding", "spectrogram")


class AudioEncoderGraph(nn.Module):
    """Log-mel windows (windows, frames, mels) to states (windows, n, d) and unit queries (windows, P)."""

    def __init__(self, model: RecapForConditionalGeneration) -> None:
        super().__init__()
        self.clap = copy.deepcopy(model.clap)
        self.position_embedding = model.config.audio_position_embedding
        self.states = model.config.encoder_states
        if isinstance(self.clap, RecapClapEncoder):
            # RECAP encodes every window of a fused checkpoint as a short clip, which is its path without fusion. Only
            # that path is exported: the other one depends on the data, which a fixed graph cannot.
            self.clap.config.audio_config.enable_fusion = False
            self.clap.audio_model.audio_encoder.enable_fusion = False
            self.clap.audio_model.audio_encoder.patch_embed.enable_fusion = False

    def forward(self, input_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, embeds = self.clap.encode_windows(input_features.unsqueeze(1), self.position_embedding)
        return (states if self.states == HIDDEN else embedding_states(embeds)[:, None]), embeds


class CrossAttentionGraph(nn.Module):
    """``hidden_states`` (batch, n, d) to a key and a value (batch, heads, n, head size) for every block."""

    def __init__(self, model: RecapForConditionalGeneration) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block.crossattention for block in model.decoder.transformer.h)

    def forward(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        projected = [(layer, layer.c_attn(hidden_states).chunk(2, dim=-1)) for layer in self.layers]
        return [_heads(part, layer.num_heads) for layer, parts in projected for part in parts]


class DecoderGraph(nn.Module):
    """GPT-2's forward with every cache as a plain tensor.

    ``input_ids`` (batch, length), ``attention_mask`` (batch, past + length) and ``encoder_attention_mask`` (batch, n),
    1 for what counts; ``past`` and ``cross``: a key and a value (batch, heads, past or n, head size) per block.
    Returns the logits of the last token (batch, vocabulary) and the grown ``past``.
    """

    def __init__(self, model: RecapForConditionalGeneration) -> None:
        super().__init__()
        self.transformer, self.head = model.decoder.transformer, model.decoder.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        past: list[torch.Tensor],
        cross: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        length, total = input_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, total - length :]
        hidden = self.transformer.wte(input_ids) + self.transformer.wpe(positions)
        place = torch.arange(total, device=input_ids.device)
        causal = place[None] <= place[total - length :, None]
        bias = _bias(causal[None, None] & attention_mask[:, None, None].bool(), hidden.dtype)
        encoder_bias = _bias(encoder_attention_mask[:, None, None].bool(), hidden.dtype)
        present = []
        for index, block in enumerate(self.transformer.h):
            update, cache = _self_attention(block.attn, block.ln_1(hidden), past[2 * index : 2 * index + 2], bias)
            hidden = hidden + update
            present.extend(cache)
            keys, values = cross[2 * index : 2 * index + 2]
            queries = block.crossattention.q_attn(block.ln_cross_attn(hidden))
            hidden = hidden + _attend(block.crossattention, queries, keys, values, encoder_bias)
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return self.head(self.transformer.ln_f(hidden[:, -1])), present


def _heads(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _bias(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Finite: a query that may see nothing (padding) must not become NaN.
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)


def _self_attention(
    layer: nn.Module, hidden: torch.Tensor, past: list[torch.Tensor], bias: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    queries, keys, values = layer.c_attn(hidden).chunk(3, dim=-1)
    pairs = zip(past, (keys, values), strict=True)
    cache = [torch.cat([old, _heads(new, layer.num_heads)], dim=2) for old, new in pairs]
    return _attend(layer, queries, *cache, bias), cache


def _attend(
    layer: nn.Module, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    scores = _heads(queries, layer.num_heads) @ keys.transpose(2, 3) * layer.scaling + bias
    return layer.c_proj((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))


def export_onnx(source: str | Path, out: str | Path, overwrite: bool = False) -> dict[str, object]:
    """Export a RECAP folder; it appears only after the runner agreed with PyTorch on the log-mel, states and logits.

    Args:
        source: folder or Hub id of a RECAP model with its processor.
        out: folder to make; `OnnxCaptioner` runs it.
        overwrite: replace an existing folder.

    Returns:
        Graphs with their sizes in bytes, relative differences of log-mel, embeddings and logits, and what of the
        model's own decoding the runner leaves out: reranking.

    Raises:
        ImportError: onnx and onnxscript are not installed.
        ConversionError: the model asks for a generation or a projection that the runner does not know, has no
            cross-attention, or the graphs do not agree.
    """
    require_exporter()
    model = RecapForConditionalGeneration.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    require_cross_attention(model.config, "the ONNX export")
    processor = RecapProcessor.from_pretrained(source)
    processor.check_model(model)
    if processor.projection_temperature:
        hint = "set projection_temperature to 0 in processor_config.json"
        raise ConversionError(f"the ONNX runner does not project embeddings onto captions: {hint}")
    settings = _settings(model, processor)
    extractor = processor.feature_extractor
    mel_shape = extractor(np.zeros(1), sampling_rate=extractor.sampling_rate)["input_features"].shape[2:]
    with finished_folder(out, overwrite) as folder:
        _export_graphs(model, folder, mel_shape)
        _export_companions(processor, settings, folder)
        differences = _compare(model, processor, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx*"))}
    own = {name: getattr(model.generation_config, name, None) for name in ("rerank", "rerank_weight")}
    left_out = {name: value for name, value in own.items() if value}
    return {"files": sizes, "differences": differences, "left_out": left_out}


def require_exporter() -> None:
    """Raise an `ImportError` that names the extra where the exporter's packages are missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {missing[0]}: pip install 'recap-hf[onnx]'")


def _settings(model: RecapForConditionalGeneration, processor: RecapProcessor) -> dict[str, object]:
    generation = model.generation_config
    known = {"num_beams": generation.num_beams or 1, "max_new_tokens": generation.max_new_tokens}
    known["length_penalty"] = 1.0 if generation.length_penalty is None else generation.length_penalty
    known["early_stopping"] = bool(generation.early_stopping)
    known["no_repeat_token_groups"] = getattr(generation, "no_repeat_token_groups", None)
    unknown = {
        name: value
        for name, neutral in _NEUTRAL_GENERATION.items()
        if (value := getattr(generation, name, None)) not in (None, neutral)
    }
    if unknown or generation.early_stopping == "never":
        raise ConversionError(f"the ONNX runner has greedy and beam search; the generation config asks for {unknown}")
    extractor, config = processor.feature_extractor, model.config
    return {
        "format_version": FORMAT_VERSION,
        "generation": {**known, "eos_token_id": config.eos_token_id},
        "prompt": asdict(processor.prompt),
        **{name: getattr(processor, name) for name in _RETRIEVAL},
        "special_token_ids": sorted(processor.tokenizer.all_special_ids),
        "mel": {
            "window_samples": int(extractor.nb_max_samples),
            **{name: getattr(extractor, name) for name in _MEL_SETTINGS},
        },
        "num_layers": config.decoder.n_layer,
        "num_heads": config.decoder.n_head,
        "head_size": config.decoder.n_embd // config.decoder.n_head,
        "fingerprint": model.embed_fingerprint(processor).round(7).tolist(),
    }


_NEUTRAL_GENERATION = {
    "do_sample": False,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
}


def _export_graphs(model: RecapForConditionalGeneration, folder: Path, mel_shape: tuple[int, int]) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    config = model.config.decoder
    layers, heads = config.n_layer, config.n_head
    sizes = {"past": config.n_embd // heads, "cross": model.config.cross_attention_width // heads}
    # Sizes in the examples differ from each other and from 1, so that no dimension is mistaken for a constant.
    batch, past_length, length, positions = 2, 5, 3, 7
    pairs = [f"{index}.{kind}" for index in range(layers) for kind in ("key", "value")]
    cache = [torch.zeros(batch, heads, past_length, sizes["past"]) for _ in pairs]
    cross = [torch.zeros(batch, heads, positions, sizes["cross"]) for _ in pairs]
    caches = [{0: dynamic, 2: dynamic} for _ in pairs]
    _export(
        AudioEncoderGraph(model),
        (torch.zeros(2, *mel_shape),),
        {"input_features": {0: dynamic}},
        (["input_features"], ["hidden_states", "audio_embeds"]),
        folder / AUDIO_ENCODER,
    )
    _export(
        CrossAttentionGraph(model),
        (torch.zeros(batch, positions, model.config.encoder_hidden_size),),
        {"hidden_states": {0: dynamic, 1: dynamic}},
        (["hidden_states"], [f"cross.{pair}" for pair in pairs]),
        folder / CROSS_ATTENTION,
    )
    ids = torch.zeros(batch, length, dtype=torch.long)
    masks = torch.ones(batch, past_length + length, dtype=torch.long), torch.ones(batch, positions, dtype=torch.long)
    names = ["input_ids", "attention_mask", "encoder_attention_mask"]
    _export(
        DecoderGraph(model),
        (ids, *masks, cache, cross),
        {**{name: {0: dynamic, 1: dynamic} for name in names}, "past": caches, "cross": caches},
        (
            [*names, *(f"past.{pair}" for pair in pairs), *(f"cross.{pair}" for pair in pairs)],
            ["logits", *(f"present.{pair}" for pair in pairs)],
        ),
        folder / DECODER,
    )


def _export(module: nn.Module, args: tuple, shapes: dict, names: tuple[list[str], list[str]], path: Path) -> None:
    options = {"input_names": names[0], "output_names": names[1], "dynamic_shapes": shapes}
    with torch.no_grad():
        torch.onnx.export(module.eval(), args, path, dynamo=True, verbose=False, external_data=True, **options)


def _export_companions(processor: RecapProcessor, settings: dict[str, object], folder: Path) -> None:
    extractor = processor.feature_extractor
    filters = extractor.mel_filters_slaney if extractor.truncation == "rand_trunc" else extractor.mel_filters
    np.save(folder / MEL_FILTERS, np.ascontiguousarray(filters, dtype=np.float64), allow_pickle=False)
    processor.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    if processor.datastore is not None:
        processor.datastore.save_pretrained(folder / DATASTORE_FOLDER)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def _compare(model: RecapForConditionalGeneration, processor: RecapProcessor, folder: Path) -> dict[str, float]:
    """Log-mel, audio tower, prompt and a later token against PyTorch, at other sizes than those of the export."""
    generator = torch.Generator().manual_seed(0)
    rate = processor.feature_extractor.sampling_rate
    length = int(processor.feature_extractor.nb_max_samples)
    clip = 0.1 * torch.randn(int(1.4 * length), generator=generator)
    # Silence, whose states may be masked.
    clip[int(0.9 * length) :] = 0.0
    features = processor.feature_extractor([clip.numpy()], sampling_rate=rate, return_tensors="pt")
    mel = features["input_features"][0]
    ids = torch.randint(0, model.config.decoder.vocab_size, (1, 12), generator=generator)
    captioner = OnnxCaptioner(folder)
    encoding = model.encode_audio(mel[None])
    hidden, embeds = captioner.encode(mel.numpy())
    cross, mask = captioner.cross_caches(hidden), captioner.states_mask(hidden)
    prompt, past = captioner.step(ids[:, :11].numpy(), captioner.empty_caches(1), cross, mask)
    later, _ = captioner.step(ids[:, 11:].numpy(), past, cross, mask)
    logits = model(encoder_outputs=encoding, decoder_input_ids=ids).logits[0]
    pairs = {
        "log-mel": (captioner.log_mel(clip.numpy()), mel),
        "hidden states": (hidden, encoding.last_hidden_state),
        "audio embeddings": (embeds, encoding.audio_embeds[0]),
        "logits of the prompt": (prompt[0], logits[10]),
        "logits of a later token": (later[0], logits[11]),
    }
    differences = {name: relative_error(torch.from_numpy(ours), theirs) for name, (ours, theirs) in pairs.items()}
    if worse := {name: value for name, value in differences.items() if not value <= _TOLERANCE}:
        raise ConversionError(f"the ONNX graphs compute something else than the model (relative differences): {worse}")
    return differences
