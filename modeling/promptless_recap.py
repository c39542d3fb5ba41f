"""Decoding that also listens without its prompt: two distributions of the next word, mixed.

With a prompt the decoder reads and listens, without one it can only listen; where one errs the other often does not.
`promptless_weight` is the share of each next token's probability that comes from the same model, after the same
words, without the retrieved captions: interpolation, as in kNN-LM (Khandelwal et al., ICLR 2020), of what was
retrieved and what was not. It is no part of the paper, and off unless asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LogitsProcessor

from .decoding_recap import SharedPromptCache, decode_token, decode_with_shared_prompt
from .outputs_recap import position_ids_of


def promptless_options(processor: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Generation parameters with the prompt without captions beside a `promptless_weight`, where one is given."""
    if not options.get("promptless_weight") or options.get("promptless_input_ids") is not None:
        return options
    return {**options, "promptless_input_ids": processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0]}


def promptless_part(options: dict[str, Any]) -> dict[str, Any]:
    """What of the generation parameters `score_captions` takes, too."""
    return {name: options[name] for name in ("promptless_weight", "promptless_input_ids") if name in options}


class PromptlessMixture(LogitsProcessor):
    """Mixes the next token's distribution with that of the model without retrieved captions.

    transformers' own search calls it as a logits processor, which reads the caption again at each step; the search of
    `search_recap` knows it and keeps a [`PromptlessStream`].

    Args:
        weight (`float`), input_ids (`torch.LongTensor` of shape `(length,)`): share of the distribution without
            captions and its prompt, as [`check_promptless`] wants them.
        model ([`RecapForConditionalGeneration`]), states (`torch.Tensor`), mask (`torch.Tensor`, *optional*): of this
            call; the encoder's, a row per clip.
        prompt_length (`int`): tokens of the prompts with captions, padding included.
    """

    def __init__(
        self,
        weight: float,
        input_ids: Any,
        model: Any,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        prompt_length: int,
    ) -> None:
        self.weight, self.model, self.prompt_length = weight, model, prompt_length
        self.states, self.mask = states, mask
        self.input_ids = torch.as_tensor(input_ids, device=states.device)

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = len(input_ids) // len(self.states)
        mask = None if self.mask is None else self.mask.repeat_interleave(rows, dim=0)
        said = input_ids[:, self.prompt_length :]
        logits = self.model(
            encoder_outputs=(self.states.repeat_interleave(rows, dim=0),),
            attention_mask=mask,
            decoder_input_ids=torch.cat([self.input_ids.expand(len(said), -1), said], dim=1),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        return mix_log_probs(scores, logits, self.weight)


class PromptlessStream:
    """The second distribution step by step, beside a search: its own cache, the same beams.

    Args:
        decoder (`GPT2LMHeadModel`), mixture ([`PromptlessMixture`]), encoder_hidden_states, encoder_attention_mask:
            as for [`decode_with_shared_prompt`], a row per beam.
        num_clips (`int`): clips in the batch.
    """

    def __init__(
        self,
        decoder: Any,
        mixture: PromptlessMixture,
        num_clips: int,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
    ) -> None:
        self.decoder, self.weight = decoder, mixture.weight
        self.cache = SharedPromptCache(num_clips)
        ids = mixture.input_ids.expand(len(encoder_hidden_states), -1)
        mask = torch.ones_like(ids)
        positions = position_ids_of(mask)
        self.positions = positions[:, -1]
        self.logits = decode_with_shared_prompt(
            decoder, self.cache, ids, mask, positions, encoder_hidden_states, encoder_attention_mask
        )[:, -1]

    def mixed_with(self, logits: torch.Tensor) -> torch.Tensor:
        """The prompted logits `(rows, vocab_size)` -> log-probabilities of the mixture."""
        return mix_log_probs(logits, self.logits, self.weight)

    def follow(self, beams: torch.LongTensor, stay: torch.LongTensor | None, tokens: torch.LongTensor) -> None:
        """Goes one step with the search.

        Args:
            beams (`torch.LongTensor` of shape `(num_clips, beams)`): which beam each goes on from.
            stay (`torch.LongTensor`, *optional*): the clips that stay in the batch, where not all do.
            tokens (`torch.LongTensor` of shape `(rows,)`): what each beam of these says.
        """
        self.cache.reorder_beams(beams)
        if stay is not None:
            self.cache.keep_clips(stay)
            self.positions = self.positions.view(-1, self.cache.group_size)[stay].flatten()
        self.positions = self.positions + 1
        self.logits = decode_token(self.decoder, self.cache, tokens, self.positions)


def mix_log_probs(prompted: torch.Tensor, promptless: torch.Tensor, weight: float) -> torch.Tensor:
    """`log((1 - weight) p + weight q)` of logits or log-probabilities `(..., vocab_size)`.

    What is impossible with the prompt (`-inf`, by another processor) stays so.
    """
    first, second = prompted.float().log_softmax(dim=-1), promptless.float().log_softmax(dim=-1)
    mixed = torch.logaddexp(first + math.log1p(-weight), second + math.log(weight))
    return mixed.masked_fill(prompted == -torch.inf, -torch.inf)


def check_promptless(weight: Any, input_ids: Any) -> None:
    """Refuses a weight outside 0 to below 1, and one above 0 without its prompt.

    Raises:
        `ValueError`: saying which, and what to do.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 <= weight < 1.0:
        raise ValueError(
            f"`promptless_weight` must be a number of at least 0 and below 1, got {weight!r}; for captions without "
            "any prompt give prompts without captions (`build_prompts(retrieved=[[]])`)."
        )
    if weight and input_ids is None:
        raise ValueError(
            "`promptless_weight` needs the prompt without captions: pass `processor=processor`, or "
            '`promptless_input_ids=processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0]`.'
        )


__all__ = [
    "PromptlessMixture",
    "PromptlessStream",
    "check_promptless",
    "mix_log_probs",
    "promptless_options",
    "promptless_part",
]
