"""Best of n: of several captions for a recording the one that CLAP finds nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .outputs_recap import RecapEncoderOutput

RERANKERS = ("clap",)


@dataclass(frozen=True)
class Reranked:
    """The chosen caption of one recording.

    Args:
        caption (`str`), similarity (`float`): of the chosen one.
        row (`int`): which sequence of the recording's candidates it was.
        candidates (`list[dict]`): `caption` and `similarity` of every different candidate, best first.
    """

    caption: str
    similarity: float
    row: int
    candidates: list[dict[str, Any]]


def caption_similarities(
    model: Any, processor: Any, captions: Sequence[str], audio_embeds: torch.Tensor
) -> np.ndarray:
    """How near captions are to their recordings by the model's own CLAP.

    Args:
        captions (`Sequence[str]`): one per recording.
        audio_embeds (`torch.Tensor` of shape `(len(captions), windows, dimension)`): from `encode_audio`.

    Returns:
        `np.ndarray` of shape `(len(captions),)`: cosines between -1 and 1, the mean over a recording's windows.
    """
    if not len(captions):
        return np.empty(0, dtype=np.float32)
    # Beams of a clip often differ in nothing but their end: each text is embedded once.
    unique = sorted(set(captions))
    rows = dict(zip(unique, model.embed_captions(unique, processor), strict=True))
    texts = np.stack([rows[caption] for caption in captions])
    audio = audio_embeds.float().cpu().numpy()
    present = np.abs(audio).sum(axis=-1) > 0
    cosines = np.einsum("bwd,bd->bw", audio, texts)
    return (cosines * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)


def reranking_parameters(rerank: str | None, candidates: int | None) -> dict[str, Any]:
    """The two parameters of the pipeline that were given, checked.

    Raises:
        `ValueError`: on another reranker, or `candidates` less than 1.
    """
    if rerank is not None and rerank not in RERANKERS:
        raise ValueError(f"`rerank` must be one of {', '.join(RERANKERS)}, got {rerank!r}.")
    if candidates is not None and (not isinstance(candidates, int) or candidates < 1):
        raise ValueError(f"`candidates` must be a whole number of at least 1, got {candidates!r}.")
    given = {"rerank": rerank, "candidates": candidates}
    return {name: value for name, value in given.items() if value is not None}


def candidate_options(num_candidates: int, generate_kwargs: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Generation parameters that give so many captions a recording: beams, or samples with `do_sample=True`.

    Args:
        num_candidates (`int`): at least 1.
        generate_kwargs (`Mapping`): the caller's own parameters, which stay.
        config (`GenerationConfig`): the model's.
    """
    options = {**generate_kwargs, "num_return_sequences": num_candidates}
    if options.get("do_sample", config.do_sample):
        options.setdefault("num_beams", 1)
    else:
        options["num_beams"] = max(options.get("num_beams") or config.num_beams, num_candidates)
    return options


@torch.no_grad()
def generate_reranked(
    model: Any,
    processor: Any,
    encoding: RecapEncoderOutput,
    prompts: Mapping[str, torch.Tensor],
    num_candidates: int | None = None,
    **generate_kwargs: Any,
) -> tuple[torch.LongTensor, list[Reranked]]:
    """Generates several captions for each recording and chooses the one nearest to it.

    Args:
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the captioner.
        encoding ([`RecapEncoderOutput`]), prompts (`Mapping`): of a batch of recordings.
        num_candidates (`int`, *optional*): captions to choose from; default as many as the search has beams.
        generate_kwargs: for `generate`; `do_sample=True` makes samples of the candidates instead of beams.

    Returns:
        `tuple`: the chosen sequences, `(batch_size, length)`, and a [`Reranked`] for each recording. Of equally near
        captions the first, more probable one is chosen.
    """
    if num_candidates is None:
        num_candidates = generate_kwargs.get("num_beams") or model.generation_config.num_beams
    options = candidate_options(num_candidates, generate_kwargs, model.generation_config)
    generated = model.generate(encoder_outputs=encoding, **prompts, **options)
    sequences = getattr(generated, "sequences", generated)
    captions = processor.batch_decode(sequences)
    embeds = encoding.audio_embeds.repeat_interleave(num_candidates, dim=0)
    similarities = caption_similarities(model, processor, captions, embeds)
    chosen = [
        _choose(captions[start : start + num_candidates], similarities[start : start + num_candidates])
        for start in range(0, len(captions), num_candidates)
    ]
    rows = [index * num_candidates + entry.row for index, entry in enumerate(chosen)]
    return sequences[rows], chosen


def _choose(captions: Sequence[str], similarities: np.ndarray) -> Reranked:
    order = sorted(range(len(captions)), key=lambda row: (-similarities[row], row))
    seen: dict[str, float] = {}
    for row in order:
        seen.setdefault(captions[row], round(float(similarities[row]), 6))
    best = order[0]
    candidates = [{"caption": caption, "similarity": similarity} for caption, similarity in seen.items()]
    return Reranked(captions[best], float(similarities[best]), best, candidates)


__all__ = [
    "RERANKERS",
    "Reranked",
    "candidate_options",
    "caption_similarities",
    "generate_reranked",
    "reranking_parameters",
]
