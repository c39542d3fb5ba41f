"""Generation: prompts built on the way, nothing put before them, what the beams share computed once."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .decoding_recap import SharedPromptCache, can_share_prompt
from .outputs_recap import RecapEncoderOutput, position_ids_of


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

        Args:
            inputs or input_features, input_features_mask: see `encode_audio`; or
            encoder_outputs ([`RecapEncoderOutput`]): what `encode_audio` returned. It is not changed.
            processor ([`RecapProcessor`], *optional*): retrieves captions and builds the prompts where no
                `decoder_input_ids` are given. Its datastore must come from this model's text encoder.
            kwargs: everything else that `generate` takes; `retrieved`, which `build_prompts` returns, is accepted
                and not needed.

        Returns:
            Token ids of shape `(batch_size * num_return_sequences, length)`, the prompt included, or a `ModelOutput`.
        """
        kwargs.pop("retrieved", None)
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
        if can_share_prompt(self, generation_config or self.generation_config, kwargs):
            kwargs["past_key_values"] = SharedPromptCache(len(encoder_outputs.last_hidden_state))
        return super().generate(generation_config=generation_config, encoder_outputs=encoder_outputs, **kwargs)

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

    @torch.no_grad()
    def score_captions(
        self,
        encoder_outputs: RecapEncoderOutput,
        sequences: torch.LongTensor,
        prompts: dict[str, torch.Tensor],
    ) -> list[float]:
        """The exponential of the mean log-probability of each caption's tokens, its end token included.

        Args:
            encoder_outputs ([`RecapEncoderOutput`]): one entry per sequence.
            sequences (`torch.LongTensor` of shape `(batch_size, length)`): what `generate` returned.
            prompts (`dict`): the `decoder_input_ids` and `decoder_attention_mask` that it was given.

        Returns:
            `list[float]`: probabilities between 0 and 1, comparable between captions of different lengths; 0.0 for
            a caption without a token.
        """
        start = prompts["decoder_input_ids"].shape[1]
        mask = prompts["decoder_attention_mask"].to(sequences.device)
        targets = sequences[:, start:]
        eos = self.config.eos_token_id
        ended = (targets == eos).int().cumsum(dim=1) - (targets == eos).int()
        counted = ended == 0
        full_mask = torch.cat([mask, counted.to(mask.dtype)], dim=1)
        output = self(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=sequences,
            decoder_attention_mask=full_mask,
            use_cache=False,
            logits_to_keep=targets.shape[1] + 1,
        )
        log_probs = output.logits[:, :-1].float().log_softmax(dim=-1)
        token_log_probs = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2) * counted
        totals, counts = token_log_probs.sum(dim=1), counted.sum(dim=1)
        return [(total / count).exp().item() if count else 0.0 for total, count in zip(totals, counts, strict=True)]


__all__ = ["RecapGenerationMixin"]
