"""Greedy and beam search in which finished clips leave the batch and captions are scored on the way.

transformers' own search gives the same sequences; it keeps every clip in the batch until the last one has finished,
copies whole sequences at every step, and forgets the log-probabilities. [`fast_generate`] takes over greedy and beam
search on an unchanged decoder and leaves everything else to transformers.
"""

from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GPT2LMHeadModel,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model
from transformers.pytorch_utils import Conv1D

from recap_hf.fast_generation.cpu_weights import Int8Linear, PackedLinear
from recap_hf.fast_generation.shared_prompt import SharedPromptCache, decode_prompt, decode_token
from recap_hf.modeling.generation_recap import AfterPrompt, complete_config

# The score of what is not there; transformers adds and compares the same number.
_NEVER = -1e9
# Clips leave together when a quarter of the batch has finished: moving keys and values costs a step's time.
_LEAVE_FROM = 0.25
# Settings that the search here understands, or that say nothing where nothing is sampled or assisted.
_UNDERSTOOD = frozenset(
    (
        *("num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("rerank", "candidates", "rerank_weight", "copy_margin", "no_repeat_token_groups"),
        *("temperature", "top_k", "top_p", "min_p", "top_h", "transformers_version"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    )
)
# Values of other settings that change nothing. Anything else is left to transformers.
_NEUTRAL = {"use_cache": True, "num_beam_groups": 1}
_NEUTRAL |= dict.fromkeys(("typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1.0)
# Arguments of `generate` that are tensors of the model, and no settings.
_INPUTS = frozenset(("encoder_outputs", "attention_mask", "decoder_input_ids", "decoder_attention_mask"))
_LAYERS = (Conv1D, torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, torch.nn.Dropout, PackedLinear, Int8Linear)
# What `generate` makes of settings that the search here understands.
_OWN_PROCESSORS = (AfterPrompt, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
_OWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)


class _Search:
    """The state of a search: what runs, what has finished, and which clips are still in the batch. The defaults of
    `config` are filled in, `prompt_length` includes padding, and `penalties` are of captions without prompts."""

    def __init__(
        self, config: GenerationConfig, prompt_length: int, num_clips: int, device: torch.device, penalties: list[Any]
    ) -> None:
        eos = () if config.eos_token_id is None else config.eos_token_id
        eos = (eos,) if isinstance(eos, int) else tuple(eos)
        beams, fill = config.num_beams or 1, config.pad_token_id
        if beams > 1:
            # As the beam search of transformers, for which pad token 0 is none.
            fill = (fill or eos[0]) if eos else None
        self.num_beams, self.num_return_sequences = beams, config.num_return_sequences or 1
        # Greedy search is a search of one beam that stops at its first end.
        self.length_penalty = 0.0 if beams == 1 else config.length_penalty
        self.early_stopping = True if beams == 1 else config.early_stopping
        self.max_new_tokens = tokens = config.max_length - prompt_length
        # The end tokens are forbidden before.
        self.min_new_tokens = max(config.min_new_tokens or 0, (config.min_length or 0) - prompt_length)
        self.length = 0
        # Rows of everything but `result_*`: the clips that are still in the batch.
        self.clips = torch.arange(num_clips, device=device)
        self.running = torch.full((num_clips, beams, tokens), -1 if fill is None else fill, device=device)
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
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.num_candidates = max(2, 1 + len(eos)) * beams
        self.is_top = torch.arange(self.num_candidates, device=device) < beams
        self.penalties = penalties

    def advance(self, logits: torch.Tensor) -> torch.Tensor:
        """Takes the logits `(rows, vocab_size)`, returns for each running beam the one that it goes on from."""
        log_probs = logits.float().log_softmax(dim=-1)
        if self.length < self.min_new_tokens:
            log_probs[:, self.eos] = -torch.inf
        for penalty in self.penalties:
            log_probs = penalty(self.running[:, :, : self.length].flatten(0, 1), log_probs)
        vocab_size = log_probs.shape[1]
        log_probs = log_probs.view(-1, self.num_beams, vocab_size) + self.running_scores[:, :, None]
        scores, chosen = log_probs.flatten(1).topk(self.num_candidates)
        beams, tokens = chosen // vocab_size, chosen % vocab_size
        candidates = _rows(self.running, beams)
        candidates[:, :, self.length] = tokens
        self.length += 1
        ends = torch.isin(tokens, self.eos)
        if self.length == self.max_new_tokens:
            ends = torch.ones_like(ends)
        self._finish(candidates, scores, ends)
        self.running_scores, order = (scores + ends * _NEVER).topk(self.num_beams)
        self.running = _rows(candidates, order)
        self._see_what_can_improve()
        return beams.gather(1, order)

    def _finish(self, candidates: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> None:
        counts = ends & self.is_top
        scores = scores / self.length**self.length_penalty + ~counts * _NEVER + ~self.can_improve * _NEVER
        if self.early_stopping is True:
            scores = scores + self.is_finished.all(dim=1, keepdim=True) * _NEVER
        lengths = torch.full_like(counts, self.length, dtype=torch.long)
        self.finished_scores, best = torch.cat([self.finished_scores, scores], dim=1).topk(self.num_beams)
        self.finished = _rows(torch.cat([self.finished, candidates], dim=1), best)
        self.finished_lengths = torch.cat([self.finished_lengths, lengths], dim=1).gather(1, best)
        self.is_finished = torch.cat([self.is_finished, counts], dim=1).gather(1, best)

    def _see_what_can_improve(self) -> None:
        longest = self.early_stopping == "never" and self.length_penalty > 0.0
        length = self.max_new_tokens if longest else self.length
        possible = self.running_scores[:, :1] / length**self.length_penalty
        worst = self.finished_scores.min(dim=1, keepdim=True)[0]
        worst = torch.where(self.is_finished, worst, _NEVER)
        self.can_improve = self.can_improve & (possible > worst).any(dim=1, keepdim=True)

    def leave(self) -> torch.Tensor | None:
        """Lets finished clips go if they are many: the rows of those that stay, or `None` where all do."""
        done = ~self.can_improve[:, 0]
        if self.early_stopping is True:
            done = done | self.is_finished.all(dim=1)
        if self.length == self.max_new_tokens:
            done = torch.ones_like(done)
        num_done = int(done.sum())
        if num_done < max(1, _LEAVE_FROM * len(done)):
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
        kept = slice(0, self.num_return_sequences)
        lengths = self.result_lengths[:, kept].flatten()
        tokens = self.result_tokens[:, kept].flatten(0, 1)[:, : int(lengths.max())]
        totals = self.result_scores[:, kept].flatten() * lengths.float() ** self.length_penalty
        return tokens, totals / lengths


def _rows(of: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, beams, tokens), (B, chosen) -> (B, chosen, tokens)."""
    return of.take_along_dim(index[:, :, None], dim=1)


class SharedPromptSearch:
    """A search for `generate(custom_generate=SharedPromptSearch())`: greedy and beam search with the prompt of a clip
    computed once.

    Attributes:
        sequence_scores (`list[float]`): after a call, for each sequence the exponential of the mean log-probability
            of its tokens.
    """

    def __init__(self) -> None:
        self.sequence_scores: list[float] = []

    def __call__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.LongTensor:
        """Called by `generate`, a row for each beam. Returns prompts and captions, `(sequences, length)`."""
        reason = why_not(model, generation_config)
        if reason is not None:
            raise ValueError(f"SharedPromptSearch cannot generate here: {reason}. Leave `custom_generate` out.")
        _check_arguments(logits_processor, stopping_criteria)
        beams, sequences = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
        cache = SharedPromptCache(len(input_ids) // max(beams, sequences))
        positions = model_kwargs["decoder_position_ids"]
        decoder = model.decoder
        states = model_kwargs["encoder_outputs"].last_hidden_state.to(decoder.dtype)
        masks = model_kwargs["decoder_attention_mask"], model_kwargs.get("attention_mask")
        logits = decode_prompt(decoder, cache, input_ids, masks[0], positions, states, masks[1])
        penalties = [entry.processor for entry in logits_processor if isinstance(entry, AfterPrompt)]
        state = _Search(generation_config, input_ids.shape[1], cache.num_clips, input_ids.device, penalties)
        prompts, positions = input_ids[::beams], positions[:, -1]
        while True:
            cache.reorder_beams(state.advance(logits))
            stay = state.leave()
            if stay is not None:
                if not len(stay):
                    break
                cache.keep_clips(stay)
                positions = positions.view(-1, state.num_beams)[stay].flatten()
            positions = positions + 1
            logits = decode_token(decoder, cache, state.running[:, :, state.length - 1].flatten(), positions)
        tokens, log_probs = state.results()
        self.sequence_scores = log_probs.exp().tolist()
        return torch.cat([prompts.repeat_interleave(sequences, dim=0), tokens], dim=1)


def _check_arguments(logits_processor: Any, stopping_criteria: Any) -> None:
    """Raises `ValueError` for what a caller of `generate` asks for and the search here does not do."""
    other = [one for one in logits_processor if not isinstance(one, _OWN_PROCESSORS)]
    other += [one for one in stopping_criteria if not isinstance(one, _OWN_CRITERIA)]
    if other:
        raise ValueError(f"SharedPromptSearch does not know the {type(other[0]).__name__}. Leave one of the two out.")


def why_not(model: Any, config: GenerationConfig) -> str | None:
    """Why transformers has to generate, or `None` where [`SharedPromptSearch`] gives the same."""
    if config.use_cache is False:
        return "`use_cache` is False"
    for name, value in vars(config).items():
        understood = name in _UNDERSTOOD or name.startswith("_") or _NEUTRAL.get(name) == value
        # An unset or zero setting asks for nothing; the length penalty and the like are understood.
        if not understood and value is not None and bool(value):
            return f"`{name}` is {value!r}"
    if (config.num_return_sequences or 1) > (config.num_beams or 1):
        return "more sequences are asked for than there are beams"
    if config.num_beams == 1 and config.eos_token_id is not None and config.pad_token_id is None:
        return "there is no `pad_token_id`"
    decoder = model.config.decoder
    if not decoder.add_cross_attention:
        return "the model has no cross-attention"
    if decoder.reorder_and_upcast_attn or getattr(decoder, "output_attentions", False):
        return "the decoder's attention is set to be computed in another way"
    if model.training or getattr(model, "hf_device_map", None):
        return "the model is in training mode or spread over devices"
    return _changed_layer(model)


def _changed_layer(model: Any) -> str | None:
    """A module of the decoder that does not compute what GPT-2's own does: another class (an adapter), or a hook."""
    stock = (GPT2LMHeadModel, GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, model.cross_attention_class, *_LAYERS)
    for name, module in model.decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            continue
        kind = type(module)
        is_activation = name.endswith(".mlp.act")
        if kind not in stock and not is_activation:
            return f"decoder.{name} is a {kind.__name__}"
        # accelerate and others replace `forward` of the instance.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"decoder.{name} has a hook"
    return None


@torch.no_grad()
def fast_generate(model: Any, **arguments: Any) -> tuple[torch.LongTensor, list[float]] | None:
    """`model.generate(**arguments)` through [`SharedPromptSearch`], or `None` where transformers has to generate.

    Args:
        model ([`RecapForConditionalGeneration`]): the captioner's model.
        arguments: of `generate`.

    Returns:
        `tuple`: the sequences that `generate` returns, and the score of each as of `score_captions`.
    """
    settings = {name: value for name, value in arguments.items() if name not in _INPUTS}
    given = settings.pop("generation_config", None)
    config = complete_config(given, model.generation_config)
    for name, value in settings.items():
        # Whatever is no setting (a cache, processors, a streamer, an assistant) is left to transformers.
        if not hasattr(config, name) and value is not None:
            return None
        setattr(config, name, value)
    if why_not(model, config) is not None:
        return None
    search = SharedPromptSearch()
    sequences = model.generate(custom_generate=search, **arguments)
    return sequences, search.sequence_scores
