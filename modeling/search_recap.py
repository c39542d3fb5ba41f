"""Greedy and beam search in which finished clips leave the batch and no pass is made for the captions' scores.

transformers' own search gives the same sequences; it carries every clip along until the last one has finished, copies
whole sequences about at every step, and forgets the log-probabilities. What it can do beyond the plain search
(sampling, penalties, constraints, streaming, returned scores and logits) stays with it: [`SearchPlan.of`] takes over
only what it understands completely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

from .decoding_recap import SharedPromptCache, decode_token, decode_with_shared_prompt
from .fixed_decoding_recap import FixedDecoding
from .readings_recap import ReadingsMixture

# The score of what is not there; transformers adds and compares the same number.
_NEVER = -1e9
# Clips leave together when a quarter of the batch has finished: moving keys and values costs a step's time.
_LEAVE_FROM = 0.25
_PLAIN_PROCESSORS = (MinNewTokensLengthLogitsProcessor, MinLengthLogitsProcessor, ReadingsMixture)
_PLAIN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


@dataclass(frozen=True)
class SearchPlan:
    """A plain greedy or beam search.

    Args:
        num_beams, num_return_sequences, length_penalty, early_stopping: as in `GenerationConfig`.
        prompt_length (`int`): tokens of the prompts, padding included.
        max_new_tokens, min_new_tokens (`int`): the end tokens are forbidden before `min_new_tokens`.
        eos_token_ids (`tuple[int, ...]`): may be empty.
        fill_token_id (`int`): stands behind a finished sequence.
        mixture ([`ReadingsMixture`], *optional*): mixes the distributions of each step.
    """

    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    prompt_length: int
    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: tuple[int, ...]
    fill_token_id: int
    mixture: ReadingsMixture | None = None

    @classmethod
    def of(
        cls,
        config: GenerationConfig,
        prompt_length: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        synced_gpus: bool,
        streamer: Any = None,
    ) -> SearchPlan | None:
        """The plan of a call of `generate` with all its defaults filled in, or `None` where it asks for more."""
        asks_for_more = (
            config.do_sample
            or (config.return_dict_in_generate and (config.output_scores or config.output_logits))
            or getattr(config, "low_memory", None)
            or any(type(processor) not in _PLAIN_PROCESSORS for processor in processors)
            or any(type(criterion) not in _PLAIN_CRITERIA for criterion in criteria)
            or synced_gpus
            or streamer is not None
        )
        if asks_for_more:
            return None
        eos, pad = (getattr(config, f"_{name}_token_tensor", None) for name in ("eos", "pad"))
        eos_token_ids = () if eos is None else tuple(eos.reshape(-1).tolist())
        pad_token_id = None if pad is None else int(pad)
        beams = config.num_beams or 1
        if beams == 1:
            if eos_token_ids and pad_token_id is None:
                return None
            fill = pad_token_id
        else:
            fill = (pad_token_id or eos_token_ids[0]) if eos_token_ids else -1
        mixtures = [one for one in processors if isinstance(one, ReadingsMixture)]
        minimum = max(config.min_new_tokens or 0, (config.min_length or 0) - prompt_length)
        return cls(
            num_beams=beams,
            num_return_sequences=config.num_return_sequences or 1,
            # Greedy search is a search of one beam that stops at its first end.
            length_penalty=0.0 if beams == 1 else config.length_penalty,
            early_stopping=True if beams == 1 else config.early_stopping,
            prompt_length=prompt_length,
            max_new_tokens=config.max_length - prompt_length,
            min_new_tokens=minimum if len(processors) > len(mixtures) else 0,
            eos_token_ids=eos_token_ids,
            fill_token_id=-1 if fill is None else fill,
            mixture=mixtures[0] if mixtures else None,
        )


class _Search:
    """The state of a search: what runs, what has finished, and which clips are still in the batch."""

    def __init__(self, plan: SearchPlan, num_clips: int, device: torch.device) -> None:
        self.plan = plan
        self.length = 0
        beams, tokens = plan.num_beams, plan.max_new_tokens
        # Rows of everything but `result_*`: the clips that are still in the batch.
        self.clips = torch.arange(num_clips, device=device)
        self.running = torch.full((num_clips, beams, tokens), plan.fill_token_id, device=device)
        self.running_scores = torch.zeros(num_clips, beams, device=device)
        # The beams of a clip are equal at first: only one of them counts.
        self.running_scores[:, 1:] = _NEVER
        self.finished = self.running.clone()
        self.finished_scores = torch.full((num_clips, beams), _NEVER, device=device)
        self.finished_lengths = torch.zeros(num_clips, beams, dtype=torch.long, device=device)
        self.is_finished = torch.zeros(num_clips, beams, dtype=torch.bool, device=device)
        self.can_improve = torch.ones(num_clips, 1, dtype=torch.bool, device=device)
        self.result_tokens, self.result_scores = self.finished.clone(), self.finished_scores.clone()
        self.result_lengths = self.finished_lengths.clone()
        self.eos = torch.tensor(plan.eos_token_ids, dtype=torch.long, device=device)
        self.num_candidates = max(2, 1 + len(plan.eos_token_ids)) * beams
        self.is_top = torch.arange(self.num_candidates, device=device) < beams

    def advance(self, logits: torch.Tensor) -> torch.Tensor:
        """Takes the logits `(rows, vocab_size)`, returns for each running beam the one that it goes on from."""
        plan = self.plan
        log_probs = logits.float().log_softmax(dim=-1)
        if self.length < plan.min_new_tokens and plan.eos_token_ids:
            log_probs[:, self.eos] = -torch.inf
        vocab_size = log_probs.shape[1]
        log_probs = log_probs.view(-1, plan.num_beams, vocab_size) + self.running_scores[:, :, None]
        scores, chosen = log_probs.flatten(1).topk(self.num_candidates)
        beams, tokens = chosen // vocab_size, chosen % vocab_size
        candidates = _rows(self.running, beams)
        candidates[:, :, self.length] = tokens
        self.length += 1
        ends = torch.isin(tokens, self.eos) if plan.eos_token_ids else torch.zeros_like(tokens, dtype=torch.bool)
        if self.length == plan.max_new_tokens:
            ends = torch.ones_like(ends)
        self._finish(candidates, scores, ends)
        self.running_scores, order = (scores + ends * _NEVER).topk(plan.num_beams)
        self.running = _rows(candidates, order)
        self._see_what_can_improve()
        return beams.gather(1, order)

    def _finish(self, candidates: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> None:
        plan = self.plan
        counts = ends & self.is_top
        scores = scores / self.length**plan.length_penalty + ~counts * _NEVER + ~self.can_improve * _NEVER
        if plan.early_stopping is True:
            scores = scores + self.is_finished.all(dim=1, keepdim=True) * _NEVER
        lengths = torch.full_like(counts, self.length, dtype=torch.long)
        self.finished_scores, best = torch.cat([self.finished_scores, scores], dim=1).topk(plan.num_beams)
        self.finished = _rows(torch.cat([self.finished, candidates], dim=1), best)
        self.finished_lengths = torch.cat([self.finished_lengths, lengths], dim=1).gather(1, best)
        self.is_finished = torch.cat([self.is_finished, counts], dim=1).gather(1, best)

    def _see_what_can_improve(self) -> None:
        plan = self.plan
        longest = plan.early_stopping == "never" and plan.length_penalty > 0.0
        length = plan.max_new_tokens if longest else self.length
        possible = self.running_scores[:, :1] / length**plan.length_penalty
        worst = self.finished_scores.min(dim=1, keepdim=True)[0]
        worst = torch.where(self.is_finished, worst, _NEVER)
        self.can_improve = self.can_improve & (possible > worst).any(dim=1, keepdim=True)

    def leave(self, together: bool = False) -> torch.Tensor | None:
        """Lets finished clips go if they are many (`together`: if they are all): the rows of those that stay, or
        `None` where all do."""
        done = ~self.can_improve[:, 0]
        if self.plan.early_stopping is True:
            done = done | self.is_finished.all(dim=1)
        if self.length == self.plan.max_new_tokens:
            done = torch.ones_like(done)
        num_done = int(done.sum())
        if num_done < max(1, (1.0 if together else _LEAVE_FROM) * len(done)):
            return None
        self.result_tokens[self.clips[done]] = self.finished[done]
        self.result_scores[self.clips[done]] = self.finished_scores[done]
        self.result_lengths[self.clips[done]] = self.finished_lengths[done]
        stay = torch.nonzero(~done)[:, 0]
        for name in ("clips", "running", "running_scores", "finished", "finished_scores", "finished_lengths"):
            setattr(self, name, getattr(self, name)[stay])
        self.is_finished, self.can_improve = self.is_finished[stay], self.can_improve[stay]
        return stay

    def results(self) -> tuple[torch.LongTensor, torch.Tensor]:
        """Generated tokens `(sequences, length)` and mean log-probabilities `(sequences,)`."""
        kept = slice(0, self.plan.num_return_sequences)
        lengths = self.result_lengths[:, kept].flatten()
        tokens = self.result_tokens[:, kept].flatten(0, 1)[:, : int(lengths.max())]
        totals = self.result_scores[:, kept].flatten() * lengths.float() ** self.plan.length_penalty
        return tokens, totals / lengths


def _rows(of: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, beams, tokens), (B, chosen) -> (B, chosen, tokens)."""
    return of.take_along_dim(index[:, :, None], dim=1)


