"""The RECAP captioner: CLAP, GPT-2 and the cross-attention between them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from .configuration_recap import HIDDEN, PREFIX, RecapConfig, copy_remote_code, encoder_class, loading, push_arguments
from .encoder_recap import embedding_states
from .generation_recap import CACHE, RecapEncoderOutput, RecapGenerationMixin, one_cache, position_ids_of, states_mask
from .index_recap import from_package
from .options_recap import DECODING, RERANKING, CaptionOptions


class RecapCrossAttention(GPT2Attention):
    """GPT-2's cross-attention at a reduced width, over an encoder of any width. Its heads are narrower than the
    decoder's; at factor 1 with an encoder as wide as the decoder it is the stock layer."""

    def __init__(self, config: RecapConfig, layer_idx: int) -> None:
        decoder = config.decoder
        super().__init__(decoder, is_cross_attention=True, layer_idx=layer_idx)
        width = config.cross_attention_width
        self.split_size = width
        self.head_dim = width // self.num_heads
        if decoder.scale_attn_weights:
            # The stock layer has put its own head size into the scale, next to the layer's factor.
            self.scaling *= (decoder.n_embd // self.num_heads) ** 0.5 * self.head_dim**-0.5
        self.c_attn = Conv1D(2 * width, config.encoder_hidden_size)
        self.q_attn = Conv1D(width, decoder.n_embd)
        self.c_proj = Conv1D(decoder.n_embd, width)


class PrefixLayer(nn.Module):
    """One layer of the mapping: the prefix attends to audio and to itself; a feed-forward network follows. `width` is
    that of the language model's embeddings."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, prefix: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Shapes `(B, m, width)` and `(B, n, width)`; `mask` is boolean, `(B, 1, 1, n + m)`, True where seen."""
        normed = self.attention_norm(prefix)
        keys, values = self.key_value(torch.cat([states, normed], dim=1)).chunk(2, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(
            self._heads(self.query(normed)), self._heads(keys), self._heads(values), attn_mask=mask
        )
        prefix = prefix + self.attention_out(attended.transpose(1, 2).flatten(2))
        return prefix + self.contract(nn.functional.gelu(self.expand(self.mlp_norm(prefix))))

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PrefixMapper(nn.Module):
    """The mapping network of `conditioning="prefix"`: CLAP's hidden states to `prefix_length` embeddings, after Kim et
    al., "Prefix Tuning for Automated Audio Captioning", ICASSP 2023 (the paper's [6]).

    Learned embeddings, one for each place of the prefix, attend to all windows of a clip. What a mask leaves out is
    not seen, so a clip has the same prefix alone and in a batch.

    Args:
        config ([`RecapConfig`]): `prefix_length`, `prefix_num_layers`, and the sizes of both parts.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, num_heads = config.decoder.n_embd, config.decoder.n_head
        self.length = config.prefix_length
        self.project = nn.Linear(config.encoder_hidden_size, width)
        self.states_norm = nn.LayerNorm(width)
        self.places = nn.Embedding(self.length, width)
        self.layers = nn.ModuleList(PrefixLayer(width, num_heads) for _ in range(config.prefix_num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The prefix of each clip, of shape `(batch_size, prefix_length, n_embd)`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, n, d)`): of the audio tower, windows joined.
            attention_mask (`torch.Tensor` of shape `(batch_size, n)`, *optional*): 1 for what the clip has.
        """
        states = self.states_norm(self.project(hidden_states.to(self.project.weight.dtype)))
        prefix = self.places.weight.expand(len(states), -1, -1)
        mask = None
        if attention_mask is not None:
            own = attention_mask.new_ones(len(states), self.length)
            mask = torch.cat([attention_mask, own], dim=1).bool()[:, None, None]
        for layer in self.layers:
            prefix = layer(prefix, states, mask)
        return self.out(self.norm(prefix))

    def decoder_inputs(
        self,
        decoder: Any,
        prefix: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        """What the language model is called with: the prefix, then padding and prompt, whose positions follow. The
        other arguments are of the tokens alone. `prefix` is `None` where the decoder's cache has it already."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"A prefix takes a mask of shape (batch_size, length), got {attention_mask.shape}.")
        if attention_mask is not None:
            own = attention_mask.new_ones(len(attention_mask), self.length)
            attention_mask = torch.cat([own, attention_mask], dim=1)
        if position_ids is not None:
            position_ids = position_ids + self.length
        if prefix is not None:
            inputs_embeds = decoder.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, torch.cat([prefix.to(inputs_embeds.dtype), inputs_embeds], dim=1)
            if position_ids is not None:
                own = torch.arange(self.length, device=position_ids.device).expand(len(position_ids), -1)
                position_ids = torch.cat([own, position_ids], dim=1)
        tokens = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        return {**tokens, "attention_mask": attention_mask, "position_ids": position_ids}


class RecapForConditionalGeneration(PreTrainedModel, RecapGenerationMixin):
    """Audio captioning by retrieval: a GPT-2 continues a prompt of retrieved captions, conditioned on audio.

    The audio tower of `clap` gives hidden states for the cross-attention and the query of the retrieval, its text
    tower embeds the captions of a datastore. `decoder` is a `GPT2LMHeadModel` whose blocks have a
    [`RecapCrossAttention`]; with `conditioning="prefix"` they have none, and `prefix_mapper` makes embeddings that
    precede the prompt. Ghosh et al., "RECAP: Retrieval-Augmented Audio Captioning", ICASSP 2024.

    An attention implementation given as a plain string (`attn_implementation="sdpa"`) is the decoder's: CLAP has
    eager attention only.

    Args:
        config ([`RecapConfig`]): sizes of both parts and of the cross-attention.

    Example:
        >>> model = RecapForConditionalGeneration.from_clap_gpt2_pretrained("laion/clap-htsat-unfused", "gpt2")
        >>> model.freeze_base()
        7094016
    """

    config_class = RecapConfig
    base_model_prefix = "recap"
    cross_attention_class = RecapCrossAttention
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ClapAudioLayer", "ClapTextLayer", "GPT2Block"]  # noqa: RUF012
    # The decoder is called with one, `forward` with either.
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: RecapConfig) -> None:
        config.clap._attn_implementation = "eager"
        super().__init__(config)
        self.clap = encoder_class(config.clap)(config.clap)
        self.decoder = GPT2LMHeadModel(config.decoder)
        # The parts share the composite's configuration objects, so that they cannot drift apart.
        self.clap.config, self.decoder.config = config.clap, config.decoder
        self.prefix_mapper = PrefixMapper(config) if config.conditioning == PREFIX else None
        cross_attending = [block for block in self.decoder.transformer.h if config.decoder.add_cross_attention]
        for layer_idx, block in enumerate(cross_attending):
            block.crossattention = RecapCrossAttention(config, layer_idx)
        self._clap_is_frozen = False
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # The decoding of the authors' code.
        decoding = {"num_beams": 3, "max_new_tokens": 60, "length_penalty": 0.0, "early_stopping": True}
        self.generation_config = GenerationConfig(**tokens, **decoding)
        self.post_init()
        for block in cross_attending:
            # `post_init` leaves new layers in an initialised decoder without GPT-2's scaling by depth.
            block.crossattention.apply(self.decoder._init_weights)

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but missing weights and impossible decoding are a `ValueError` that names them."""
        with loading(name_or_path, "config.json, generation_config.json or the weights"):
            model, info = super().from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{len(missing)} weights are missing, such as {', '.join(missing[:3])}")
            _check_decoding(model.generation_config, range(model.config.decoder.vocab_size))
        return (model, info) if output_loading_info else model

    @classmethod
    def from_clap_gpt2_pretrained(
        cls,
        clap: str | os.PathLike | nn.Module,
        decoder: str | os.PathLike | GPT2LMHeadModel,
        *,
        clap_kwargs: dict[str, Any] | None = None,
        decoder_kwargs: dict[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> RecapForConditionalGeneration:
        """Puts a pretrained CLAP and a pretrained GPT-2 together; the cross-attention (or the prefix mapper) is new.

        Args:
            clap, decoder (`str`, path or module): Hub ids, folders, or loaded `ClapModel` and `GPT2LMHeadModel`.
            clap_kwargs, decoder_kwargs (`dict`, *optional*): passed to the `from_pretrained` of the parts.
            config_kwargs: fields of [`RecapConfig`], `cross_attention_reduce_factor=4` for one.

        Raises:
            `ValueError`: if the decoder is no GPT-2 language model. `ImportError`: where `recap_hf` is not installed.
        """
        stock = from_package("conversion.stock", "making a captioner of a CLAP and a GPT-2")
        return stock.join_parts(cls, clap, decoder, clap_kwargs, decoder_kwargs, **config_kwargs)

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.clap.audio_model

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """A plain string sets the decoder's attention; CLAP has no other than eager."""
        if not isinstance(attn_implementation, dict):
            attn_implementation = {"decoder": attn_implementation}
        # By part: the stock method of transformers 5.17 hands a string on to the towers inside CLAP, which refuse it.
        if "clap" in attn_implementation:
            self.clap.set_attn_implementation(attn_implementation["clap"], *args, **kwargs)
        decoder = attn_implementation.get("decoder", attn_implementation.get(""))
        if decoder is not None:
            self.decoder.set_attn_implementation(decoder, *args, **kwargs)
            self.config._attn_implementation_internal = self.config.decoder._attn_implementation

    def cross_attention_parameters(self) -> list[nn.Parameter]:
        """The parameters that RECAP trains: 7,094,016 for GPT-2 small at factor 4. None with a prefix."""
        return [] if self.prefix_mapper is not None else self.conditioning_parameters()

    def conditioning_modules(self) -> list[nn.Module]:
        """What lies between CLAP and GPT-2: the cross-attention of every block, or the mapper of the prefix."""
        if self.prefix_mapper is not None:
            return [self.prefix_mapper]
        blocks = self.decoder.transformer.h if self.config.decoder.add_cross_attention else ()
        return [block.crossattention for block in blocks]

    def conditioning_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, whatever the conditioning."""
        return [parameter for module in self.conditioning_modules() for parameter in module.parameters()]

    def freeze_base(self) -> int:
        """Freezes CLAP and GPT-2 and returns the number of parameters that remain trainable (paper, Section 3.1): of
        the cross-attention, or with `conditioning="prefix"` of the mapping network.

        A frozen CLAP also stays in evaluation mode when the model is put in training mode: its dropout and its batch
        norm would otherwise change its output.
        """
        self.requires_grad_(False)
        parameters = self.conditioning_parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._clap_is_frozen = True
        self.train(self.training)
        return sum(parameter.numel() for parameter in parameters)

    def train(self, mode: bool = True) -> RecapForConditionalGeneration:
        super().train(mode)
        if self._clap_is_frozen:
            self.clap.eval()
        return self

    def encode_audio(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        window_batch_size: int = 64,
        **kwargs: Any,
    ) -> RecapEncoderOutput:
        """One pass of the audio tower: the states for the cross-attention and the queries for the retrieval.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_windows, num_frames, num_mel_bins)`):
                Log-mel spectrograms in dB from [`RecapFeatureExtractor`].
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_windows)`, *optional*):
                1 for the windows that a clip has. Default: all.
            window_batch_size (`int`, *optional*, defaults to 64):
                Windows in one forward pass: bounds the memory of many or long clips.
            kwargs: further outputs of a feature extractor, which a pass by window does not need.

        Returns:
            [`RecapEncoderOutput`]
        """
        if input_features.dim() != 4:
            raise ValueError(
                "`input_features` must have the shape (batch_size, num_windows, num_frames, num_mel_bins), got "
                f"{tuple(input_features.shape)}."
            )
        parameter = next(self.clap.audio_model.parameters())
        input_features = input_features.to(device=parameter.device)
        batch_size, num_windows = input_features.shape[:2]
        mask = torch.ones(batch_size, num_windows) if input_features_mask is None else input_features_mask
        mask = mask.to(device=parameter.device).bool()
        windows = input_features[mask].unsqueeze(1).to(parameter.dtype)
        encoded = [
            self.clap.encode_windows(chunk, self.config.audio_position_embedding)
            for chunk in windows.split(window_batch_size)
        ]
        state, embed = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        if self.config.encoder_states != HIDDEN:
            state = embedding_states(embed)[:, None].to(state)
        hidden = state.new_zeros(batch_size, num_windows, *state.shape[1:])
        hidden[mask] = state
        audio_embeds = embed.new_zeros(batch_size, num_windows, embed.shape[-1])
        audio_embeds[mask] = embed
        return RecapEncoderOutput(
            last_hidden_state=hidden.flatten(1, 2),
            attention_mask=states_mask(hidden.flatten(1, 2)),
            audio_embeds=audio_embeds,
        )

    def embed_captions(self, captions: list[str], processor: Any, batch_size: int = 64) -> np.ndarray:
        """CLAP text embeddings of `captions`, float32 of shape `(len(captions), projection_dim)`, rows of unit length.

        Args:
            captions (`list[str]`): embedded verbatim.
            processor ([`RecapProcessor`]): its `clap_tokenizer` is used.
            batch_size (`int`, *optional*, defaults to 64): captions in a forward pass.
        """
        return self.clap.embed_captions(captions, processor.clap_tokenizer, batch_size)

    def embed_fingerprint(self, processor: Any) -> np.ndarray:
        """What tells the text encoder from others, of shape `(4, projection_dim)`; see the encoder's `fingerprint`."""
        return self.clap.fingerprint(processor.clap_tokenizer)

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: RecapEncoderOutput | tuple | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_windows, num_frames, num_mel_bins)`, *optional*):
                Log-mel spectrograms in dB; not needed with `encoder_outputs`.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_windows)`, *optional*): see `encode_audio`.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`):
                Prompt, and in training the caption after it.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, target_length)`, *optional*):
                1 for tokens, 0 for padding on either side. Padding is told by this mask, never by token ids.
            encoder_outputs ([`RecapEncoderOutput`], *optional*): what `encode_audio` returned.
            attention_mask (`torch.Tensor` of shape `(batch_size, encoder_length)`, *optional*):
                Mask over the encoder's positions; defaults to the one in `encoder_outputs`.
            cache or past_key_values (`Cache`, *optional*): what an earlier pass returned, so that only the tokens
                after those in it are given. Either name is taken, whichever this transformers has.
            decoder_position_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Defaults to positions counted over `decoder_attention_mask`.
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                As long as `decoder_input_ids`, -100 on prompt and padding, shifted inside as in GPT-2. The loss is
                the cross-entropy on the caption's tokens (paper, Section 3.1).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): as in GPT-2: 0 keeps all.

        Returns:
            `Seq2SeqLMOutput`: `loss` and `logits` of shape `(batch_size, target_length, vocab_size)`.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "`decoder_input_ids` are missing: RECAP's decoder continues a prompt. Build one with "
                "`processor.build_prompts(encoding.audio_embeds)`."
            )
        encoder_outputs = self.encoding_of(input_features, input_features_mask, encoder_outputs)
        if attention_mask is None:
            attention_mask = encoder_outputs.get("attention_mask")
        if decoder_position_ids is None and decoder_attention_mask is not None and decoder_attention_mask.dim() == 2:
            length = (decoder_inputs_embeds if decoder_input_ids is None else decoder_input_ids).shape[1]
            decoder_position_ids = position_ids_of(decoder_attention_mask)[:, -length:]
        cache = one_cache(cache, past_key_values)
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
        return_dict = kwargs.pop("return_dict", True)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        # Contiguous, since GPT-2's Conv1D calls `view`: states that were cut or transposed are welcome too.
        states = encoder_outputs.last_hidden_state.to(self.decoder.dtype).contiguous()
        tokens = (decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, decoder_position_ids)
        prefix = None
        if self.prefix_mapper is None:
            names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
            decoder_inputs = dict(zip(names, tokens, strict=True))
            if self.config.decoder.add_cross_attention:
                decoder_inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": attention_mask}
        else:
            if cache is None or cache.get_seq_length() == 0:
                prefix = self.prefix_mapper(states, attention_mask)
            decoder_inputs = self.prefix_mapper.decoder_inputs(self.decoder, prefix, *tokens)
            if prefix is not None and isinstance(logits_to_keep, torch.Tensor):
                logits_to_keep = logits_to_keep + prefix.shape[1]
            elif prefix is not None:
                # A prefix predicts nothing.
                tokens = decoder_inputs["inputs_embeds"].shape[1] - prefix.shape[1]
                logits_to_keep = min(logits_to_keep or tokens, tokens)
        output = self.decoder(
            **decoder_inputs, **{CACHE: cache}, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs
        )
        loss = None
        if labels is not None:
            loss_kwargs = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(output.logits, labels, vocab_size=self.config.decoder.vocab_size, **loss_kwargs)
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=output.logits,
            **{CACHE: getattr(output, CACHE)},
            decoder_hidden_states=output.hidden_states,
            decoder_attentions=output.attentions,
            cross_attentions=output.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
        )
        return result if return_dict else result.to_tuple()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the code is saved, too, so that `trust_remote_code=True` can load the folder."""
        if push_to_hub and state_dict is not None:
            raise ValueError("`push_to_hub=True` pushes the model's own weights: load the `state_dict` first.")
        os.makedirs(save_directory, exist_ok=True)
        copy_remote_code(save_directory)
        push = push_arguments(save_directory, kwargs) if push_to_hub else {}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if push_to_hub and is_main_process:
            self.push_to_hub(**push)


def _check_decoding(config: GenerationConfig, tokens: range) -> None:
    for name in CaptionOptions.names(DECODING, RERANKING):
        if getattr(config, name, None) is not None:
            CaptionOptions.check(name, getattr(config, name))
    start = "bos_token_id" if config.decoder_start_token_id is None else "decoder_start_token_id"
    for name in (start, "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [] if value is None and name == "pad_token_id" else [value]
        if not all(type(one) is int and one in tokens for one in ids):
            raise ValueError(f"`{name}` must be a token of the decoder, got {value!r:.80}")
    groups = getattr(config, "no_repeat_token_groups", None)
    whole = isinstance(groups, list) and len(groups) in (0, len(tokens))
    if groups is not None and not (whole and all(type(one) is int and one in tokens for one in groups)):
        raise ValueError(f"`no_repeat_token_groups` must be a number of 0 or above for each of {len(tokens)} tokens")


__all__ = ["PrefixMapper", "RecapForConditionalGeneration"]
