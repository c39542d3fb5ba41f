"""Generation: prompts built on the way, nothing put before them, what the beams share computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput
from transformers.utils import ModelOutput

from .cache_name_recap import CACHE, name_cache, one_cache
from .decoding_recap import SharedPromptCache, can_share_prompt
from .fixed_decoding_recap import FixedDecoding
from .outputs_recap import RecapEncoderOutput, position_ids_of
from .prefix_recap import PREFIX, check_prefix_generation
from .readings_recap import (
    Readings,
    ReadingsMixture,
    mix_log_probs,
    reading_options,
    soundless_logits,
)
from .search_recap import SearchPlan, search


class RecapGenerationMixin(GenerationMixin):
    """`generate` and `score_captions` of [`RecapForConditionalGeneration`]."""

    # Decode steps in tensors that stay where they are, recorded as CUDA graphs; see `FixedDecoding`.
    fixed_decoding: FixedDecoding | None = None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        processor: Any = None,
        promptless_weight: float | None = None,
        soundless_weight: float | None = None,
        promptless_input_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Captions: `GenerationMixin.generate`, the audio encoded and (with a `processor`) the prompts built first.

        Args:
            inputs or input_features, input_features_mask: see `encode_audio`; or
            encoder_outputs ([`RecapEncoderOutput`]): what `encode_audio` returned. It is not changed.
            processor ([`RecapProcessor`], *optional*): retrieves captions and builds the prompts where no
                `decoder_input_ids` are given. Its datastore must come from this model's text encoder.
            promptless_weight, soundless_weight (`float`, *optional*): shares of each next token's probability that
                come from the same model without retrieved captions, and from the language model alone, which reads
                them and does not listen; below 1 together, see [`Readings`]. Default: those of the generation
                configuration, 0 where it has none.
            promptless_input_ids (`torch.LongTensor` of shape `(length,)`, *optional*): the prompt without captions,
                for `promptless_weight`; with a `processor` it is built.
            kwargs: everything else that `generate` takes, a cache as `cache` or `past_key_values`; `retrieved`, which
                `build_prompts` returns, is accepted and not needed.

        Returns:
            Token ids of shape `(batch_size * num_return_sequences, length)`, the prompt included, or a `ModelOutput`.

        Raises:
            `ValueError`: neither audio nor its encoding, neither prompts nor a processor, a cache under both of its
                names, weights outside their range, or a `promptless_weight` without its prompt.
        """
        kwargs.pop("retrieved", None)
        name_cache(kwargs)
        if isinstance(kwargs.get(CACHE), SharedPromptCache):
            # Used up by the call that has made it; what it holds is computed again.
            del kwargs[CACHE]
        given = {"promptless_weight": promptless_weight, "soundless_weight": soundless_weight}
        given["promptless_input_ids"] = promptless_input_ids
        config = generation_config or self.generation_config
        if processor is not None:
            given = reading_options(processor, given, config)
        readings = Readings.of(given, config)
        input_features = kwargs.pop("input_features", inputs)
        input_features_mask = kwargs.pop("input_features_mask", None)
        encoder_outputs = kwargs.pop("encoder_outputs", None)
        if encoder_outputs is None:
            if input_features is None:
                raise ValueError("Give either `input_features` or `encoder_outputs`; both are missing.")
            encoder_outputs = self.encode_audio(input_features, input_features_mask)
        elif isinstance(encoder_outputs, ModelOutput):
            # `generate` repeats what is in it once per beam: in a copy, so that the caller's stays as it was.
            encoder_outputs = RecapEncoderOutput(**encoder_outputs)
        else:
            encoder_outputs = RecapEncoderOutput(*encoder_outputs)
        if kwargs.get("decoder_input_ids") is None:
            if processor is None:
                raise ValueError(
                    "RECAP's decoder continues a prompt and none was given: pass `decoder_input_ids` and "
                    "`decoder_attention_mask` from `processor.build_prompts(encoding.audio_embeds)`, or "
                    "`processor=processor` to have them built."
                )
            processor.check_model(self)
            prompts = processor.build_prompts(encoder_outputs.audio_embeds)
            kwargs["decoder_input_ids"] = prompts["decoder_input_ids"]
            kwargs["decoder_attention_mask"] = prompts["decoder_attention_mask"]
        device = encoder_outputs.last_hidden_state.device
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].to(device)
        if kwargs.get("attention_mask") is None and encoder_outputs.attention_mask is not None:
            # Where transformers looks for it: without one it warns that batches of clips may go wrong.
            kwargs["attention_mask"] = encoder_outputs.attention_mask
        if kwargs.get("synced_gpus") is None and not _is_distributed():
            # Said here, transformers does not import FSDP to find out.
            kwargs["synced_gpus"] = False
        if self.config.conditioning == PREFIX:
            check_prefix_generation(generation_config or self.generation_config, kwargs)
        if can_share_prompt(self, generation_config or self.generation_config, kwargs):
            kwargs[CACHE] = SharedPromptCache(len(encoder_outputs.last_hidden_state))
        if readings:
            heard = encoder_outputs.last_hidden_state, kwargs.get("attention_mask")
            prompts = kwargs["decoder_input_ids"], kwargs.get("decoder_attention_mask")
            mixture = ReadingsMixture(readings, self, *heard, *prompts)
            kwargs["logits_processor"] = LogitsProcessorList([mixture, *(kwargs.get("logits_processor") or [])])
        return super().generate(generation_config=generation_config, encoder_outputs=encoder_outputs, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # transformers puts a caller's processors last; what the others forbid must stay forbidden.
        processors = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(sorted(processors, key=lambda one: not isinstance(one, ReadingsMixture)))

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # The stock hook would put a start token before prompts, and for one batch but not for another: whether it
        # does depends on the padding. The prompt is complete, only its positions have to follow its mask.
        input_ids = model_kwargs.pop("decoder_input_ids")
        if model_kwargs.get("decoder_attention_mask") is None:
            model_kwargs["decoder_attention_mask"] = torch.ones_like(input_ids)
        model_kwargs["decoder_position_ids"] = position_ids_of(model_kwargs["decoder_attention_mask"])
        return input_ids, model_kwargs

    def _beam_search(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> Any:
        """The search that `generate` has chosen: ours where it is a plain one, else transformers'."""
        found = self._search_plainly(input_ids, *args, **kwargs)
        if found is None:
            return super()._beam_search(input_ids, *args, **kwargs)
        return GenerateBeamEncoderDecoderOutput(**found) if isinstance(found, dict) else found

    def _sample(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> Any:
        """Greedy search and sampling; the same."""
        found = self._search_plainly(input_ids, *args, **kwargs)
        if found is None:
            return super()._sample(input_ids, *args, **kwargs)
        return GenerateEncoderDecoderOutput(**found) if isinstance(found, dict) else found

    def _search_plainly(
        self,
        input_ids: torch.LongTensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> torch.LongTensor | dict[str, Any] | None:
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, SharedPromptCache):
            return None
        length = input_ids.shape[1]
        plan = SearchPlan.of(generation_config, length, logits_processor, stopping_criteria, synced_gpus, streamer)
        if plan is None:
            return None
        sequences = search(
            self.decoder,
            cache,
            plan,
            input_ids,
            model_kwargs["decoder_attention_mask"],
            model_kwargs["decoder_position_ids"],
            model_kwargs["encoder_outputs"].last_hidden_state.to(self.decoder.dtype),
            model_kwargs.get("attention_mask"),
            self.fixed_decoding,
        )
        if not generation_config.return_dict_in_generate:
            return sequences
        return {"sequences": sequences, CACHE: cache}

    @torch.no_grad()
    def generate_with_scores(
        self, encoder_outputs: RecapEncoderOutput, prompts: Mapping[str, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.LongTensor, list[float]]:
        """The best sequence of each clip and its score, without computing the prompts again for it.

        Args:
            encoder_outputs ([`RecapEncoderOutput`]): what `encode_audio` returned.
            prompts (`Mapping`): `decoder_input_ids` and `decoder_attention_mask` from `build_prompts`.
            kwargs: generation parameters.

        Returns:
            `tuple`: token ids of shape `(batch_size, length)`, and the scores of `score_captions`.
        """
        return self.generate_candidates(encoder_outputs, prompts, 1, **kwargs)

    @torch.no_grad()
    def generate_candidates(
        self,
        encoder_outputs: RecapEncoderOutput,
        prompts: Mapping[str, torch.Tensor],
        num_candidates: int,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, list[float]]:
        """So many sequences of each clip, those of a clip together and the best first, and their scores.

        Args:
            encoder_outputs, prompts, kwargs: see `generate_with_scores`.
            num_candidates (`int`): of the sequences that `generate` returns for a clip, so many from the first.

        Returns:
            `tuple`: token ids of shape `(batch_size * num_candidates, length)`, and the scores of `score_captions`.
        """
        if kwargs.get("generation_config") is None:
            # Beside a whole configuration single parameters are deprecated; the cache is then not to be had.
            kwargs["return_dict_in_generate"] = True
        generated = self.generate(encoder_outputs=encoder_outputs, **prompts, **kwargs)
        sequences = getattr(generated, "sequences", generated)
        num_clips = len(encoder_outputs.last_hidden_state)
        rows = torch.arange(len(sequences), device=sequences.device).view(num_clips, -1)[:, :num_candidates].flatten()
        sequences = sequences[rows]
        cache = getattr(generated, CACHE, None)
        if isinstance(cache, SharedPromptCache) and cache.sequence_log_probs is not None:
            return sequences, cache.sequence_log_probs[rows].exp().tolist()
        if num_candidates > 1:
            encoder_outputs = _repeat(encoder_outputs, num_candidates)
            prompts, cache = _repeat(prompts, num_candidates), None
        readings = Readings.of(kwargs, kwargs.get("generation_config") or self.generation_config)
        return sequences, self.score_captions(encoder_outputs, sequences, prompts, cache, **vars(readings))

    @torch.no_grad()
    def score_captions(
        self,
        encoder_outputs: RecapEncoderOutput,
        sequences: torch.LongTensor,
        prompts: Mapping[str, torch.Tensor],
        cache: Any = None,
        promptless_weight: float | None = None,
        soundless_weight: float | None = None,
        promptless_input_ids: Any = None,
        past_key_values: Any = None,
    ) -> list[float]:
        """The exponential of the mean log-probability of each caption's tokens, its end token included.

        Args:
            encoder_outputs ([`RecapEncoderOutput`]): one entry per sequence.
            sequences (`torch.LongTensor` of shape `(batch_size, length)`): what `generate` returned.
            prompts (`Mapping`): the `decoder_input_ids` and `decoder_attention_mask` that it was given.
            cache or past_key_values (*optional*): the cache that this `generate` returned, under either name. A
                [`SharedPromptCache`] has the prompts in it already; it is used up. With any other, or none, they are
                computed again.
            promptless_weight, soundless_weight, promptless_input_ids (*optional*): as for `generate`.

        Returns:
            `list[float]`: probabilities between 0 and 1, comparable between captions of different lengths; 0.0 for
            a caption without a token.
        """
        given = {"promptless_weight": promptless_weight, "soundless_weight": soundless_weight}
        given["promptless_input_ids"] = promptless_input_ids
        readings = Readings.of(given, self.generation_config)
        cache = one_cache(cache, past_key_values)
        start = prompts["decoder_input_ids"].shape[1]
        mask = prompts["decoder_attention_mask"].to(sequences.device)
        targets = sequences[:, start:]
        eos = self.config.eos_token_id
        ended = (targets == eos).int().cumsum(dim=1) - (targets == eos).int()
        counted = ended == 0
        full_mask = torch.cat([mask, counted.to(mask.dtype)], dim=1)
        if isinstance(cache, SharedPromptCache) and cache.num_clips == len(sequences):
            logits = self._continue_prompts(encoder_outputs, targets[:, :-1], full_mask[:, :-1], cache)
        else:
            logits = self._target_logits(encoder_outputs, sequences, full_mask, targets.shape[1])
        if readings:
            logits = self._mixed(logits, readings, encoder_outputs, sequences, full_mask, start)
        log_probs = logits.float().log_softmax(dim=-1)
        token_log_probs = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2) * counted
        totals, counts = token_log_probs.sum(dim=1), counted.sum(dim=1)
        return [(total / count).exp().item() if count else 0.0 for total, count in zip(totals, counts, strict=True)]

    def _mixed(
        self,
        logits: torch.Tensor,
        readings: Readings,
        encoder_outputs: RecapEncoderOutput,
        sequences: torch.LongTensor,
        mask: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        """The logits of `sequences` from token `start` on -> log-probabilities of the readings' mixture."""
        targets, counted, others = sequences[:, start:], mask[:, start:], []
        if readings.promptless_weight:
            ids = torch.as_tensor(readings.promptless_input_ids, device=sequences.device).expand(len(sequences), -1)
            seen = torch.cat([torch.ones_like(ids), counted.to(ids.dtype)], dim=1)
            ids = torch.cat([ids, targets], dim=1)
            heard = self._target_logits(encoder_outputs, ids, seen, targets.shape[1])
            others.append((readings.promptless_weight, heard))
        if readings.soundless_weight:
            read = soundless_logits(self.decoder, sequences, mask, targets.shape[1] + 1)[:, :-1]
            others.append((readings.soundless_weight, read))
        return mix_log_probs(logits, others)

    def _target_logits(
        self, encoder_outputs: RecapEncoderOutput, ids: torch.LongTensor, mask: torch.Tensor, num_targets: int
    ) -> torch.Tensor:
        """Logits of the last `num_targets` of `ids`, `(batch_size, num_targets, vocab_size)`."""
        return self(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            use_cache=False,
            logits_to_keep=num_targets + 1,
        ).logits[:, :-1]

    def _continue_prompts(
        self,
        encoder_outputs: RecapEncoderOutput,
        tokens: torch.LongTensor,
        mask: torch.Tensor,
        cache: SharedPromptCache,
    ) -> torch.Tensor:
        """Logits after the prompt and after each of `tokens`, `(batch_size, tokens + 1, vocab_size)`."""
        if not tokens.shape[1]:
            return cache.prompt_logits
        continued = self(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=tokens,
            decoder_attention_mask=mask,
            cache=cache.prompt_cache(),
            use_cache=True,
        )
        return torch.cat([cache.prompt_logits, continued.logits], dim=1)


def _repeat(rows: Mapping[str, Any], times: int) -> Any:
    """Each row of every tensor so many times, one after the other."""
    repeated = {
        name: None if value is None else value.repeat_interleave(times, dim=0)
        for name, value in rows.items()
        if value is None or isinstance(value, torch.Tensor)
    }
    return RecapEncoderOutput(**repeated) if isinstance(rows, RecapEncoderOutput) else repeated


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


__all__ = ["RecapGenerationMixin"]