def search(
    decoder: Any,
    cache: SharedPromptCache,
    plan: SearchPlan,
    input_ids: torch.LongTensor,
    decoder_attention_mask: torch.Tensor,
    position_ids: torch.LongTensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
    fixed: FixedDecoding | None = None,
) -> torch.LongTensor:
    """Searches the captions that continue the prompts.

    Args:
        decoder, cache, input_ids, decoder_attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask:
            See [`decode_with_shared_prompt`]; a row per beam, those of a clip together. The cache comes back with
            `sequence_log_probs`; clips have left it.
        plan ([`SearchPlan`]): what to search.
        fixed ([`FixedDecoding`], *optional*): decodes in its fixed tensors; clips then leave all at once. A mixture's
            second distribution has caches that grow.

    Returns:
        `torch.LongTensor` of shape `(num_clips * num_return_sequences, length)`: prompt and caption.
    """
    logits = decode_with_shared_prompt(
        decoder, cache, input_ids, decoder_attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask
    )[:, -1]
    readings = None
    if plan.mixture is not None:
        heard = encoder_hidden_states, encoder_attention_mask
        readings = plan.mixture.streams(decoder, cache.num_clips, input_ids, decoder_attention_mask, *heard)
    state = _Search(plan, cache.num_clips, input_ids.device)
    prompts, positions = input_ids[:: plan.num_beams], position_ids[:, -1]
    steps = None if fixed is None else fixed.begin(decoder, cache, plan.max_new_tokens)
    while True:
        beams = state.advance(logits if readings is None else readings.mixed_with(logits))
        (steps or cache).reorder_beams(beams)
        stay = state.leave(together=steps is not None)
        if stay is not None:
            if not len(stay):
                break
            cache.keep_clips(stay)
            positions = positions.view(-1, plan.num_beams)[stay].flatten()
        positions = positions + 1
        tokens = state.running[:, :, state.length - 1].flatten()
        logits = decode_token(decoder, cache, tokens, positions) if steps is None else steps(tokens, positions)
        if readings is not None:
            readings.follow(beams, stay, tokens)
    tokens, cache.sequence_log_probs = state.results()
    return torch.cat([prompts.repeat_interleave(plan.num_return_sequences, dim=0), tokens], dim=1)


__all__ = ["SearchPlan", "search"]
