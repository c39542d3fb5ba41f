"""Best of n: of several captions for a recording the one that CLAP finds nearest to it, or likes as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .outputs_recap import RecapEncoderOutput
from .readings_recap import NO_READINGS, reading_options

RERANKERS = ("clap",)
# What turns off the reranking of a checkpoint that has it in its generation configuration.
NO_RERANKING = "none"
CHOICE_OPTIONS = ("rerank", "candidates", "rerank_weight")
# For who does not hear the recording, and so has no opinion on how near a caption is to it.
NOT_RERANKED = dict.fromkeys(CHOICE_OPTIONS) | {"rerank": NO_RERANKING}


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


def reranking_parameters(
    rerank: str | None, candidates: int | None, rerank_weight: float | None = None
) -> dict[str, Any]:
    """The parameters of the pipeline that were given, checked.

    Raises:
        `ValueError`: on another reranker, `candidates` less than 1, or a `rerank_weight` below 0.
    """
    if rerank is not None and rerank not in (*RERANKERS, NO_RERANKING):
        raise ValueError(f"`rerank` must be one of {', '.join((*RERANKERS, NO_RERANKING))}, got {rerank!r}.")
    if candidates is not None and (not isinstance(candidates, int) or candidates < 1):
        raise ValueError(f"`candidates` must be a whole number of at least 1, got {candidates!r}.")
    if rerank_weight is not None and (not isinstance(rerank_weight, (int, float)) or not rerank_weight >= 0):
        raise ValueError(f"`rerank_weight` must be a number of at least 0, got {rerank_weight!r}.")
    given = {"rerank": rerank, "candidates": candidates, "rerank_weight": rerank_weight}
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


@dataclass(frozen=True)
class Choice:
    """How one caption is chosen among several.

    Args:
        rerank (`str`, *optional*): `"clap"`, or `None` for the search's own best.
        candidates (`int`, *optional*): captions to choose from; default as many as the search has beams.
        weight (`float`, *optional*): what CLAP's cosine counts beside the search's score of a caption, its
            log-probability over `length ** length_penalty`; default: the cosine alone decides.
    """

    rerank: str | None = None
    candidates: int | None = None
    weight: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], config: Any) -> Choice:
        """What is given (`rerank="none"` for no reranking), and where it is `None` what the `GenerationConfig` says.

        Args:
            given (`Mapping`): `rerank`, `candidates`, `rerank_weight`.
            config (`GenerationConfig`): the model's.

        Raises:
            `ValueError`: as [`reranking_parameters`], and on `candidates` or a `rerank_weight` without reranking.
        """
        rerank, candidates, weight = (
            getattr(config, name, None) if given.get(name) is None else given[name] for name in CHOICE_OPTIONS
        )
        reranking_parameters(rerank, candidates, weight)
        if rerank not in (None, NO_RERANKING):
            return cls(rerank, candidates, weight)
        if given.get("candidates") is not None or given.get("rerank_weight") is not None:
            raise ValueError(
                "`candidates` and `rerank_weight` say how captions are reranked, and none are: pass "
                '`rerank="clap"`, or leave them away.'
            )
        return cls()

    def values(self, scores: np.ndarray, similarities: np.ndarray) -> np.ndarray:
        """What captions are ranked by, of the search's scores and of CLAP's cosines."""
        if self.weight is None or np.isinf(self.weight):
            return similarities
        return scores + self.weight * similarities


@torch.no_grad()
def generate_captions(
    model: Any,
    processor: Any,
    encoding: RecapEncoderOutput,
    prompts: Mapping[str, torch.Tensor],
    retrieved: Sequence[Sequence[Any]],
    *,
    rerank: str | None = None,
    candidates: int | None = None,
    rerank_weight: float | None = None,
    **generate_kwargs: Any,
) -> tuple[torch.LongTensor, list[float], list[Reranked] | None]:
    """A caption for each recording, decoded and chosen.

    Args:
        model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the captioner.
        encoding ([`RecapEncoderOutput`]), prompts (`Mapping`): of a batch of recordings.
        retrieved (`Sequence[Sequence]`): the captions of the prompts. Where there are none there is nothing to read
            apart from what is heard, and no other reading.
        rerank, candidates, rerank_weight (*optional*): see [`Choice`]; default: the generation configuration's, and
            with `do_sample=True` the sample that was drawn.
        generate_kwargs: for `generate`; `do_sample=True` makes samples of the candidates instead of beams.

    Returns:
        `tuple`: the chosen sequences, `(batch_size, length)`, their scores as of `score_captions`, and a [`Reranked`]
        for each recording, `None` without reranking. Of equally good captions the first, more probable one is chosen.
    """
    config = generate_kwargs.get("generation_config") or model.generation_config
    if not any(retrieved):
        generate_kwargs |= NO_READINGS
    if rerank is None and generate_kwargs.get("do_sample"):
        rerank = NO_RERANKING
    choice = Choice.of(dict(zip(CHOICE_OPTIONS, (rerank, candidates, rerank_weight), strict=True)), config)
    options = reading_options(processor, generate_kwargs, config)
    if choice.rerank is None:
        return (*model.generate_with_scores(encoding, prompts, **options), None)
    count = choice.candidates or options.get("num_beams") or config.num_beams or 1
    options = candidate_options(count, options, config)
    sequences, scores = model.generate_candidates(encoding, prompts, count, **options)
    captions = processor.batch_decode(sequences)
    embeds = encoding.audio_embeds.repeat_interleave(count, dim=0)
    similarities = caption_similarities(model, processor, captions, embeds)
    targets = sequences[:, prompts["decoder_input_ids"].shape[1] :]
    penalty = options.get("length_penalty")
    penalty = config.length_penalty if penalty is None else penalty
    values = choice.values(search_scores(scores, targets, model.config.eos_token_id, penalty), similarities)
    chosen = [
        _choose(*(part[start : start + count] for part in (captions, similarities, values)))
        for start in range(0, len(captions), count)
    ]
    rows = [index * count + entry.row for index, entry in enumerate(chosen)]
    return sequences[rows], [scores[row] for row in rows], chosen


def search_scores(
    scores: Sequence[float], targets: torch.LongTensor, eos_token_id: int, length_penalty: float
) -> np.ndarray:
    """What a beam search ranks captions by: the log-probability over `length ** length_penalty`.

    Args:
        scores (`Sequence[float]`): exponentials of the mean log-probabilities.
        targets (`torch.LongTensor` of shape `(len(scores), length)`): the captions' tokens, the end token counted.
        eos_token_id (`int`): where a caption ends.
        length_penalty (`float`): as in `GenerationConfig`.
    """
    ends = (targets == eos_token_id).int()
    lengths = (ends.cumsum(dim=1) - ends == 0).sum(dim=1).cpu().numpy()
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(scores)) * lengths ** (1.0 - length_penalty)


def _choose(captions: Sequence[str], similarities: np.ndarray, values: np.ndarray) -> Reranked:
    order = sorted(range(len(captions)), key=lambda row: (-values[row], row))
    seen: dict[str, float] = {}
    for row in order:
        seen.setdefault(captions[row], round(float(similarities[row]), 6))
    best = order[0]
    candidates = [{"caption": caption, "similarity": similarity} for caption, similarity in seen.items()]
    return Reranked(captions[best], float(similarities[best]), best, candidates)


__all__ = [
    "CHOICE_OPTIONS",
    "NOT_RERANKED",
    "NO_RERANKING",
    "RERANKERS",
    "Choice",
    "Reranked",
    "candidate_options",
    "caption_similarities",
    "generate_captions",
    "reranking_parameters",
    "search_scores",
]
