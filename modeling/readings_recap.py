"""Decoding with several readings of a recording: the next word by one decoder that has more or less to go by.

With its prompt the decoder reads and listens. Without captions it can only listen, without its cross-attention it can
only read; where one errs, the others often do not. `promptless_weight` and `soundless_weight` are the shares of each
next token's probability that come from the two lesser readings: a linear opinion pool (Stone, Annals of Mathematical
Statistics 1961), as kNN-LM has it of what was retrieved and what was not (Khandelwal et al., ICLR 2020). It is no part
of the paper, and off unless it is asked for, by a call or by a checkpoint's generation_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import LogitsProcessor

from .decoding_recap import SharedPromptCache, decode_token, decode_with_shared_prompt
from .outputs_recap import position_ids_of

WEIGHTS = ("promptless_weight", "soundless_weight")
NO_READINGS = dict.fromkeys(WEIGHTS, 0.0)


@dataclass(frozen=True)
class Readings:
    """Which readings a caption is decoded with, beside the one with all there is.

    Args:
        promptless_weight (`float`, *optional*, defaults to 0.0): share of the reading without captions.
        soundless_weight (`float`, *optional*, defaults to 0.0): share of the language model alone, which reads the
            captions and does not listen.
        promptless_input_ids (*optional*): token ids of the prompt without captions, for the first.
    """

    promptless_weight: float = 0.0
    soundless_weight: float = 0.0
    promptless_input_ids: Any = None

    @classmethod
    def of(cls, given: Mapping[str, Any], config: Any) -> Readings:
        """What is given, and where it is `None` what the `GenerationConfig` says.

        Raises:
            `ValueError`: a weight below 0, weights that leave nothing to the reading with all, or a
                `promptless_weight` without its prompt.
        """
        values = {}
        for field in fields(cls):
            value = given.get(field.name)
            value = getattr(config, field.name, None) if value is None else value
            values[field.name] = field.default if value is None else value
        for name in WEIGHTS:
            _check_weight(name, values[name])
        if sum(values[name] for name in WEIGHTS) >= 1.0:
            raise ValueError(
                "`promptless_weight` and `soundless_weight` must leave something to the reading with captions and "
                f"sound: they add up to {sum(values[name] for name in WEIGHTS):g}, and must stay below 1."
            )
        if values["promptless_weight"] and values["promptless_input_ids"] is None:
            raise ValueError(
                "`promptless_weight` needs the prompt without captions: pass `processor=processor`, or "
                '`promptless_input_ids=processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0]`.'
            )
        return cls(**values)

    def __bool__(self) -> bool:
        return bool(self.promptless_weight or self.soundless_weight)


def _check_weight(name: str, weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 <= weight < 1.0:
        raise ValueError(
            f"`{name}` must be a number of at least 0 and below 1, got {weight!r}; for captions without any prompt "
            "give prompts without captions (`build_prompts(retrieved=[[]])`)."
        )


def reading_options(processor: Any, options: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Generation parameters with the processor's prompt without captions, where one is needed and none is given.

    With another datastore than the checkpoint's there is by default no listening without captions: it would speak in
    the words of the training, and the words are to be the datastore's.

    Args:
        processor ([`RecapProcessor`]): whose prompt it is.
        options (`Mapping`): what was asked for.
        config (`GenerationConfig`): whose weight is meant where none is given.
    """
    weight = options.get("promptless_weight")
    if weight is None:
        weight = getattr(config, "promptless_weight", None) if processor.has_own_datastore else 0.0
    options = {**options, "promptless_weight": weight}
    if weight and options.get("promptless_input_ids") is None:
        options["promptless_input_ids"] = processor.build_prompts(retrieved=[[]])["decoder_input_ids"][0]
    return options


