"""Generation: the audio is encoded and the prompt built first, then transformers' own `generate` runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput

from .configuration_recap import PREFIX

# transformers 5.24 renamed the cache of keys and values; the older name warns since. Asked of the layer, not of the
# version: a development version counts as one before its release.
CACHE = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"


@dataclass
class RecapEncoderOutput(ModelOutput):
    """What one pass of the audio tower gives.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_windows * positions, hidden_size)`):
            CLAP's last hidden state right before the projection (paper, Section 3.1), windows joined along time.
            Within a window the positions run over the frequency bins first, then time; of embeddings there is one.
        attention_mask (`torch.LongTensor` of shape `(batch_size, num_windows * positions)`):
            1 for the positions of a window that the clip has, 0 for padding.
        audio_embeds (`torch.FloatTensor` of shape `(batch_size, num_windows, projection_dim)`):
            L2-normalised query embeddings in float32, one per window; all zero where a clip has no such window.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    audio_embeds: torch.FloatTensor | None = None

    def rows(self, rows: torch.LongTensor) -> RecapEncoderOutput:
        """The encoding of some clips, which may repeat."""
        return RecapEncoderOutput(**{name: None if part is None else part[rows] for name, part in self.items()})


def states_mask(states: torch.Tensor) -> torch.LongTensor:
    """1 for the states that are attended to, `(batch_size, n, d)` -> `(batch_size, n)`: those that hold more than
    zeros, or all of a clip that has no other."""
    holds = (states != 0).any(dim=-1)
    return (holds | ~holds.any(dim=1, keepdim=True)).long()


def position_ids_of(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Positions of the tokens that a mask leaves, counted from 0; padding gets 0: `[0, 1, 1]` gives `[0, 0, 1]`."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def until_end(tokens: torch.LongTensor, eos_token_id: int | list[int]) -> torch.BoolTensor:
    """Which tokens of each row come before its first end token or are that one."""
    ends = torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device)).int()
    return ends.cumsum(dim=1) - ends == 0


def complete_config(given: GenerationConfig | None, default: GenerationConfig) -> GenerationConfig:
    """A copy of `given`, or of `default`. What `given` leaves open is that of `default`, as in `generate`."""
    config = copy.copy(given or default)
    for name, value in vars(default).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, under whichever of its two names it was given; a `ValueError` if it was given under both."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Give either `cache` or `past_key_values`: two names of one argument, and both are set.")
    return past_key_values if cache is None else cache


class AfterPrompt(LogitsProcessor):
    """Lets a processor see the caption's tokens and not the prompt's: a retrieved word is no repetition."""

    def __init__(self, processor: LogitsProcessor, prompt_length: int) -> None:
        self.processor, self.prompt_length = processor, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.processor(input_ids[:, self.prompt_length :], scores)


class _NoRepeatTokenGroups(LogitsProcessor):
    """Forbids the tokens of each group that a caption holds a token of: `groups[token]`, where 0 is no group."""

    def __init__(self, groups: list[int]) -> None:
        self.groups, self.count = torch.as_tensor(groups), max(groups) + 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        groups = self.groups.to(scores.device)
        # Groups along the rows: whole rows are looked up much faster than places in them.
        said = scores.new_zeros(self.count, len(scores), dtype=torch.bool)
        said[groups[input_ids], torch.arange(len(scores), device=scores.device)[:, None]] = True
        said[0] = False
        return scores.masked_fill(said.index_select(0, groups).T, -torch.inf)


class RecapGenerationMixin(GenerationMixin):
    """`generate` and `score_captions` of [`RecapForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        processor: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Captions: `GenerationMixin.generate`, the audio encoded and (with a `processor`) the prompts built first.

        `repetition_penalty`, `no_repeat_ngram_size` and `no_repeat_token_groups` (for each token the number of its
        group, 0: none; a caption holds one token of a group) count the tokens of the caption, not those of the prompt.

        Args:
            inputs or input_features, input_features_mask: see `encode_audio`; or
            encoder_outputs ([`RecapEncoderOutput`]): what `encode_audio` returned. It is not changed.
            processor ([`RecapProcessor`], *optional*): retrieves captions and builds the prompts where no
                `decoder_input_ids` are given. Its datastore must come from this model's text encoder.
            kwargs: everything else that `generate` takes; `retrieved`, which `build_prompts` returns, is accepted and
                not needed.

        Returns:
            Token ids of shape `(batch_size * num_return_sequences, length)`, the prompt included, or a `ModelOutput`.

        Raises:
            `ValueError`: neither audio nor its encoding, neither prompts nor a processor.
        """
        kwargs.pop("retrieved", None)
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        features = kwargs.pop("input_features", inputs)
        mask, encoder_outputs = kwargs.pop("input_features_mask", None), kwargs.pop("encoder_outputs", None)
        # `generate` repeats what is in it once per beam: in a copy, so that the caller's stays as it was.
        encoder_outputs = RecapEncoderOutput(**self.encoding_of(features, mask, encoder_outputs))
        if kwargs.get("decoder_input_ids") is None:
            if processor is None:
                raise ValueError(
                    "RECAP's decoder continues a prompt and none was given: pass `decoder_input_ids` and "
                    "`decoder_attention_mask` from `processor.build_prompts(encoding.audio_embeds)`, or `processor`."
                )
            processor.check_model(self)
            if processor.projection_temperature:
                raise ValueError("`generate` does not project embeddings: use `Captioner`, or `pipeline`.")
            prompts = processor.build_prompts(encoder_outputs.audio_embeds)
            kwargs |= {name: prompts[name] for name in ("decoder_input_ids", "decoder_attention_mask")}
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].to(encoder_outputs.last_hidden_state.device)
        if kwargs.get("attention_mask") is None and encoder_outputs.attention_mask is not None:
            # Where transformers looks for it: without one it warns that batches of clips may go wrong.
            kwargs["attention_mask"] = encoder_outputs.attention_mask
        config = complete_config(generation_config, self.generation_config)
        if self.config.conditioning == PREFIX:
            _check_prefix(config, kwargs)
        # A caption that runs on must not leave the decoder's positions, which breaks a GPU's process.
        room = self.config.decoder.n_positions - self.config.prefix_places - kwargs["decoder_input_ids"].shape[1]
        if room < (kwargs.get("max_new_tokens", config.max_new_tokens) or 0):
            kwargs["max_new_tokens"] = max(room, 1)
        generation_config = _take_penalties(generation_config, config, kwargs)
        return super().generate(generation_config=generation_config, encoder_outputs=encoder_outputs, **kwargs)

    def encoding_of(
        self, input_features: Any, input_features_mask: Any, encoder_outputs: Any = None
    ) -> RecapEncoderOutput:
        """`encoder_outputs`, or what `encode_audio` gives for the features; a `ValueError` if both are missing."""
        if encoder_outputs is not None:
            is_output = isinstance(encoder_outputs, ModelOutput)
            return encoder_outputs if is_output else RecapEncoderOutput(*encoder_outputs)
        if input_features is None:
            raise ValueError("Give either `input_features` or `encoder_outputs`; both are missing.")
        return self.encode_audio(input_features, input_features_mask)

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # The stock method puts a start token before some prompts: whether it does depends on the padding. The prompt
        # is complete, only its positions have to follow its mask.
        input_ids = model_kwargs.pop("decoder_input_ids")
        if model_kwargs.get("decoder_attention_mask") is None:
            model_kwargs["decoder_attention_mask"] = torch.ones_like(input_ids)
        model_kwargs["decoder_position_ids"] = position_ids_of(model_kwargs["decoder_attention_mask"])
        return input_ids, model_kwargs

    @torch.no_grad()
    def score_captions(
        self,
        encoder_outputs: RecapEncoderOutput,
        sequences: torch.LongTensor,
        prompts: Mapping[str, torch.Tensor],
        eos_token_id: int | list[int] | None = None,
    ) -> list[float]:
        """The exponential of the mean log-probability of each caption's tokens, its end token included.

        Args:
            encoder_outputs ([`RecapEncoderOutput`]): of each clip.
            sequences (`torch.LongTensor` of shape `(num_sequences, length)`): what `generate` returned, prompts
                included; the same number for each clip, those of a clip together.
            prompts (`Mapping`): the `decoder_input_ids` and `decoder_attention_mask` of each clip.
            eos_token_id (`int` or list, *optional*): that ended them; default: the model's.

        Returns:
            `list[float]`: probabilities between 0 and 1, comparable between captions of different lengths; 0.0 for
            a caption without a token.
        """
        num_clips = len(prompts["decoder_input_ids"])
        rows = torch.arange(num_clips, device=sequences.device).repeat_interleave(len(sequences) // num_clips)
        start = prompts["decoder_input_ids"].shape[1]
        mask = prompts["decoder_attention_mask"].to(sequences.device)[rows]
        targets = sequences[:, start:]
        if not targets.shape[1]:
            return [0.0] * len(sequences)
        counted = until_end(targets, self.config.eos_token_id if eos_token_id is None else eos_token_id)
        logits = self(
            encoder_outputs=encoder_outputs.rows(rows),
            decoder_input_ids=sequences,
            decoder_attention_mask=torch.cat([mask, counted.to(mask.dtype)], dim=1),
            use_cache=False,
            logits_to_keep=targets.shape[1] + 1,
        ).logits[:, :-1]
        log_probs = logits.float().log_softmax(dim=-1)
        totals = (log_probs.gather(2, targets.unsqueeze(2)).squeeze(2) * counted).sum(dim=1)
        return (totals / counted.sum(dim=1)).exp().tolist()


# With a prefix, each would have to know that the cache is longer than the tokens.
_REFUSED = ("cache_implementation", "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


def _check_prefix(generation_config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """A `ValueError` for ways of generating that rely on a cache without a prefix."""
    for name in _REFUSED:
        value = kwargs.get(name, getattr(generation_config, name, None))
        if value is not None and value != "dynamic":
            raise ValueError(
                f"A captioner conditioned by a prefix generates with the dynamic cache only: `{name}` is not "
                f"supported, got {value!r:.80}."
            )


# The setting that does nothing, and the processor, of each penalty on repetition.
_PENALTIES = {
    "repetition_penalty": (1.0, RepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": (0, NoRepeatNGramLogitsProcessor),
    "no_repeat_token_groups": ([], _NoRepeatTokenGroups),
}


def _take_penalties(
    given: GenerationConfig | None, config: GenerationConfig, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """Replaces the penalties on repetition of one call by processors that leave the prompt out, in `kwargs`.

    Returns the configuration to generate with: `given`, or its complete copy `config` without them.
    """
    length, processors, configured = kwargs["decoder_input_ids"].shape[1], [], False
    for name, (neutral, processor) in _PENALTIES.items():
        in_config, value = getattr(config, name, None), kwargs.pop(name, None)
        value = in_config if value is None else value
        configured = configured or in_config not in (None, neutral)
        if value not in (None, neutral):
            processors.append(AfterPrompt(processor(value), length))
    if configured:
        neutral = {name: value for name, (value, _) in _PENALTIES.items() if hasattr(config, name)}
        if given is None:
            # What is left out, `generate` would fill in from the model's own configuration.
            kwargs |= neutral
        else:
            given = config
            given.update(**neutral)
    if processors:
        kwargs["logits_processor"] = LogitsProcessorList([*processors, *(kwargs.get("logits_processor") or [])])
    return given


__all__ = ["AfterPrompt", "RecapEncoderOutput", "RecapGenerationMixin"]