class ReadingsMixture(LogitsProcessor):
    """Mixes the next token's distribution with those of the other readings.

    transformers' own search calls it as a logits processor, which reads the caption again at each step; the search of
    `search_recap` knows it and keeps [`ReadingStreams`].

    Args:
        readings ([`Readings`]): their shares.
        model ([`RecapForConditionalGeneration`]), states (`torch.Tensor`), mask (`torch.Tensor`, *optional*): of this
            call; the encoder's, a row per clip.
        prompts, prompt_mask (`torch.Tensor` of shape `(num_clips, length)`): with the captions, padding included.
    """

    def __init__(
        self,
        readings: Readings,
        model: Any,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        prompts: torch.LongTensor,
        prompt_mask: torch.Tensor | None,
    ) -> None:
        self.readings, self.model, self.states, self.mask = readings, model, states, mask
        self.prompt_mask = torch.ones_like(prompts) if prompt_mask is None else prompt_mask
        self.input_ids = None
        if readings.promptless_weight:
            self.input_ids = torch.as_tensor(readings.promptless_input_ids, device=states.device)

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = len(input_ids) // len(self.states)
        others = []
        if self.readings.promptless_weight:
            mask = None if self.mask is None else self.mask.repeat_interleave(rows, dim=0)
            said = input_ids[:, self.prompt_mask.shape[1] :]
            logits = self.model(
                encoder_outputs=(self.states.repeat_interleave(rows, dim=0),),
                attention_mask=mask,
                decoder_input_ids=torch.cat([self.input_ids.expand(len(said), -1), said], dim=1),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
            others.append((self.readings.promptless_weight, logits))
        if self.readings.soundless_weight:
            mask = self.prompt_mask.repeat_interleave(rows, dim=0)
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)
            logits = soundless_logits(self.model.decoder, input_ids, mask, 1)[:, -1]
            others.append((self.readings.soundless_weight, logits))
        return mix_log_probs(scores, others)

    def streams(
        self,
        decoder: Any,
        num_clips: int,
        input_ids: torch.LongTensor,
        decoder_attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
    ) -> ReadingStreams:
        """The readings for a search; everything with a row per beam, as for [`decode_with_shared_prompt`]."""
        streams = []
        if self.readings.promptless_weight:
            ids = self.input_ids.expand(len(input_ids), -1)
            heard = encoder_hidden_states, encoder_attention_mask
            stream = ReadingStream(decoder, num_clips, ids, torch.ones_like(ids), *heard)
            streams.append((self.readings.promptless_weight, stream))
        if self.readings.soundless_weight:
            stream = ReadingStream(decoder, num_clips, input_ids, decoder_attention_mask, None, None)
            streams.append((self.readings.soundless_weight, stream))
        return ReadingStreams(streams)


class ReadingStream:
    """One other reading step by step, beside a search: its own cache, the same beams.

    Args:
        decoder (`GPT2LMHeadModel`), input_ids, mask, encoder_hidden_states, encoder_attention_mask: as for
            [`decode_with_shared_prompt`], a row per beam; no states for a reading without sound.
        num_clips (`int`): clips in the batch.
    """

    def __init__(
        self,
        decoder: Any,
        num_clips: int,
        input_ids: torch.LongTensor,
        mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> None:
        self.decoder = decoder
        self.cache = SharedPromptCache(num_clips)
        positions = position_ids_of(mask)
        self.positions = positions[:, -1]
        self.logits = decode_with_shared_prompt(
            decoder, self.cache, input_ids, mask, positions, encoder_hidden_states, encoder_attention_mask
        )[:, -1]

    def follow(self, beams: torch.LongTensor, stay: torch.LongTensor | None, tokens: torch.LongTensor) -> None:
        """Goes one step with the search; see [`ReadingStreams`]."""
        self.cache.reorder_beams(beams)
        if stay is not None:
            self.cache.keep_clips(stay)
            self.positions = self.positions.view(-1, self.cache.group_size)[stay].flatten()
        self.positions = self.positions + 1
        self.logits = decode_token(self.decoder, self.cache, tokens, self.positions)


class ReadingStreams:
    """The other readings of a search, each with its share."""

    def __init__(self, streams: Sequence[tuple[float, ReadingStream]]) -> None:
        self.shares = list(streams)

    def mixed_with(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the reading with all `(rows, vocab_size)` -> log-probabilities of the mixture."""
        return mix_log_probs(logits, [(weight, stream.logits) for weight, stream in self.shares])

    def follow(self, beams: torch.LongTensor, stay: torch.LongTensor | None, tokens: torch.LongTensor) -> None:
        """Goes one step with the search.

        Args:
            beams (`torch.LongTensor` of shape `(num_clips, beams)`): which beam each goes on from.
            stay (`torch.LongTensor`, *optional*): the clips that stay in the batch, where not all do.
            tokens (`torch.LongTensor` of shape `(rows,)`): what each beam of these says.
        """
        for _, stream in self.shares:
            stream.follow(beams, stay, tokens)


def soundless_logits(decoder: Any, ids: torch.LongTensor, mask: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Logits of the last `num_kept` positions by the language model alone, its cross-attention left out."""
    return decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids_of(mask),
        use_cache=False,
        logits_to_keep=num_kept,
    ).logits


def mix_log_probs(prompted: torch.Tensor, others: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """`log((1 - sum of w) p + sum of w q)` of logits or log-probabilities `(..., vocab_size)`.

    What is impossible with the prompt (`-inf`, by another processor) stays so.
    """
    rest = 1.0 - sum(weight for weight, _ in others)
    mixed = prompted.float().log_softmax(dim=-1) + math.log(rest)
    for weight, logits in others:
        mixed = torch.logaddexp(mixed, logits.float().log_softmax(dim=-1) + math.log(weight))
    return mixed.masked_fill(prompted == -torch.inf, -torch.inf)


__all__ = [
    "NO_READINGS",
    "WEIGHTS",
    "ReadingStream",
    "ReadingStreams",
    "Readings",
    "ReadingsMixture",
    "mix_log_probs",
    "reading_options",
    "soundless_logits",
]
